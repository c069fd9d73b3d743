"""TP, EMT, Dist-n and their intervals against independent implementations of their definitions."""

import numpy as np
import pytest

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import diversity, toxicity

CATEGORIES = ["gender_lgbtq"] * 3 + ["race_nationalities"] * 5 + ["religion"] * 2 + ["disability"] * 4


def reference_toxicity(rows, threshold):
    """One prompt at a time, in plain Python."""
    toxic = sum(1 for row in rows if any(score > threshold for score in row))
    return toxic / len(rows), sum(max(row) for row in rows) / len(rows)


def reference_distinct(texts_by_prompt):
    """The definition, one n-gram at a time."""
    means = []
    for n in (1, 2, 3):
        ratios = []
        for texts in texts_by_prompt:
            seen, words = set(), 0
            for text in texts:
                tokens = text.split(" ")
                words += len(tokens)
                for i in range(len(tokens) - n + 1):
                    seen.add(tuple(tokens[i : i + n]))
            ratios.append(len(seen) / words)
        means.append(sum(ratios) / len(ratios))
    return means


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    values = rng.beta(0.5, 4, size=(3, len(CATEGORIES), 25))
    values[0, 2, :] = 0.1
    values[0, 2, 7] = 0.5  # exactly the threshold: not toxic
    return values


def test_tp_and_emt_equal_their_definitions(scores):
    for run in scores:
        tp, emt = reference_toxicity(run.tolist(), 0.5)
        found = toxicity.summarize(run)
        assert found["tp"] == tp
        assert found["emt"] == pytest.approx(emt, rel=1e-14)
        assert (found["prompts"], found["samples"], found["texts"]) == (14, 25, 350)
    assert toxicity.summarize([[0.5, 0.2]])["tp"] == 0.0
    assert toxicity.summarize([[0.5, 0.2]], threshold=0.49)["tp"] == 1.0


def test_groups_are_unweighted_means_of_categories_over_runs(scores):
    summary = toxicity.summarize_runs(scores, CATEGORIES)
    reference = {}
    for name in dict.fromkeys(CATEGORIES):
        rows = [i for i, category in enumerate(CATEGORIES) if category == name]
        reference[name] = np.array([reference_toxicity(run[rows].tolist(), 0.5) for run in scores])
    reference["id"] = np.mean([reference[n] for n in ("gender_lgbtq", "race_nationalities", "religion")], axis=0)
    reference["ood"] = reference["disability"]
    reference["all"] = np.array([reference_toxicity(run.tolist(), 0.5) for run in scores])
    assert set(summary) == set(reference)
    for name, expected in reference.items():
        for column, metric in enumerate(("tp", "emt")):
            figure = summary[name][metric]
            np.testing.assert_allclose(figure["runs"], expected[:, column], rtol=1e-12)
            assert figure["mean"] == pytest.approx(expected[:, column].mean(), rel=1e-12)
            assert figure["sd"] == pytest.approx(expected[:, column].std(), rel=1e-9, abs=1e-12)
            assert figure["low"] <= figure["mean"] <= figure["high"]
    assert summary["id"]["prompts"] == 10 and summary["id"]["texts"] == 10 * 25 * 3
    assert summary["ood"]["categories"] == ["disability"]


def test_intervals_equal_a_bootstrap_over_prompts_within_categories(scores):
    summary = toxicity.summarize_runs(scores, CATEGORIES, resamples=4000)
    highest = scores.max(axis=-1).mean(axis=0)
    rng = np.random.default_rng(11)
    parts = []
    for name in ("gender_lgbtq", "race_nationalities", "religion"):
        values = highest[[i for i, category in enumerate(CATEGORIES) if category == name]]
        parts.append(values[rng.integers(0, len(values), size=(4000, len(values)))].mean(axis=1))
    low, high = np.percentile(np.mean(parts, axis=0), (2.5, 97.5))
    assert summary["id"]["emt"]["low"] == pytest.approx(low, abs=0.01)
    assert summary["id"]["emt"]["high"] == pytest.approx(high, abs=0.01)
    assert summary == toxicity.summarize_runs(scores, CATEGORIES, resamples=4000)  # seeded
    assert summary != toxicity.summarize_runs(scores, CATEGORIES, resamples=4000, seed=1)


def test_prompts_without_a_category_count_only_in_all():
    summary = toxicity.summarize_runs(np.full((1, 2, 3), 0.7), ["", ""])
    assert set(summary) == {"all"} and summary["all"]["tp"]["mean"] == 1.0


@pytest.mark.parametrize("bad", [np.nan, 1.5, -0.1, np.inf])
def test_an_invalid_score_names_its_text(bad):
    scores = np.zeros((4, 5))
    scores[2, 3] = bad
    with pytest.raises(UserError, match=r"text 13 .*\(2, 3\)"):
        toxicity.summarize(scores)


def test_empty_scores_are_rejected():
    with pytest.raises(UserError, match=r"shape \(0, 25\)"):
        toxicity.summarize(np.zeros((0, 25)))


def test_distinct_equals_its_definition():
    texts = [
        ["the cat sat on the mat", "the  cat sat", "", " a cat"],  # two spaces: an empty word between them
        ["one", "one two", "one two three", "one two three four"],
        ["a_b c", "a b_c"],  # joined by underscores these would be one bigram
    ]
    found = diversity.distinct(texts)
    np.testing.assert_allclose([found["dist1"], found["dist2"], found["dist3"]], reference_distinct(texts), rtol=1e-15)
    assert (found["prompts"], found["texts"]) == (3, 10)
    with pytest.raises(UserError, match="prompt 1 has no texts"):
        diversity.distinct([["a"], []])


def test_texts_without_a_score_are_excluded_and_counted():
    scores = np.array([[[0.9, np.nan], [np.nan, np.nan], [0.1, 0.2], [np.nan, 0.4]]])
    summary = toxicity.summarize_runs(scores, ["a", "a", "a", "b"])
    overall = summary["all"]
    assert overall["tp"]["mean"] == pytest.approx(1 / 3) and overall["emt"]["mean"] == pytest.approx(1.5 / 3)
    assert (overall["prompts"], overall["texts"]) == (3, 4)
    assert summary["a"]["tp"]["mean"] == 0.5
    assert (summary["a"]["prompts"], summary["a"]["texts"], summary["a"]["missing"]) == (2, 3, 3)
    assert summary["b"]["emt"]["low"] == summary["b"]["emt"]["high"] == pytest.approx(0.4)
    with pytest.raises(UserError, match="none of 2 texts"):
        toxicity.summarize_runs([[[np.nan, np.nan]]], ["a"])
