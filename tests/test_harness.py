"""Our models in lm-evaluation-harness against lm_eval's own `hf` model with the same weights."""

import json
import pathlib

import numpy as np
import pytest
import torch

from tests.eval_helpers import WORDS, make_pair, make_tokenizer, torch_logprobs
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.evaluation.scorers import linear

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from unidetox_jax.evaluation import harness, harness_toxicity  # noqa: E402

PACKAGED = pathlib.Path(harness_toxicity.__file__).with_suffix(".yaml")
CONTEXT = 96

CHOICE = """
task: birds_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}, train: {data}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: birds_generation
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: [" the", "\\n\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: birds_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def some(rng, least, most):
    return " ".join(rng.choice(WORDS, rng.integers(least, most)))


@pytest.fixture(scope="module")
def pair():
    torch_model, model = make_pair(seed=7, context=CONTEXT)
    tokenizer = make_tokenizer()
    torch_model.generation_config.max_length = None
    theirs = HFLM(pretrained=torch_model, tokenizer=tokenizer, batch_size=4, max_length=CONTEXT)
    return harness.HarnessLM(model, tokenizer, batch_size=8), theirs


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Three task files and their data, all on disk."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = [
        {
            "question": some(rng, 6, 60 if i % 5 == 0 else 20),
            "choices": [some(rng, 1, 4) for _ in range(3)],
            "answer": int(rng.integers(3)),
        }
        for i in range(12)
    ]
    data = tmp_path / "birds.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = []
    for name, text in (("choice", CHOICE), ("generation", GENERATION), ("rolling", ROLLING)):
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(text.format(data=data))
    return [str(path) for path in paths]


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index, metadata=("birds", index, 1))
        for index, given in enumerate(arguments)
    ]


def test_likelihoods_are_those_of_the_hf_model(pair):
    ours, theirs = pair
    rng = np.random.default_rng(1)
    shared = some(rng, 20, 30)
    given = [(some(rng, 3, 40), f" {some(rng, 1, 6)}") for _ in range(20)]
    given += [(shared, f" {some(rng, 1, 6)}") for _ in range(5)]  # read once
    given += [("", some(rng, 2, 5)), ("the cat ", "sat"), (some(rng, 150, 160), " a tree")]  # the last is cut
    found = ours.loglikelihood(requests("loglikelihood", given), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", given), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_likelihoods_are_those_of_the_hf_model(pair):
    ours, theirs = pair
    rng = np.random.default_rng(2)
    given = [(some(rng, 1, 20),), (some(rng, 250, 260),), ("a",)]  # one longer than two contexts
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", given), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", given), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_greedy_text_is_that_of_the_hf_model(pair):
    ours, theirs = pair
    rng = np.random.default_rng(3)
    settings = [
        {"until": [" the"], "max_gen_toks": 24, "do_sample": False},
        {"until": ["e s", "\n"], "max_gen_toks": 16},  # may lie across two tokens
    ]
    given = [(some(rng, 2, 100 if i == 5 else 25), settings[i % 2]) for i in range(14)]
    found = ours.generate_until(requests("generate_until", given), disable_tqdm=True)
    expected = theirs.generate_until(requests("generate_until", given), disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > 7 and any(found)


def test_an_empty_context_is_the_end_of_the_text_before(pair):
    """Of a tokenizer that puts nothing before a text: what BOS, or else the end token, predicts."""
    torch_model, model = make_pair(seed=7, context=CONTEXT)
    bare = make_tokenizer(bos=False)
    ours = harness.HarnessLM(model, bare, batch_size=8)
    given = requests("generate_until", [("", {"until": ["\n"], "max_gen_toks": 12})])
    (text,) = ours.generate_until(given, disable_tqdm=True)
    start = torch.tensor([[bare.bos_token_id]])
    tokens = torch_model.generate(start, max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
    assert text == bare.decode(tokens, skip_special_tokens=True).split("\n")[0] != ""
    scored = [("", " the cat"), ("  ", "the cat")]  # the second's context goes into its continuation whole
    found = ours.loglikelihood(requests("loglikelihood", scored), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(scored, found, strict=True):
        tokens = [bare.bos_token_id, *bare(context + continuation)["input_ids"]]
        logprobs = torch_logprobs(torch_model, tokens)
        assert value == pytest.approx(float(logprobs[range(len(tokens) - 1), tokens[1:]].sum()), abs=1e-3)


def test_settings_that_do_nothing_are_passed_over_and_others_refused(pair):
    ours, _ = pair
    plain = {"until": ["\n"], "max_gen_toks": 8}
    neutral = {
        "repetition_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0,
        "typical_p": 1.0, "length_penalty": 2.0, "early_stopping": False, "top_k": -1, "top_p": None,
        "temperature": None, "penalty_alpha": None, "output_scores": False, "presence_penalty": 0,
    }  # fmt: skip
    given = requests("generate_until", [("the cat", plain), ("the cat", {**plain, **neutral})])
    texts = ours.generate_until(given, disable_tqdm=True)
    assert texts[0] == texts[1] != ""
    for name, value in {"repetition_penalty": 1.2, "num_beams": 4, "min_new_tokens": 3, "unheard_of": 1}.items():
        with pytest.raises(UserError, match=f"{name}={value}, which is not implemented"):
            ours.generate_until(requests("generate_until", [("a", {**plain, name: value})]), disable_tqdm=True)


@pytest.mark.slow
def test_tasks_in_local_files_give_the_same_metrics(pair, tasks):
    ours, theirs = pair
    found = harness.evaluate(ours.model, ours.tokenizer, tasks, batch_size=8)
    expected = lm_eval.simple_evaluate(model=theirs, tasks=tasks, bootstrap_iters=0, log_samples=False)["results"]
    assert set(found) == {"birds_choice", "birds_generation", "birds_rolling"}
    for task, metrics in (
        ("birds_choice", ("acc", "acc_norm")),
        ("birds_generation", ("exact_match",)),
        ("birds_rolling", ("word_perplexity", "bits_per_byte")),
    ):
        assert found[task]["documents"] == 12
        for metric in metrics:
            assert found[task][metric] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4)
    assert harness.evaluate(ours.model, ours.tokenizer, tasks[:1], limit=4)["birds_choice"]["documents"] == 4


@pytest.mark.slow
def test_mistakes(pair, tmp_path):
    ours, _ = pair
    with pytest.raises(UserError, match="no file .*none.yaml"):
        harness.evaluate(ours.model, ours.tokenizer, [str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="no task 'hellaswagg'"):
        harness.evaluate(ours.model, ours.tokenizer, ["hellaswagg"])
    (tmp_path / "bad.yaml").write_text(
        "task: bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}"
    )
    with pytest.raises(UserError, match="bad.yaml cannot be loaded"):
        harness.evaluate(ours.model, ours.tokenizer, [str(tmp_path / "bad.yaml")])


TOXICITY = """
include: {packaged}
task: birds_toxicity
repeats: 3
filter_list: [{{name: none, filter: [{{function: take_first_k, k: 3}}]}}]
metadata: {{prompts: {prompts}, scorer: "{scorer}", max_prompts: 3}}
"""


def has_cat(texts):
    return np.array([0.9 if "cat" in text else 0.1 + 0.01 * len(text) % 0.1 for text in texts])


@pytest.mark.parametrize("kind", ["function", "linear"])
def test_toxicity_of_generations_by_any_scorer(pair, tmp_path, monkeypatch, kind):
    """The packaged task in a file of one's own: TP, EMT and the mean score are those of the texts that were logged."""
    ours, _ = pair
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tfds"))
    scorer = "tests.test_harness:has_cat"
    if kind == "linear":
        texts = [some(np.random.default_rng(i), 5, 9) for i in range(40)]
        labels = ["toxic" if "cat" in text else "harmless" for text in texts]
        linear.save(tmp_path / "scorer", linear.fit(texts, labels, ("harmless", "toxic")), {})
        scorer = f"linear:{tmp_path}/scorer"
    (tmp_path / "prompts.csv").write_text("text,category\nthe cat,a\nthe dog,b\na tree,a\nthe sea,b\n")
    path = tmp_path / "toxicity.yaml"
    path.write_text(TOXICITY.format(packaged=PACKAGED, prompts=tmp_path / "prompts.csv", scorer=scorer))
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model=ours, tasks=[str(path)], task_manager=manager, bootstrap_iters=0)
    samples = found["samples"]["birds_toxicity"]
    assert len(samples) == 3 and {sample["doc"]["category"] for sample in samples} == {"a", "b"}
    scores = np.array([scorers.get(scorer)(sample["filtered_resps"][0]) for sample in samples])
    assert scores.shape == (3, 3) and len({text for sample in samples for text in sample["filtered_resps"][0]}) > 6
    values = found["results"]["birds_toxicity"]
    assert values["emt,none"] == pytest.approx(scores.max(axis=1).mean())
    assert values["tp,none"] == pytest.approx((scores.max(axis=1) > 0.5).mean())
    assert values["toxicity,none"] == pytest.approx(scores.mean())
    assert harness.evaluate(ours.model, ours.tokenizer, [str(path)], batch_size=8)["birds_toxicity"]["documents"] == 3


def test_the_packaged_task_is_found_by_name(pair, tmp_path):
    """As `lm_eval --include_path DIRECTORY --metadata …` finds it, on the built-in world's own scorer."""
    ours, _ = pair
    (tmp_path / "prompts.csv").write_text("text\nthe cat\nthe dog\n")
    metadata = {"prompts": str(tmp_path / "prompts.csv"), "scorer": "lexicon"}
    manager = TaskManager(include_path=str(PACKAGED.parent), include_defaults=False, metadata=metadata)
    found = lm_eval.simple_evaluate(model=ours, tasks=["unidetox_toxicity"], task_manager=manager, bootstrap_iters=0)
    samples = found["samples"]["unidetox_toxicity"]
    assert [len(sample["filtered_resps"][0]) for sample in samples] == [25, 25]
    assert 0.0 <= found["results"]["unidetox_toxicity"]["tp,none"] <= 1.0
