"""Intervals against exact enumeration, SciPy's t, and simulations in which the truth is known."""

import itertools

import numpy as np
import pytest
from scipy import stats

from lib import significance
from lib.significance import Interval, compare, holm, intervals, verdict


def few_resamples(monkeypatch, count):
    monkeypatch.setattr(significance, "RESAMPLES", count)


# --- the rows ------------------------------------------------------------------------------------


def test_the_bootstrap_draws_from_the_exact_distribution_of_a_small_case(monkeypatch):
    few_resamples(monkeypatch, 40_000)
    differences = np.array([[1.0, 0.0], [1.0, -1.0], [0.0, 1.0], [-1.0, 0.5], [1.0, 0.0]])
    groups = np.array([0, 0, 1, 2, 2])
    members = [np.flatnonzero(groups == group) for group in range(3)]
    exact = []
    for draw in itertools.product(range(3), repeat=3):  # all 27 resamples
        exact.append(differences[np.concatenate([members[group] for group in draw])].mean(0))
    exact = np.array(exact)
    low, high = np.percentile(exact, [2.5, 97.5], axis=0, method="inverted_cdf")
    tails = np.minimum((exact <= 1e-12).mean(0), (exact >= -1e-12).mean(0))
    for i, interval in enumerate(intervals(differences[None], groups)):
        assert interval.difference == pytest.approx(differences[:, i].mean())
        assert (interval.low, interval.high) == pytest.approx((low[i], high[i]), abs=1e-9)
        assert interval.p == pytest.approx(min(1, 2 * tails[i]), abs=0.01)


def test_systems_that_answer_alike_do_not_differ():
    for seeds in (1, 3):
        for interval in intervals(np.zeros((seeds, 9, 2)), np.arange(9)):
            assert interval == Interval(0, 0, 0, 1, [0] * seeds, seeds)


def leaning(columns):
    """A less B for two systems that are equally good, (1, 360, columns): 120 groups of three rows,
    on which one of them may be strong."""
    random = np.random.default_rng(7)
    lean = np.repeat(0.25 * random.normal(size=(120, columns)), 3, axis=0)
    right = random.random((360, columns)) < 0.6 + lean
    return (right * 1.0 - (random.random((360, columns)) < 0.6 - lean))[None]


def share_outside(found):
    return np.mean([interval.low > 0 or interval.high < 0 for interval in found])


def test_rows_that_lean_together_need_groups(monkeypatch):
    few_resamples(monkeypatch, 1000)
    groups = np.arange(360) // 3
    assert 0.025 <= share_outside(intervals(leaning(800), groups)) <= 0.085
    assert share_outside(intervals(leaning(800), np.arange(360))) > 0.12  # cries wolf


# --- the seeds -----------------------------------------------------------------------------------

SPREADS = (0.1, 0.5, 1, 2, 4)  # of the seeds, in standard errors of the rows; XNLI's: 0.6 / 0.15
TRIALS = 600  # of each: the share of 5 % that miss has a standard error of 0.9 %


def simulate(seeds, shift=0):
    """How often 0 is outside the interval, for each of SPREADS; the true difference is `shift`
    standard errors of its mean."""
    random, rows = np.random.default_rng(0), 100
    spread = np.repeat(SPREADS, TRIALS) / np.sqrt(rows)
    differences = random.normal(size=(rows, len(spread)))
    differences = differences + spread * random.normal(size=(seeds, 1, len(spread)))
    differences += shift * np.sqrt(1 / rows + spread**2 / seeds)
    found = intervals(differences, np.arange(rows))
    return [share_outside(found[i : i + TRIALS]) for i in range(0, len(found), TRIALS)]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_where_nothing_differs_few_intervals_miss_zero(seeds, monkeypatch):
    few_resamples(monkeypatch, 2000)
    missed = simulate(seeds)
    assert np.mean(missed) <= 0.06 and max(missed) <= 0.06 + 2 * 0.009


def test_three_standard_errors_are_found(monkeypatch):
    few_resamples(monkeypatch, 2000)
    assert simulate(2, shift=3)[0] > 0.7  # the rows decide
    assert min(simulate(5, shift=3)) > 0.6


def test_seeds_alone_are_students_t(monkeypatch):
    """The rows agree, so that nothing but the seeds varies."""
    few_resamples(monkeypatch, 200_000)
    a = np.array([0.01, 0.02, 0.06])
    found = intervals(a[:, None, None] * np.ones((1, 7, 1)), np.arange(7))[0]
    error = a.std(ddof=1) / np.sqrt(3)
    expected = stats.t.interval(0.95, 2, loc=0.03, scale=error)
    assert (found.low, found.high) == pytest.approx(expected, rel=0.05)
    assert found.p == pytest.approx(2 * stats.t.sf(0.03 / error, 2), abs=0.01)
    assert (found.difference, found.seeds) == (pytest.approx(0.03), 3)
    assert found.by_seed == pytest.approx(a)


# --- what is made of them ------------------------------------------------------------------------


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1, 1])


@pytest.mark.parametrize(
    "low, high, p, better, no_gain",
    [
        (0.02, 0.03, 0.04, "supported", "not supported"),
        (0.02, 0.03, 0.06, "undecided", "undecided"),  # after Holm's correction
        (0.001, 0.03, 0.04, "supported", "undecided"),  # by less than a point, or by more
        (0.001, 0.009, 0.04, "supported", "supported"),  # better by less than a point
        (-0.02, 0.009, 0.04, "undecided", "supported"),
        (-0.03, -0.01, 0.04, "not supported", "supported"),
        (-0.03, -0.01, 0.06, "undecided", "undecided"),
    ],
)
def test_verdicts(low, high, p, better, no_gain):
    interval = Interval((low + high) / 2, low, high, 0.01, [], 3)
    assert verdict(interval, p, "better") == better
    assert verdict(interval, p, "no gain") == no_gain
    alone = interval._replace(seeds=1)
    assert verdict(alone, p, "better") == verdict(alone, p, "no gain") == "undecided"


# --- systems in several languages ----------------------------------------------------------------

ROWS = 40
GROUPS = {"en": np.arange(ROWS) // 4, "zh": np.arange(ROWS), "de": np.arange(ROWS) // 2}


def system(seeds, draw, languages=("en", "zh", "de")):
    random, answers = np.random.default_rng(draw), {}
    for language in languages:
        answers[language] = {seed: random.random(ROWS) < 0.6 for seed in seeds}
    return answers


def by_hand(a, b, language, seeds):
    return [a[language][seed].astype(float) - b[language][seed] for seed in seeds]


def test_systems_are_compared_seed_by_seed_and_others_is_their_mean():
    a, b = system([1, 0], 1), system([0, 1], 2)
    found = compare(a, b, GROUPS, ["en"], together=True)
    assert list(found) == ["en", "zh", "de", "others"]
    for language in ("en", "zh", "de"):
        expected = [values.mean() for values in by_hand(a, b, language, [0, 1])]
        assert found[language]["by_seed"] == pytest.approx(expected)
        assert found[language]["difference"] == pytest.approx(np.mean(expected))
    assert found["others"]["by_seed"] == pytest.approx(
        np.mean([found["zh"]["by_seed"], found["de"]["by_seed"]], axis=0)
    )
    corrected = holm([found[language]["p"] for language in ("en", "zh", "de")])
    assert [found[l]["p_holm"] for l in ("en", "zh", "de")] == corrected.tolist()
    assert "p_holm" not in found["others"] and found["others"]["seeds"] == 2


def test_only_the_seeds_that_both_have_in_every_language_count():
    a, b = system([0, 1, 2], 1), system([1, 2, 3], 2)
    found = compare(a, b, GROUPS, ["en"], together=True)
    expected = [values.mean() for values in by_hand(a, b, "de", [1, 2])]
    assert found["de"]["by_seed"] == pytest.approx(expected) and found["de"]["seeds"] == 2
    assert compare(a, system([3], 3), GROUPS, ["en"], together=True) == {}


@pytest.mark.parametrize("together, source", [(True, "en"), (True, "de"), (False, "en")])
def test_the_groups_are_the_sources_or_where_rows_are_no_translations_each_languages(
    together, source
):
    a, b = system([0], 1), system([0], 2)
    found = compare(a, b, GROUPS, [source], together)
    assert ("others" in found) == together
    for language in ("en", "zh", "de"):
        rows = np.stack(by_hand(a, b, language, [0]))[:, :, None]
        groups = GROUPS[source if together else language]
        expected = intervals(rows, groups)[0]._asdict()
        for key in ("difference", "low", "high", "p"):
            assert found[language][key] == pytest.approx(expected[key])


def test_translate_train_counts_the_seeds_that_its_languages_share():
    """Each language is of a run of its own, and the source's is none of them."""
    baseline = system([0, 1], 1)
    shared = compare(system([0, 1], 2, ["zh", "de"]), baseline, GROUPS, ["en"], True)
    assert list(shared) == ["zh", "de", "others"] and shared["others"]["seeds"] == 2
    mixed = system([0, 1], 2, ["zh"]) | system([0], 3, ["de"])
    found = compare(mixed, baseline, GROUPS, ["en"], True)
    assert {entry["seeds"] for entry in found.values()} == {1}
    assert found["zh"]["difference"] == pytest.approx(by_hand(mixed, baseline, "zh", [0])[0].mean())
