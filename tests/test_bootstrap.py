"""The bootstrap: changes by hand, pairs, strata, and what has no interval."""

import numpy as np
import pytest

from unidetox_jax.evaluation import bootstrap, categories


def change(values, **options):
    return bootstrap.change(*bootstrap.resample(values, 2000, 0, **options))


def test_a_change_of_a_ratio_by_hand():
    # pooled perplexity: (10 + 30) / (1 + 3) = 10 before, (12 + 32) / 4 = 11 after
    found = change(np.array([[10.0, 30.0], [12.0, 32.0]]), weights=np.array([[1, 3], [1, 3]]))
    assert found["percent"] == pytest.approx(10.0)
    # either prompt twice: 32/3 / 10, 12 / 10
    assert (found["low"], found["high"]) == (pytest.approx(100 * (32 / 30 - 1)), pytest.approx(20.0))


def test_the_interval_of_a_change_is_paired():
    before = np.random.default_rng(0).uniform(1, 100, 200)  # prompts differ much, the models by a tenth everywhere
    strata = categories.strata(["a"] * 50 + ["b"] * 150, {"id": ["a", "b"]})["id"]
    for options in ({}, {"strata": strata}):
        found = change(np.stack([before, 0.9 * before]), **options)
        assert found["percent"] == pytest.approx(-10)
        assert found["high"] - found["low"] < 1e-9


def test_a_change_from_nothing_is_none_and_one_from_almost_nothing_has_no_interval():
    assert change(np.array([[0.0, 0.0], [1.0, 0.0]])) is None
    rare = np.zeros((2, 50))
    rare[:, 0] = 1, 2
    assert change(rare) == {"percent": 100.0, "low": None, "high": None}
    assert bootstrap.change(np.array([2.0, 3.0])) == {"percent": 50.0, "low": None, "high": None}


def test_a_group_is_the_unweighted_mean_of_its_categories_and_all_prompts_count_alike():
    names = ["a", "b", "b", "", "c"]
    values = np.array([1.0, 2.0, np.nan, 8.0, 4.0])
    strata = categories.strata(names, {"id": ["a", "b", "none"], "ood": ["nothing"]})
    assert list(strata) == ["a", "b", "c", "id", "all"]
    assert bootstrap.resample(values, 0, 0, strata["id"])[0] == 1.5
    assert bootstrap.resample(values, 0, 0, strata["all"])[0] == 15 / 4
    assert categories.in_order(names, {"id": ["b", "none"], "ood": ["a"]}) == ["b", "a", "c"]


def test_bootstrap_interval_holds_the_mean_and_knows_nothing_of_missing_values():
    values = np.array([0.0, 1.0, np.nan, 1.0, 0.0])
    found = bootstrap.mean(values, 2000, 0)
    assert found["mean"] == 0.5 and found["texts"] == 4
    assert found["low"] < 0.5 < found["high"]
    assert bootstrap.mean(np.full(5, np.nan), 10, 0)["mean"] is None
    # 1.96 standard errors of a mean of 400 fair coins
    wide = bootstrap.mean(np.tile([0.0, 1.0], 200), 4000, 1)
    assert wide["high"] - wide["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_bootstrap_difference():
    one, other = np.array([1.0, 1.0, 1.0]), np.array([0.0, 1.0])
    found = bootstrap.difference(one, other, 500, 0)
    assert found["difference"] == 0.5
    assert (found["low"], found["high"]) == (0.0, 1.0)
    assert bootstrap.difference(one, np.array([np.nan]), 10, 0) is None


def test_where_nothing_has_a_value_numpy_says_nothing(recwarn):
    nothing = bootstrap.interval(np.full(20, np.nan))
    assert np.isnan([nothing["low"], nothing["high"]]).all()
    assert bootstrap.interval(np.array([np.nan, 1.0, 3.0])) == pytest.approx({"low": 1.05, "high": 2.95})
    assert not recwarn.list
