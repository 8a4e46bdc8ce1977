"""experiments/widen.py against the two limits that have a closed form."""

import numpy as np
import pytest

from experiments.widen import entries, widen


def test_where_the_seeds_decide_it_is_students_interval_and_where_the_rows_do_the_rows_own():
    seeds = [0.02, 0.05, 0.11]
    entry = {"difference": 0.06, "low": 0.06 - 1e-9, "high": 0.06 + 1e-9, "by_seed": seeds}
    half = 4.3027 * np.std(seeds, ddof=1) / 3**0.5  # t(0.975) of 2 degrees of freedom
    (low, high), p = widen(entry)
    assert [low, high] == pytest.approx([0.06 - half, 0.06 + half], rel=0.02) and 0.1 < p < 0.2
    entry = {"difference": 0.06, "low": 0.01, "high": 0.11, "by_seed": [0.06, 0.06, 0.06]}
    assert widen(entry)[0] == pytest.approx([0.01, 0.11], abs=5e-4)


def test_entries_with_one_seed_are_left_out_and_lists_are_named():
    several, single = {"by_seed": [0.1, 0.2]}, {"by_seed": [0.1]}
    named = entries([{"a": "x", "b": "y", "others": several, "en": single}])
    assert list(named) == [(("x - y", "others"), several)]
