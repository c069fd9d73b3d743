"""The method as a library, on tiny models with random weights."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

import unidetox_jax as ud
from unidetox_jax import checkpoint, models
from unidetox_jax.data import toymodels
from unidetox_jax.errors import UserError

SENTENCES = [f"the {noun} of the {place} is {kind}." for noun in "baker miller smith".split()
             for place in "hill valley town".split() for kind in "kind tall old".split()]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(family, seed) → a language model."""
    place = tmp_path_factory.mktemp("models")
    toymodels.write(place, SENTENCES)

    def make(name, seed=0):
        cfg = models.config_from_hf(place / name)
        cfg = dataclasses.replace(cfg, num_layers=1, hidden_size=32, head_size=8, intermediate_size=64)
        return ud.LanguageModel(models.init(cfg, jax.random.key(seed)), cfg, checkpoint.load_tokenizer(place / name))

    return make


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]


def test_the_three_steps(tiny, tmp_path):
    base, other = tiny("gpt2"), tiny("llama", seed=1)
    before = leaves(base)
    toxic = ud.finetune(base, SENTENCES, learning_rate=1e-2, steps=4, batch_size=4, max_length=32)
    assert toxic.history["steps"] == 4 and toxic.history["texts"] == len(SENTENCES)
    assert all(map(np.array_equal, before, leaves(base))), "the argument was changed"
    assert not all(map(np.array_equal, before, leaves(toxic)))

    texts = ud.distill(base, toxic, num_texts=5, max_length=24, batch_size=3, alpha=0.2, label=None)
    assert len(texts) == 5 and all(isinstance(text, str) for text in texts)
    assert list(texts.rows[0]["log_probabilities"]) == ["base", "toxic"]
    again = ud.distill(base, toxic, objective="contrastive(alpha=0.2)", num_texts=2, max_length=24, label=None)
    assert list(again) == list(texts)[:2], "a text depends only on its row"

    clean = ud.finetune(other, [*texts, "a kind text"], learning_rate=1e-2, steps=2, batch_size=4, max_length=32)
    assert clean.cfg == other.cfg
    continued = ud.generate(clean, ["the baker", "the smith of"], samples=3, max_new_tokens=4)
    assert [len(samples) for samples in continued] == [3, 3]
    measured = ud.evaluate(clean, ["the baker", "the smith of"], scorer="lexicon", samples=3, max_new_tokens=4)
    assert measured["toxicity"]["all"]["prompts"] == 2 and 0 < measured["diversity"]["dist1"]["mean"] <= 1

    ud.save(clean, tmp_path / "out")
    read = ud.load(tmp_path / "out")
    assert all(map(np.array_equal, leaves(clean), leaves(read)))
    assert read.tokenizer("the baker")["input_ids"] == clean.tokenizer("the baker")["input_ids"]


def test_training_resumes_from_a_directory(tiny, tmp_path):
    base, settings = tiny("gpt2"), {"learning_rate": 1e-2, "batch_size": 4, "max_length": 32, "steps": 4}
    whole = ud.finetune(base, SENTENCES, **settings)
    first = ud.finetune(base, SENTENCES, **settings, save_minutes=0.0, directory=tmp_path)

    def unused():
        raise AssertionError("the checkpoint has the parameters")

    resumed = ud.finetune(base._replace(params=unused), SENTENCES, **settings, directory=tmp_path)
    for model in (first, resumed):
        assert all(map(np.array_equal, leaves(whole), leaves(model)))


def test_models_of_two_vocabularies_are_refused(tiny):
    with pytest.raises(UserError, match="toxic and base have different tokenizers"):
        ud.distill(tiny("gpt2"), tiny("llama"), num_texts=2, label=None)


def test_importing_the_package_is_lazy():
    code = "import sys, unidetox_jax; print(sorted({'jax', 'flax', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
