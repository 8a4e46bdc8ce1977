"""Intervals over rows and seeds for differences that were kept with the rows' interval alone.

    python -m experiments.widen experiments/results/e5-xnli/results.json

Files made before lib/significance.py counted seeds hold, for each difference, its 95 % interval
over the test rows and its value for each seed. The rows' part is taken as normal with that
interval's width; to each draw a draw of Student's t with S - 1 degrees of freedom times the seeds'
standard deviation over sqrt(S) is added.
"""

import json
import sys

import numpy as np

DRAWS = 1_000_000


def widen(entry):
    """(low, high), two-sided p over rows and seeds, of {"difference", "low", "high", "by_seed"}."""
    random = np.random.default_rng(0)
    seeds = np.array(entry["by_seed"])
    rows = random.normal(0, (entry["high"] - entry["low"]) / 3.92, DRAWS)
    spread = random.standard_t(len(seeds) - 1, DRAWS) * seeds.std(ddof=1) / len(seeds) ** 0.5
    draws = entry["difference"] + rows + spread
    p = 2 * min((draws > 0).mean(), (draws < 0).mean())
    return np.percentile(draws, [2.5, 97.5]), p


def entries(value, path=()):
    """All differences with several seeds in nested JSON: (path, entry)."""
    if isinstance(value, list):
        for item in value:
            name = item["name"] if "name" in item else f"{item['a']} - {item['b']}"
            yield from entries(item, (*path, name))
        return
    if len(value.get("by_seed", ())) > 1:
        yield path, value
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from entries(inner, (*path, key))


def main():
    for file in sys.argv[1:]:
        with open(file, encoding="utf-8") as opened:
            results = json.load(opened)
        for path, entry in entries(results.get("conclusions") or results["systems"]):
            (low, high), p = widen(entry)
            seeds = " ".join(f"{100 * value:+.1f}" for value in entry["by_seed"])
            print(
                f"{'/'.join(path)}: {100 * entry['difference']:+.1f} "
                f"[{100 * low:+.1f}, {100 * high:+.1f}], p {p:.3f}, seeds {seeds}"
            )


if __name__ == "__main__":
    main()
