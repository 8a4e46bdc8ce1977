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
    """(low, high) over rows and seeds, of {"difference", "low", "high", "by_seed"}."""
    random = np.random.default_rng(0)
    seeds = np.array(entry["by_seed"])
    rows = random.normal(0, (entry["high"] - entry["low"]) / 3.92, DRAWS)
    spread = random.standard_t(len(seeds) - 1, DRAWS) * seeds.std(ddof=1) / len(seeds) ** 0.5
    return np.percentile(entry["difference"] + rows + spread, [2.5, 97.5])


def entries(value, path=()):
    """All differences with several seeds in nested JSON: (path, entry)."""
    if isinstance(value, list):
        value = {item.get("name", item.get("a", i)): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return
    if len(value.get("by_seed", ())) > 1:
        yield path, value
    for key, inner in value.items():
        if isinstance(inner, (dict, list)) and key != "by_seed":
            yield from entries(inner, (*path, str(key)))


def main():
    for file in sys.argv[1:]:
        with open(file, encoding="utf-8") as opened:
            results = json.load(opened)
        for path, entry in entries(results.get("systems") or results["conclusions"]):
            low, high = widen(entry)
            seeds = " ".join(f"{100 * value:+.1f}" for value in entry["by_seed"])
            print(
                f"{'/'.join(path)}: {100 * entry['difference']:+.1f} "
                f"[{100 * low:+.1f}, {100 * high:+.1f}], seeds {seeds}"
            )


if __name__ == "__main__":
    main()
