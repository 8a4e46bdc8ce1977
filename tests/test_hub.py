"""A model by its hub name, as a user comes: scripts in processes of their own against a hub on the
loopback (hub.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, Hub

import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hub(model_folder):
    with Hub(
        {
            "acme/tiny": model_folder,
            "acme/broken": model_folder,
            "acme/empty": ROOT / "experiments",
        },
        gated=["acme/gated"],
        breaking=["acme/broken"],
    ) as served:
        yield served


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(hub, cache):
    """run("train.py", flag, ...) in a process of its own: (exit status, stdout, stderr)."""

    def call(script, *flags, **environment):
        start = ["-m", script] if script.startswith("experiments.") else [script]
        done = subprocess.run(
            [sys.executable, *start, *map(str, flags)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | hub.environment(cache) | {"OMP_NUM_THREADS": "1"} | environment,
        )
        return done.returncode, done.stdout, done.stderr

    return call


CALLS = """
import importlib, shlex, sys
from lib.messages import cli
for line in sys.argv[1:]:
    name, *sys.argv[1:] = shlex.split(line)
    sys.argv[0] = name
    try:
        cli(importlib.import_module(name.removesuffix(".py")).main)
    except SystemExit as stop:
        assert not stop.code, line
"""
TINY = "--layers 2 4 --max-length 32 --epochs 1 --lr 1e-3"


def test_train_by_name_is_train_by_folder_bit_for_bit_and_again_offline(
    run, hub, data_folder, model_folder, tmp_path
):
    command = f"train.py --model acme/tiny --data {data_folder} --out {tmp_path}"
    status, out, err = run("-c", CALLS, f"{command}/name {TINY}", f"{command}/name {TINY}")
    assert status == 0, err
    assert "model.safetensors: 100%" in err  # a download shows its progress
    assert "complete already" in out  # the same command again
    assert json.loads((tmp_path / "name/run.json").read_text())["revision"] == COMMIT
    downloads = []
    for method, path, _ in hub.asked:
        assert path.startswith(("acme/tiny/resolve/", "api/models/acme/tiny"))
        if method == "GET" and path.endswith(".safetensors"):
            downloads.append(path)
    assert len(downloads) == 1

    command = command.removeprefix("train.py ").replace("acme/tiny", model_folder)
    assert not train.main(f"{command}/folder {TINY}".split())
    for name in ("model.safetensors", "classifier.safetensors"):
        by_name, by_folder = (tmp_path / made / "epochs/1" / name for made in ("name", "folder"))
        assert by_name.read_bytes() == by_folder.read_bytes()

    command = f"train.py --model acme/tiny --data {data_folder} --out {tmp_path}/offline {TINY}"
    environment = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    status, out, err = run("-c", CALLS, command, **environment)
    assert status == 0 and "safetensors" not in err, err
    assert json.loads((tmp_path / "offline/run.json").read_text())["revision"] == COMMIT


def test_extract_check_and_claims_by_name(run, data_folder, tmp_path):
    given = f"--model acme/tiny --data {data_folder} --max-length 32 --out {tmp_path}"
    status, out, err = run(
        "-c",
        CALLS,
        f"extract.py {given}/features",
        f"data.py check {data_folder} --model acme/tiny",
        f"experiments.claims {given}/claims --seeds 1 --epochs 1 --layers 2 4 --freeze-layers 3 "
        "--freeze-epoch 0 --max-train-rows 16 --max-eval-rows 4",
    )
    assert status == 0, err
    assert json.loads((tmp_path / "features/manifest.json").read_text())["revision"] == COMMIT
    assert "tokens" in out and (tmp_path / "claims/claims.md").exists()


def test_a_cache_that_another_program_filled_serves_offline(
    run, cache, model_folder, data_folder, tmp_path
):
    """As AutoModel or a copy leaves it: nothing says which files the model does not have."""
    snapshot = tmp_path / "hf/hub/models--acme--copied/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(COMMIT)
    for path in Path(model_folder).iterdir():
        (snapshot / path.name).symlink_to(path)
    status, _, err = run(
        "extract.py",
        "--model",
        "acme/copied",
        "--data",
        data_folder,
        "--out",
        tmp_path / "features",
        "--max-length",
        32,
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="1",
    )
    assert status == 0, err


ABSENT = {
    "acme/none": "neither a folder here nor a model of the hub",
    "acme/gated": "gated: accept its terms",
    "acme/broken": "the download broke off",
    "acme/empty": "it lacks config.json or safetensors",
    "acme//tiny": "no name that a model of the hub can have",
}
TRY = """
import sys, extract
from lib.messages import cli
for name in sys.argv[1].split(","):
    try:
        cli(lambda: extract.main(["--model", name, "--data", sys.argv[2], "--out", sys.argv[3]]))
    except SystemExit as stop:
        print("status", stop.code, file=sys.stderr)
"""


@pytest.mark.parametrize("offline", [False, True])
def test_what_cannot_be_had_is_one_sentence(run, data_folder, tmp_path, offline):
    expected = {"acme/unseen": "not in the hub's cache"} if offline else ABSENT
    out, environment = tmp_path / "out", {"HF_HUB_OFFLINE": str(int(offline))}
    status, _, err = run("-c", TRY, ",".join(expected), data_folder, out, **environment)
    assert status == 0 and "Traceback" not in err and not out.exists()
    said = [line for line in err.splitlines() if line.startswith(("-c: error: ", "status"))]
    for (name, words), sentence, code in zip(expected.items(), said[::2], said[1::2], strict=True):
        assert name in sentence and words in sentence and code == "status 2"
