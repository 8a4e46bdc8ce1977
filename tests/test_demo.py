"""The demo's own commands, as the Makefile has them, on the shipped sample; who imports whom."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from lib.scores import columns_of, read_grid

SHORTER = {  # so that the suite stays within its time; `make demo` runs them as they are
    "grid_search.py": "--epochs 3 --lr 1e-3 --seeds 2",
    "train.py": "--max-train-rows 160 --max-eval-rows 5 --epochs 3 --batch-size 16 --lr 1e-3",
    "evaluate.py": "--max-rows 28",
}


def demo_commands(out):
    """What `make demo` would run: lists of words, the first a script's name."""
    command = ["make", "-n", "demo", f"DEMO={out}"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"bin/python (\w+\.py .*)", text)
    return [shlex.split(line) for line in lines]


def write_fewer(source, out, every):
    """Write every so many rows of a data set in three languages, alike in each. Returns the
    folder."""
    out.mkdir()
    for path in source.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if path.suffix == ".tsv":
            if path.stem[-2:] not in ("en", "de", "zh"):
                continue
            lines = lines[:1] + lines[1::every]
        (out / path.name).write_text("".join(lines), encoding="utf-8")
    return str(out)


def test_the_demo(tmp_path, monkeypatch):
    """One test, so that one process of pytest-xdist runs it."""
    out, printed = tmp_path, {}
    monkeypatch.chdir(ROOT)
    fewer = {}
    for name, every in (("intents", 12), ("intents14", 1)):
        fewer[f"sample/{name}"] = write_fewer(ROOT / "sample" / name, out / name, every)
    for script, *arguments in demo_commands(out):
        arguments = [fewer.get(word, word) for word in arguments]
        arguments += shlex.split(SHORTER.get(script, ""))
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            assert not importlib.import_module(script.removesuffix(".py")).main(arguments)
        printed[script] = screen.getvalue()
    scripts = ["extract.py", "grid_search.py", "train.py", "evaluate.py", "plot.py"]
    assert list(printed) == scripts

    # the search trains every model, and the chosen one transfers
    results, best = read_grid(out / "grid")
    assert len(results.keys) == 255 * 3 and "1,530 models" in printed["grid_search.py"]
    place = results.keys.index((best["pooling"], tuple(best["layers"]), best["lr"]))
    chosen, others = results.micro[place], columns_of(results.columns, "en")["test"]
    english = chosen[:, results.columns.index("test_en")]
    assert len(others) == 2 and english.mean() > 0.5  # four classes
    assert chosen[:, others].mean() > 0.25 + 0.1

    # the three systems stand in one table
    results = json.loads((out / "results/results.json").read_bytes())
    names = [system["name"] for system in results["systems"]]
    assert names == ["baseline", "mc-bert", "mc-bert-wf"]
    for system in results["systems"]:
        english = system["mean"].pop("en")
        assert english > 0.25 and len(system["mean"]) == 2
        assert sum(system["mean"].values()) / 2 > 1 / 14 + 0.05  # fourteen classes
    assert "mc-bert-wf" in printed["evaluate.py"]

    # layers were frozen after two epochs, and every kind of figure is there
    for line in (out / "runs/mc-bert-wf/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["frozen_layers"] == ([] if row["epoch"] <= 2 else [9, 11, 12])
    kinds = {path.stem.partition("-")[0] for path in (out / "figures").glob("*.png")}
    assert kinds == {"search", "confusion", "training", "differences"}


LIBRARY = [  # each imports those before it alone, and not those of its own floor
    {"messages"},
    {"devices", "folders"},
    {"hub"},
    {"encoders", "archives", "scores"},
    {"significance"},
    {"tables", "run_log", "cpu"},
]
SCRIPTS = {"extract", "grid_search", "train", "evaluate", "plot"}
HOUSE = [{f"lib.{name}" for name in floor} for floor in LIBRARY] + [{"data", "model"}, SCRIPTS]


def imports(tree):
    """(node, module) of each import, lib.NAME for a room of lib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            yield from ((node, f"lib.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, node.module


@pytest.mark.parametrize("floor", range(len(HOUSE)))
def test_who_imports_whom(floor):
    """DESIGN, section 3: downwards only, and nothing inside a function to hide a circle."""
    rooms, below = set().union(*HOUSE) | {"experiments"}, set().union(*HOUSE[:floor])
    for name in sorted(HOUSE[floor]):
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name == "lib.cpu" and not path.exists():
            continue  # it can be deleted
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, module in imports(tree):
            if module.partition(".")[0] in ("lib", "experiments") or module in rooms:
                assert module in below, f"{name} imports {module}"
                assert node in tree.body, f"{name} imports {module} inside a function"


def test_every_room_of_the_house_is_in_the_drawing():
    rooms = {path.stem for path in ROOT.glob("*.py")}
    rooms |= {f"lib.{path.stem}" for path in (ROOT / "lib").glob("*.py")}
    assert rooms - {"lib.__init__"} == set().union(*HOUSE)
