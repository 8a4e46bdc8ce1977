"""significance.py against exact enumeration, SciPy, and simulations in which the truth is known."""
import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from data import Rows
from significance import bootstrap_difference, holm, mcnemar, premise_clusters


def test_the_bootstrap_draws_from_the_exact_distribution_of_a_small_case():
    differences = np.array([[1.0, 0.0], [1.0, -1.0], [0.0, 1.0], [-1.0, 0.5], [1.0, 0.0]])
    clusters = np.array([0, 0, 1, 2, 2])
    members = [np.flatnonzero(clusters == c) for c in range(3)]
    exact = np.array([differences[np.concatenate([members[c] for c in draw])].mean(0)
                      for draw in itertools.product(range(3), repeat=3)])                   # all 27 resamples
    mean, low, high, p = bootstrap_difference(differences, clusters, resamples=40_000, seed=3)
    assert mean == pytest.approx(differences.mean(0))
    np.testing.assert_allclose(low, np.percentile(exact, 2.5, axis=0, method="inverted_cdf"), atol=1e-9)
    np.testing.assert_allclose(high, np.percentile(exact, 97.5, axis=0, method="inverted_cdf"), atol=1e-9)
    expected = 2 * np.minimum((exact <= 1e-12).mean(0), (exact >= -1e-12).mean(0))
    np.testing.assert_allclose(p, np.minimum(1, expected), atol=0.01)


def rejections(cluster_effect, as_clusters, shift=0.0, trials=400):
    """How often a 5 % test rejects when A and B answer alike but for `shift`, on 120 clusters of 3 rows."""
    random, found = np.random.default_rng(7), 0
    groups = np.repeat(np.arange(120), 3)
    for trial in range(trials):
        lean = cluster_effect * random.normal(size=(120, 1))[groups]
        right = random.random((360, 2)) < 0.6 + lean * [1, -1] + np.array([shift, 0])
        differences = right[:, :1].astype(float) - right[:, 1:]
        clusters = groups if as_clusters else np.arange(360)
        found += bootstrap_difference(differences, clusters, resamples=400, seed=trial)[3][0] < 0.05
    return found / trials


def test_a_five_percent_test_rejects_about_five_percent_when_nothing_differs():
    assert 0.025 <= rejections(0.0, True) <= 0.085


def test_rows_that_lean_together_need_clusters():
    assert 0.025 <= rejections(0.25, True) <= 0.085
    assert rejections(0.25, False) > 0.12  # the same data, taken as independent rows, cries wolf


def test_a_true_difference_is_found():
    assert rejections(0.0, True, shift=0.15, trials=60) > 0.8


def test_systems_that_answer_alike_do_not_differ():
    mean, low, high, p = bootstrap_difference(np.zeros((9, 2)), np.arange(9), resamples=99)
    assert (mean == 0).all() and (low == 0).all() and (high == 0).all() and (p == 1).all()


def test_more_seeds_of_the_bootstrap_agree():
    differences = np.random.default_rng(0).integers(-1, 2, size=(301, 1)).astype(float) + 0.08
    first, second = (bootstrap_difference(differences, np.arange(301), seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(np.ravel(first), np.ravel(second), atol=0.02)
    again = bootstrap_difference(differences, np.arange(301), seed=0)
    assert np.array_equal(np.ravel(first), np.ravel(again))


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1, 1])


@pytest.mark.parametrize("only_a, only_b, both", [(3, 9, 20), (0, 0, 5), (7, 7, 0), (0, 6, 1), (400, 460, 100)])
def test_mcnemar_is_scipys_binomial_test(only_a, only_b, both):
    right_a = np.array([True] * only_a + [False] * only_b + [True] * both)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * both)
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(right_a, right_b) == pytest.approx(expected)


def test_clusters_are_premises_numbered_by_first_appearance():
    assert premise_clusters(Rows(["b", "a", "b", "c"], list("wxyz"), None)).tolist() == [0, 1, 0, 2]
    assert premise_clusters(Rows(["b", "a", "b"], None, None)).tolist() == [0, 1, 2]
