"""The demo's own commands, as the Makefile has them, on the shipped sample; and the README's."""

import ast
import contextlib
import csv
import importlib
import io
import json
import re
import shlex
import subprocess

from conftest import ROOT

SHORTER = {  # so that the suite stays within its time; `make demo` runs them as they are
    "grid_search.py": "--epochs 5 --lr 1e-3",
    "train.py": "--max-train-rows 800 --max-eval-rows 60",
    "evaluate.py": "--resamples 1000 --max-rows 120",
}


def demo_commands(out):
    """What `make demo` would run, without the environment: lists of words, the first a script's name."""
    lines = subprocess.run(
        ["make", "-n", "demo", f"DEMO={out}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [
        shlex.split(line.split("python ", 1)[1])
        for line in lines.splitlines()
        if re.search(r"bin/python \w+\.py", line)
    ]
    assert [command[0] for command in commands] == [
        "extract.py",
        "grid_search.py",
        "train.py",
        "train.py",
        "train.py",
        "evaluate.py",
        "plot.py",
        "plot.py",
        "plot.py",
        "plot.py",
    ]
    return commands


def test_the_demo(tmp_path, monkeypatch):
    """One test, so that one process of pytest-xdist runs it."""
    out, printed = tmp_path, []
    monkeypatch.chdir(ROOT)
    for script, *arguments in demo_commands(out):
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            arguments += shlex.split(SHORTER.get(script, ""))
            assert not importlib.import_module(script.removesuffix(".py")).main(arguments)
        printed.append(screen.getvalue())

    # the search trains every model, and some transfer
    with open(out / "grid/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 255 * 3 * 5 and "3,825 models" in printed[1]
    best = json.loads((out / "grid/best.json").read_bytes())
    chosen = best["pooling"], "+".join(map(str, best["layers"])), best["lr"]
    mine = [row for row in rows if (row["pooling"], row["layers"], float(row["lr"])) == chosen]
    assert len(mine) == 5

    def mean(language):
        return sum(float(row[f"test_{language}"]) for row in mine) / 5

    assert (
        mean("en") > 0.7 and sum(map(mean, "de es fr zh ar ur".split())) / 6 > 0.25 + 0.1
    )  # four balanced classes

    # the three systems stand in one table
    results = json.loads((out / "results/results.json").read_bytes())
    assert [system["name"] for system in results["systems"]] == [
        "baseline",
        "mc-bert",
        "mc-bert-wf",
    ]
    chance = 1 / len(json.loads((out / "runs/mc-bert/run.json").read_bytes())["labels"])
    for system in results["systems"]:
        others = [accuracy for language, accuracy in system["mean"].items() if language != "en"]
        assert system["mean"]["en"] > 0.6 and len(others) == 6
        assert sum(others) / 6 > chance + 0.05
    assert "mc-bert-wf" in printed[5] and "others" in printed[5]

    # layers were frozen after two epochs, and every figure is there
    rows = [json.loads(line) for line in open(out / "runs/mc-bert-wf/metrics.jsonl")]
    assert all(row["frozen_layers"] == ([] if row["epoch"] <= 2 else [9, 11, 12]) for row in rows)
    names = "search-ranking search-layers search-single search-worth confusion training-dev differences".split()
    assert {path.name for path in (out / "figures").iterdir()} == {f"{name}.png" for name in names}


def test_the_readmes_commands_have_flags_that_exist(tmp_path):
    """Every command line of the README parses: the scripts' own parsers read it."""
    best = tmp_path / "best.json"
    best.write_text('{"layers": [6, 8], "pooling": "max"}')
    text = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .replace("\\\n", " ")
        .replace("grid/mine/best.json", str(best))
    )
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [
        line.split("#")[0].replace("$M", "some-model")
        for block in blocks
        for line in block.splitlines()
        if line.startswith("python ")
    ]
    assert len(lines) >= 12
    for line in lines:
        script, *arguments = shlex.split(line)[1:]
        importlib.import_module(script.removesuffix(".py")).parse_args(arguments)


def test_the_readmes_own_folder_is_one(tmp_path, monkeypatch, script):
    """The data set that step 1 writes by hand is read as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(("mkdir -p data/mine", "printf ")) and "data/mine" in line
    ]
    subprocess.run("\n".join(lines), shell=True, check=True, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, _ = script("data", "check", "data/mine")
    assert status == 0 and "train.en" in out and "dev.de" in out


def test_who_imports_whom():
    """common <- cpu, data, model <- the scripts <- plot, experiments; nothing else, and nothing inside a function."""
    allowed = {"common": set(), "cpu": set(), "data": {"common"}, "model": {"common"}}
    below = {"common", "cpu", "data", "model"}
    allowed |= dict.fromkeys(("extract", "grid_search", "train", "evaluate"), below)
    allowed["plot"] = below | {"grid_search", "evaluate"}
    for name, may in allowed.items():
        if not (ROOT / f"{name}.py").is_file():  # cpu.py can be deleted
            continue
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert imported & set(allowed) <= may, name
