"""A model by its hub name, as a user comes: scripts in processes of their own against a hub on the
loopback (hub.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, Hub

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


TRAIN = ("--layers", 2, 4, "--max-length", 32, "--epochs", 1, "--lr", 1e-3)


def test_train_by_name_is_train_by_folder_bit_for_bit_and_again_offline(
    run, hub, data_folder, model_folder, tmp_path
):
    status, out, err = run(
        "train.py",
        "--model",
        "acme/tiny",
        "--data",
        data_folder,
        "--out",
        tmp_path / "name",
        *TRAIN,
    )
    assert status == 0, err
    assert "model.safetensors: 100%" in err  # a download shows its progress
    assert json.loads((tmp_path / "name/run.json").read_text())["revision"] == COMMIT
    assert all(
        path.startswith(("acme/tiny/resolve/", "api/models/acme/tiny")) for _, path, _ in hub.asked
    )
    downloads = [
        path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")
    ]
    assert len(downloads) == 1

    assert (
        run(
            "train.py",
            "--model",
            model_folder,
            "--data",
            data_folder,
            "--out",
            tmp_path / "folder",
            *TRAIN,
        )[0]
        == 0
    )
    for name in ("model.safetensors", "classifier.safetensors"):
        assert (tmp_path / "name/epochs/1" / name).read_bytes() == (
            tmp_path / "folder/epochs/1" / name
        ).read_bytes()

    status, out, _ = run(
        "train.py",
        "--model",
        "acme/tiny",
        "--data",
        data_folder,
        "--out",
        tmp_path / "name",
        *TRAIN,
    )
    assert status == 0 and "complete already" in out
    status, out, err = run(
        "train.py",
        "--model",
        "acme/tiny",
        "--data",
        data_folder,
        "--out",
        tmp_path / "offline",
        *TRAIN,
        HF_HUB_OFFLINE="1",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert status == 0 and "safetensors" not in err, err
    assert json.loads((tmp_path / "offline/run.json").read_text())["revision"] == COMMIT


def test_extract_check_and_claims_by_name(run, data_folder, tmp_path):
    status, out, err = run(
        "extract.py",
        "--model",
        "acme/tiny",
        "--data",
        data_folder,
        "--out",
        tmp_path / "features",
        "--max-length",
        32,
    )
    assert status == 0, err
    assert json.loads((tmp_path / "features/manifest.json").read_text())["revision"] == COMMIT
    status, out, _ = run("data.py", "check", data_folder, "--model", "acme/tiny")
    assert status == 0 and "tokens" in out
    status, out, err = run(
        "experiments.claims",
        "--model",
        "acme/tiny",
        "--data",
        data_folder,
        "--out",
        tmp_path / "claims",
        "--seeds",
        1,
        "--epochs",
        1,
        "--layers",
        2,
        4,
        "--freeze-layers",
        3,
        "--freeze-epoch",
        0,
        "--max-train-rows",
        16,
        "--max-eval-rows",
        4,
        "--max-length",
        32,
    )
    assert status == 0 and (tmp_path / "claims/claims.md").exists(), err


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
