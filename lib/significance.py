"""Intervals over rows and seeds, Holm's correction, verdicts."""

import math
from typing import NamedTuple

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
    draws = resampled_means(differences, clusters, resamples, seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    # a mean that is 0 but for rounding counts on both sides
    tails = [(1 + (sign * draws <= 1e-12).sum(0)) / (resamples + 1) for sign in (1, -1)]
    return differences.mean(0), low, high, np.minimum(1, 2 * np.minimum(*tails))


def resampled_means(differences, clusters, resamples, seed=0):
    """Means of resampled clusters: (N, L) -> (resamples, L)."""
    count = int(clusters.max()) + 1
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, clusters, differences)
    sizes = np.bincount(clusters, minlength=count).astype(float)
    random, draws, chunk = (
        np.random.default_rng(seed),
        [],
        max(1, min(1000, 10_000_000 // count)),
    )  # to bound memory
    for start in range(0, resamples, chunk):
        n = min(chunk, resamples - start)
        picked = random.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        weights = np.bincount(picked.ravel(), minlength=n * count).reshape(n, count).astype(float)
        draws.append(weights @ sums / (weights @ sizes)[:, None])
    return np.concatenate(draws)


MARGIN = 0.01  # "no gain" means: better by less than this, by the same interval


class Interval(NamedTuple):
    """A mean difference of two systems as a fraction, its 95 % interval over rows and seeds, its two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    by_seed: list  # the difference of each seed

    @property
    def seeds(self):
        """How many seeds the interval counts; 1: it is of the rows alone, no star and no verdict."""
        return max(1, len(self.by_seed))


def intervals(differences, groups, resamples=10_000):
    """Differences (S, N, L) of paired seeds, groups (N,) of rows drawn together -> [an Interval for each column]."""
    seeds = len(differences)
    by_seed = differences.mean(1)  # (S, L)
    draws = resampled_means(differences.mean(0), groups, resamples)  # (resamples, L)
    if seeds > 1:
        t = np.random.default_rng(1).standard_t(seeds - 1, size=draws.shape)
        draws = draws + t * by_seed.std(0, ddof=1) / math.sqrt(seeds)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    # a mean that is 0 but for rounding counts on both sides
    tails = [(1 + (sign * draws <= 1e-12).sum(0)) / (resamples + 1) for sign in (1, -1)]
    p = np.minimum(1, 2 * np.minimum(*tails))
    columns = zip(
        by_seed.mean(0).tolist(), low.tolist(), high.tolist(), p.tolist(), by_seed.T.tolist()
    )
    return [Interval(*column) for column in columns]


def verdict(interval, p, way):
    """supported, not supported or undecided, from an Interval of A - B, its corrected p and what is claimed."""
    if way == "no gain" and interval.high < MARGIN:
        return "supported"
    if p >= 0.05:
        return "undecided"
    better = interval.difference > 0
    return "supported" if better == (way == "better") else "not supported"


def holm(p_values):
    """Holm's (1979) step-down correction of several p-values: (L,) -> (L,), each at least as large as before."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty_like(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected[order] = np.minimum(1, stepped)
    return corrected


def mcnemar(right_a, right_b):
    """McNemar's (1947) exact test of two single runs, from the rows where just one is right: two-sided p-value.

    right_a, right_b: (N,) bool. Rows count as independent here, which clusters are not: information, not the verdict.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n)


def parallel(sets):
    """Whether the languages of {language: Rows} have the same classes row by row, as translations have."""
    first, *others = sets.values()
    return all(rows.labels == first.labels for rows in others)


def difference(right, baseline, sets, sources, resamples, paired=False):
    """A system against another on the same rows: {language: difference, interval, p-values}.

    right, baseline: lists of each run's {language: (N,) bool}, `paired` when they are of the same seeds in the same
    order: then `by_seed` is the difference of each seed. sets: {language: Rows}. Where rows are parallel, `others` is
    the mean over the languages that are not in `sources`, and resamples are of the same rows in every language. The
    Holm correction is over the languages, not over it.
    """
    shared = [
        language
        for language in sets
        if any(language in run for run in right) and any(language in run for run in baseline)
    ]
    together = shared and parallel({language: sets[language] for language in shared})

    def mean(runs, language):
        return np.mean([run[language] for run in runs if language in run], axis=0)

    def by_row(right, baseline):
        columns = {
            language: mean(right, language) - mean(baseline, language) for language in shared
        }
        others = [columns[language] for language in shared if language not in sources]
        return columns | (
            {"others": np.mean(others, axis=0)} if together and len(others) > 1 else {}
        )

    columns = by_row(right, baseline)
    groups = [list(columns)] if together else [[language] for language in shared]
    rows = {}
    for group in groups:
        clusters = premise_clusters(
            sets[next((source for source in sources if source in group), group[0])]
        )
        found = bootstrap_difference(
            np.stack([columns[name] for name in group], axis=1), clusters, resamples
        )
        rows |= {
            name: dict(zip(("difference", "low", "high", "p"), map(float, values)))
            for name, values in zip(group, zip(*found))
        }
    for a, b in zip(right, baseline) if paired else ():
        for name, values in by_row([a], [b]).items():
            rows[name].setdefault("by_seed", []).append(float(values.mean()))
    for language, p in zip(shared, holm([rows[language]["p"] for language in shared])):
        rows[language]["p_holm"] = float(p)
        if len(right) == len(baseline) == 1:
            rows[language]["p_mcnemar"] = mcnemar(right[0][language], baseline[0][language])
    return rows
