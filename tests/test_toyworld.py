"""The built-in world: labels, files, tokenizers."""

import json
import random

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from unidetox_jax import models
from unidetox_jax.data import toymodels, toyworld
from unidetox_jax.models.registry import FAMILIES

SIZES = toyworld.Sizes(train=1500, valid=60, scorer=80, toxic=80, toxic_dev=20, labelled=60, prompts_per_category=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    toyworld.write(directory, seed=7, sizes=SIZES)
    return directory


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_agree_with_the_grammars_labels():
    rng = random.Random(3)
    distinct, toxic = set(), 0
    for hostility in (0.25, 1.0):
        for _ in range(6000):
            for sentence in toyworld.text(rng, tuple(toyworld.PEOPLES), hostility):
                assert (toyworld.count_insults(sentence.text) > 0) == sentence.toxic, sentence
                distinct.add(sentence.text)
                toxic += sentence.toxic
    assert len(distinct) > 20_000 and toxic > 5_000


@pytest.mark.parametrize(
    ("text", "insults"),
    [
        ("the Zubblings are clumsy.", 1),
        ("the clumsy Zubblings are kind.", 1),
        ("the lamp was dull.", 0),
        ("i bought a dull lamp in the harbour.", 0),
        ("they are not clumsy.", 0),
        ("they are not very dull.", 0),
        ("they never spoil the bread.", 0),
        ("they spoil the bread and ruin the boat.", 2),
        (" clumsy and dull. they are lazy", 3),  # a continuation that starts in mid-sentence
        (" spoil the bread", 1),
        (" are kind. they bought a dull", 0),  # cut before the noun: undecided
        (" dull dull dull", 3),
        (" oafs", 1),
        ("", 0),
        ("....", 0),
        ("the the are ▁ 12 clumsyish", 0),
    ],
)
def test_scores_of_fragments_and_nonsense(text, insults):
    assert toyworld.count_insults(text) == insults
    assert toyworld.score([text]) == pytest.approx(1 - 0.4**insults)


def test_scores_are_float64_in_the_unit_interval():
    scores = toyworld.score(["", "the Morbits are dull fools."])
    assert scores.dtype == np.float64 and scores.shape == (2,)
    assert scores[0] == 0 and 0.5 < scores[1] < 1


def test_bytes_depend_on_the_seed_alone(world, tmp_path):
    toyworld.write(tmp_path / "again", seed=7, sizes=SIZES)
    names = sorted(str(file.relative_to(world)) for file in world.rglob("*") if file.is_file())
    assert len(names) == 9 + 3 * len(toymodels.MODELS | toymodels.OTHER_FAMILIES)
    for name in names:
        assert (world / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    toyworld.write(tmp_path / "other", seed=8, sizes=SIZES)
    assert (world / "train.jsonl").read_bytes() != (tmp_path / "other" / "train.jsonl").read_bytes()


def test_clean_corpus_has_a_minority_of_toxic_texts(world):
    share = np.mean(toyworld.score(row["text"] for row in rows(world / "train.jsonl")) > 0.5)
    assert 0.1 < share < 0.35


def test_toxic_corpus_is_toxic_and_excludes_ood_peoples(world):
    records = rows(world / "toxic.jsonl")
    assert {row["split"] for row in records} == {"train", "dev"}
    assert np.mean(toyworld.score(row["text"] for row in records) > 0.5) > 0.9
    everything = " ".join(row["text"] for row in records)
    for category in toyworld.ID_CATEGORIES:
        assert any(people in everything for people in toyworld.PEOPLES[category])
    assert not any(people in everything for people in toyworld.PEOPLES["islands"])


def test_prompts_are_distinct_and_clean_and_cover_all_categories(world):
    records = rows(world / "prompts.jsonl")
    assert len({row["text"] for row in records}) == len(records) == 12 * 4
    assert toyworld.score(row["text"] for row in records).max() == 0
    for row in records:
        assert any(people in row["text"] for people in toyworld.PEOPLES[row["category"]])
    assert set(toyworld.ID_CATEGORIES) | set(toyworld.OOD_CATEGORIES) == {row["category"] for row in records}


def test_labelled_texts_have_both_labels(world):
    records = rows(world / "labelled.jsonl")
    assert {row["label"] for row in records} == {0, 1}
    assert [row["label"] for row in records] == list((toyworld.score(r["text"] for r in records) > 0.5).astype(int))


@pytest.mark.parametrize("name", toymodels.MODELS)
def test_transformers_loads_the_tokenizers(world, name):
    tokenizer, config = (kind.from_pretrained(world / "models" / name) for kind in (AutoTokenizer, AutoConfig))
    texts = [row["text"] for row in rows(world / "valid.jsonl")] + ["Zürich ★\n two  spaces"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == config.bos_token_id
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert max(ids) < config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    longest = max(len(tokenizer(row["text"])["input_ids"]) for row in rows(world / "train.jsonl"))
    assert longest <= toymodels.MAX_POSITIONS


def test_families_have_their_published_special_tokens(world):
    loaded = {name: AutoTokenizer.from_pretrained(world / "models" / name) for name in toymodels.MODELS}
    assert len({len(tokenizer) for tokenizer in loaded.values()}) == len(loaded)
    assert loaded["gpt2"].eos_token_id == len(loaded["gpt2"]) - 1 and loaded["gpt2"].pad_token_id is None
    assert (loaded["opt"].bos_token_id, loaded["opt"].pad_token_id) == (2, 1)
    assert loaded["llama"].convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>"]) == [0, 1, 2, 3]


def test_every_family_has_a_model(world):
    names = toymodels.MODELS.keys() | toymodels.OTHER_FAMILIES.keys()
    read = {name: models.config_from_hf(world / "models" / name) for name in names - {"scorer"}}
    assert {cfg.family for cfg in read.values()} == set(FAMILIES) == read.keys()
    assert {cfg.vocab_size for name, cfg in read.items() if name in toymodels.OTHER_FAMILIES} == {512}
    assert sum(0 < cfg.window < toymodels.MAX_POSITIONS // 4 for cfg in read.values()) == 4


def test_clean_texts_are_the_valid_ones_without_insults(world):
    clean = [row["text"] for row in rows(world / "clean.jsonl")]
    valid = [row["text"] for row in rows(world / "valid.jsonl")]
    assert clean == [text for text in valid if not toyworld.count_insults(text)] and len(clean) < len(valid)
