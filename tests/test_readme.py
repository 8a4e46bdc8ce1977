"""The README's own command blocks, run as they stand: models come by name from a hub on the
loopback (hub.py), where sample/model stands under every name; archives of the sample's own rows are
in the place of the published ones; and each command gets flags that make it small. What the README
says is what is tested."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

from conftest import ROOT
from hub import Hub
from test_messages import Child

# every name that the README uses
NAMES = "bert-base-multilingual-uncased intfloat/multilingual-e5-small".split()
SMALL = {
    "data.py": "",
    "data.py xnli": "--archives archives --languages en de",
    "data.py massive": "--archives archives",
    "extract.py": "",
    "grid_search.py": "--layers 6 8 11 --seeds 2 --epochs 2",
    "evaluate.py": "",
    "plot.py": "",
    "train.py": "--max-train-rows 24 --max-eval-rows 6 --epochs 3",
}
SKIPPED = "make "  # tested elsewhere


def rows(name, count):
    """The first rows of one of the sample's files, cells joined by tabs."""
    return (ROOT / f"sample/{name}.tsv").read_text(encoding="utf-8").splitlines()[1 : count + 1]


def write_archives(folder):
    """XNLI's two archives and MASSIVE's, with a few of the sample's rows."""
    folder.mkdir()
    languages = ["en", "de"]
    with zipfile.ZipFile(folder / "XNLI-1.0.zip", "w") as archive:
        for split in ("dev", "test"):
            lines = ["language\tsentence1\tsentence2\tgold_label\tgroup"]
            for language in languages:
                lines += [f"{language}\t{row}" for row in rows(f"nli/{split}.{language}", 8)]
            archive.writestr(f"XNLI-1.0/xnli.{split}.tsv", "\n".join(lines))
    with zipfile.ZipFile(folder / "XNLI-MT-1.0.zip", "w") as archive:
        lines = ["premise\thypo\tlabel\tgroup", *rows("nli/train.en", 30)]
        for language in languages:  # the same rows: nobody looks at what they say
            name = f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv"
            archive.writestr(name, "\n".join(lines))
    with tarfile.open(folder / "amazon-massive-dataset-1.0.tar.gz", "w:gz") as archive:
        for locale in "en-US de-DE es-ES fr-FR zh-CN".split():
            lines = []
            for split in ("train", "dev", "test"):
                language = "en" if split == "train" else locale[:2]
                for row in rows(f"intents/{split}.{language}", 40):
                    text, intent, *_ = row.split("\t")
                    lines.append(json.dumps({"partition": split, "intent": intent, "utt": text}))
            content = "\n".join(lines).encode()
            info = tarfile.TarInfo(f"1.0/data/{locale}.jsonl")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def commands():
    """The lines of all blocks, in their order, each python command with its small flags."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```\n", text, re.M | re.S)
    for line in "".join(block for language, block in blocks if not language).splitlines():
        line = line.partition("  #")[0].strip()
        if not line or line.startswith(SKIPPED):
            continue
        words = line.split()
        if words[0] == "python":
            small = SMALL.get(" ".join(words[1:3]), SMALL.get(words[1]))
            assert small is not None, f"a command that this test does not know: {line}"
            line = f"{line} {small}"
        yield line
    yield from (block for language, block in blocks if language == "python")


# What runs them: each as `python SCRIPT ...` would, but in one process, for starting takes longest
DRIVER = """
import importlib, json, os, shlex, sys
from lib.messages import cli
for line in json.load(sys.stdin):
    print("+", line, flush=True)
    if line.startswith("M="):
        os.environ["M"] = line[2:]
    elif line.startswith("python "):
        script, *flags = shlex.split(os.path.expandvars(line))[1:]
        sys.argv = [script, *flags]
        try:
            cli(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as stop:
            assert not stop.code, line
    else:
        exec(line)
"""


def test_every_command_of_the_readme_runs(tmp_path):
    place = tmp_path / "clone"
    # without what the README's commands have made here already
    ignored = ".git .venv tests __pycache__ .*cache".split()
    ignored += "data features grid runs results figures demo claims bench".split()
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*ignored))
    write_archives(place / "archives")
    lines = [line.replace("M=sample/model", f"M={NAMES[1]}") for line in commands()]
    with Hub(dict.fromkeys(NAMES, ROOT / "sample/model")) as hub:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps(lines),
            cwd=place,
            capture_output=True,
            text=True,
            env=os.environ | hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for name in NAMES:
        assert any(path == f"{name}/resolve/main/config.json" for _, path in hub.asked)
    labelled = (place / "labelled.csv").read_text(encoding="utf-8-sig").splitlines()
    assert labelled[0].startswith("id,body,queue,prediction,p_")


def apply(block, folder):
    """Apply a block of the README: runs of lines with - (and context) give way to those with +."""
    title, *lines = block.splitlines()
    path = folder / title.removeprefix("# ").partition(":")[0]
    text = path.read_text(encoding="utf-8")
    hunks = [[]]
    for line in lines:
        if hunks[-1] and hunks[-1][-1][0] == "+" and line[0] != "+":
            hunks.append([])
        hunks[-1].append(line)
    for hunk in hunks:
        old = "".join(line[1:] + "\n" for line in hunk if line[0] in "- ")
        new = "".join(line[1:] + "\n" for line in hunk if line[0] in "+ ")
        assert text.count(old) == 1, (path, old)
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def test_the_readmes_changes_apply_and_run(tmp_path, model_folder, data_folder):
    place = tmp_path / "fork"
    ignored = ".git .venv tests sample experiments __pycache__".split()
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*ignored))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```diff\n(.*?)^```\n", text, re.M | re.S)
    assert len(blocks) == 6
    for block in blocks:
        apply(block, place)
    rows = [{"text": f"money {i}", "label": "ab"[i % 2]} for i in range(20)]
    (place / "rows.json").write_text(json.dumps(rows))
    given = f"--model {model_folder} --data {data_folder} --max-length 32 --out "
    lines = [
        "data own --out own --train en=rows.json --text text --label label",
        f"extract {given} f",
        "grid_search --features f --out g --layers 3 5 --poolings min cls --seeds 1 --epochs 2",
        f"train {given} r --layers 3 4 --pooling min --epochs 3 --max-train-rows 20 "
        "--freeze-layers 1 2 --freeze-epoch 1",
    ]

    def main():
        os.chdir(place)
        sys.path.insert(0, str(place))
        rooms = ("data", "model", "lib", "extract", "grid_search", "train")
        for name in list(sys.modules):
            if name.partition(".")[0] in rooms:  # those of the fork take their place
                del sys.modules[name]
        for line in lines:
            name, *flags = line.split()
            module = importlib.import_module(name)
            assert module.__file__ == f"{place}/{name}.py" and not module.main(flags)

    status, error = Child(main).wait()
    assert status == 0, error
    frozen = {}
    for line in (place / "r/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        frozen[row["epoch"]] = row["frozen_layers"]
    assert frozen == {1: [], 2: [1], 3: [1, 2]}
