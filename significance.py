"""Is one system better than another on the same test rows, or is it luck? Pure functions on 0/1 correctness.

Read by evaluate.py and claims.py, run by none. The rows of a test set are not independent (XNLI has three hypotheses a
premise, and translations of one sentence), so whole clusters are resampled: Efron and Tibshirani (1993), section 8.
What a resample varies is the test rows; the seeds are averaged over, not resampled.
"""
import math

import numpy as np


def premise_clusters(rows):
    """Number the rows' distinct premises in order of appearance: Rows -> (N,) int64; each single text is a cluster."""
    numbers = {}
    keys = rows.text_a if rows.text_b else range(len(rows.text_a))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def bootstrap_difference(differences, clusters, resamples=10_000, seed=0):
    """Cluster bootstrap of mean differences between two systems on the same rows.

    differences (N, L): for each row and language, correctness of A less that of B, each averaged over its seeds.
    clusters (N,): the rows with one number are drawn together. Each resample draws as many clusters as there are, with
    replacement, the same ones in every language.

    Returns the mean (L,), the 95 % interval's ends (L,), (L,) by percentiles, and the two-sided p-value (L,): twice the
    smaller share of resamples on either side of 0, which inverts that interval.
    """
    differences = np.asarray(differences, dtype=float)
    count = int(clusters.max()) + 1
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, clusters, differences)
    sizes = np.bincount(clusters, minlength=count).astype(float)
    random, draws, chunk = np.random.default_rng(seed), [], max(1, min(1000, 10_000_000 // count))  # to bound memory
    for start in range(0, resamples, chunk):
        n = min(chunk, resamples - start)
        picked = random.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        weights = np.bincount(picked.ravel(), minlength=n * count).reshape(n, count).astype(float)
        draws.append(weights @ sums / (weights @ sizes)[:, None])
    draws = np.concatenate(draws)                                                       # (resamples, L)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    # a mean that is 0 but for rounding counts on both sides
    tails = [(1 + (sign * draws <= 1e-12).sum(0)) / (resamples + 1) for sign in (1, -1)]
    return differences.mean(0), low, high, np.minimum(1, 2 * np.minimum(*tails))


def spread(values, axis=-1):
    """Standard deviation over seeds (n - 1), 0 for a single one."""
    count = np.shape(values)[axis]
    return np.std(values, axis, ddof=1) if count > 1 else np.std(values, axis)


def holm(p_values):
    """Holm's (1979) step-down correction of several p-values: (L,) -> (L,), each at least as large as before."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * (len(p_values) - np.arange(len(p_values))))
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1, stepped)
    return corrected


def mcnemar(right_a, right_b):
    """McNemar's (1947) exact test of two single runs, from the rows where just one is right: two-sided p-value.

    right_a, right_b: (N,) bool. Rows count as independent here, which clusters are not: information, not the verdict.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n)
