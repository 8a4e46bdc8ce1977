"""Is one system better than another, or is it luck? Intervals, Holm's correction, verdicts.

Two things vary. The rows of a test set: they are not independent (XNLI has three hypotheses a
premise, and translations of one sentence), so whole groups are resampled (Efron and Tibshirani
1993, section 8). And the seeds of training: to each resample of the S seeds' mean a draw of
Student's t is added, with S - 1 degrees of freedom, times the seeds' standard deviation over
sqrt(S).
"""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.05
MARGIN = 0.01  # "no gain": A is better than B by less than this


class Interval(NamedTuple):
    """A mean difference of two systems, its 95 % interval, and a two-sided p-value; fractions."""

    difference: float
    low: float
    high: float
    p: float
    by_seed: list  # the difference of each seed
    seeds: int  # how many it counts; 1: it is of the rows alone, for no star and no verdict


def intervals(differences, groups):
    """Compare two systems on the same N rows: an Interval for each of L columns.

    differences (S, N, L): for each seed, row and column (a language) how right A is less how right
    B is. groups (N,): the rows with one number are drawn together, the same ones in every column.

    The ends are percentiles of the resamples. p is twice the smaller share of them on either side
    of 0, which inverts the interval.
    """
    random = np.random.default_rng(0)
    seeds = len(differences)
    by_row, by_seed = differences.mean(0), differences.mean(1)  # (N, L), (S, L)
    means = resampled_means(by_row, groups, random)  # (RESAMPLES, L)
    if seeds > 1:
        error = np.sqrt(by_seed.var(0, ddof=1) / seeds)
        means += random.standard_t(seeds - 1, size=means.shape) * error
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    # a mean that is 0 but for rounding counts on both sides
    below = (1 + (means <= 1e-12).sum(0)) / (RESAMPLES + 1)
    above = (1 + (means >= -1e-12).sum(0)) / (RESAMPLES + 1)
    p = np.minimum(1, 2 * np.minimum(below, above))
    numbers = np.stack([by_row.mean(0), low, high, p], axis=1).tolist()  # (L, 4)
    return [Interval(*row, each, seeds) for row, each in zip(numbers, by_seed.T.tolist())]


def resampled_means(values, groups, random):
    """Means of as many groups as there are, drawn with replacement: (N, L) -> (RESAMPLES, L)."""
    count = int(groups.max()) + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, groups, values)
    sizes = np.bincount(groups, minlength=count).astype(float)
    chunk = max(1, min(1000, 10_000_000 // count))  # to bound memory
    means = []
    for start in range(0, RESAMPLES, chunk):
        n = min(chunk, RESAMPLES - start)
        drawn = random.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=n * count).reshape(n, count).astype(float)
        means.append(weights @ sums / (weights @ sizes)[:, None])
    return np.concatenate(means)


def holm(p_values):
    """Holm's (1979) step-down correction of several p-values: (L,) -> (L,), none smaller."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1, stepped)
    return corrected


def verdict(interval, p, way):
    """What an Interval of A - B says of a claim: supported, not supported or undecided.

    way "better": A is better than B. "no gain": A is not better than B by MARGIN. p: the claim's
    after Holm's correction over the claims, of A - B or, for "no gain", of A - B - MARGIN.
    """
    claims_more = way == "better"
    bound = 0 if claims_more else MARGIN
    if interval.seeds > 1 and p < LEVEL:
        if interval.low > bound:
            return "supported" if claims_more else "not supported"
        if interval.high < bound:
            return "not supported" if claims_more else "supported"
    return "undecided"


# --- systems in several languages --------------------------------------------------------------


def parallel(sets):
    """Whether languages' Rows, {language: Rows}, have the same classes, as translations have."""
    first, *others = sets.values()
    return all(rows.labels == first.labels for rows in others)


def compare(system, baseline, groups, sources, together):
    """A system against another on the same rows and seeds: {language: an Interval's fields, and
    p_holm, its p after Holm's correction over the languages}; {} where they share no seed.

    system, baseline: whether it is right, {language: {seed: (N,) bool}}. groups: {language: (N,)}.
    together: the languages' rows are translations, so that resamples are of the same rows in every
    language, of the source's groups; `others`, which is not corrected, is then the mean over the
    languages that are not in `sources`.
    """
    languages = [language for language in groups if language in system and language in baseline]
    drawn_together = [[language] for language in languages]
    if together:
        drawn_together = [languages]
    found = {}
    for names in drawn_together:
        differences = seed_by_seed(system, baseline, names)  # (S, N, L)
        if not len(differences):
            continue
        source = next((language for language in names if language in sources), names[0])
        others = [i for i, language in enumerate(names) if language not in sources]
        if len(others) > 1:
            names = [*names, "others"]
            mean = differences[:, :, others].mean(2, keepdims=True)
            differences = np.concatenate([differences, mean], axis=2)
        for name, interval in zip(names, intervals(differences, groups[source])):
            found[name] = interval._asdict()
    tested = [language for language in languages if language in found]
    for language, p in zip(tested, holm([found[language]["p"] for language in tested])):
        found[language]["p_holm"] = float(p)
    return found


def seed_by_seed(system, baseline, languages):
    """How right a system is less how right another is, for each seed that both have in every
    language: (S, N, L)."""
    seeds = set(system[languages[0]])
    for language in languages:
        seeds &= system[language].keys() & baseline[language].keys()
    differences = []
    for seed in sorted(seeds):
        pairs = [(system[language][seed], baseline[language][seed]) for language in languages]
        differences.append(np.stack([a.astype(float) - b for a, b in pairs], axis=1))  # (N, L)
    return np.array(differences)
