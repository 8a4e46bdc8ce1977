"""Two processes of torchrun (gloo, CPU) against one: the same features, results and losses."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_data, make_model
from safetensors.torch import load_file

DRIVER = """
import os, shlex, signal, sys
sys.path.insert(0, {root!r})
import extract, grid_search, train
from lib import messages
train.LOG_STEPS = 1
def main():
    for line in open(sys.argv[1]):
        name, *arguments = shlex.split(line)
        print("$", line.strip(), flush=True)
        if name == "stop":  # train.py until a process, the last or (group) each, gets a SIGTERM during a step, twice
            rate, left, group = train.learning_rate, [int(arguments.pop(0))], arguments.pop(0) == "group"
            def stopped(*a):
                left[0] -= 1
                last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
                if left[0] == 0 and (group or last):
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)
                return rate(*a)
            train.learning_rate = stopped
            assert train.main(arguments) == 143
            train.learning_rate = rate
            continue
        {{"extract": extract, "grid_search": grid_search, "train": train}}[name].main(arguments)
messages.cli(main)
"""


def commands(model, data, out):
    source = f"--model {model} --data {data} --max-length 32 --precision fp32"
    tuned = f"{source} --dropout 0 --batch-size 13 --lr 1e-3"
    frozen = "--layers 2 4 --freeze-layers 0 3 --freeze-epoch 1 --epochs 3 --eval-steps 1"
    pooler = "--head pooler --epochs 2 --accumulate 3"
    search = "--layers 1 3 5 --poolings max cls --seeds 3 --epochs 2 --precision fp32 --lr 1e-3"
    return f"""extract {source} --out {out}/features --dtype float32 --batch-size 9
grid_search --features {out}/features --out {out}/grid {search}
train {tuned} --out {out}/wf {frozen}
stop 14 group {tuned} --out {out}/wf-stopped {frozen}
train {tuned} --out {out}/wf-stopped {frozen}
train {tuned} --out {out}/pooler {pooler}
stop 9 one {tuned} --out {out}/pooler-stopped {pooler}
stop 1 one {tuned} --out {out}/pooler-stopped {pooler}
train {tuned} --out {out}/pooler-stopped {pooler}
"""


def torchrun(lines, folder, processes):
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    (folder / "commands").write_text(lines)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    return subprocess.run(
        [sys.executable, *launch, str(folder / "driver.py"), str(folder / "commands")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders that one process and two made from the same commands, and what two printed."""
    folder = tmp_path_factory.mktemp("processes")
    model = make_model(folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = make_data(
        folder / "data", train=66
    )  # the last batch of an epoch has one row: one process has none
    made = {}
    for processes in (1, 2):
        made[processes] = folder / str(processes)
        made[processes].mkdir()
        result = torchrun(commands(model, data, made[processes]), made[processes], processes)
        assert result.returncode == 0, result.stderr[-3000:]
    return made[1], made[2], result.stdout, model, data


def test_features_are_the_same(both):
    one, two = both[0] / "features", both[1] / "features"
    names = sorted(path.name for path in one.glob("*.npy"))
    assert names == sorted(path.name for path in two.glob("*.npy")) and len(names) == 7 * 4
    for name in names:
        np.testing.assert_allclose(np.load(one / name), np.load(two / name), atol=1e-5)
    assert (
        not list(two.rglob(".*.tmp"))
        and json.loads((two / "manifest.json").read_text())["complete"]
    )


def test_the_search_gives_the_same_results(both):
    rows = []
    for out in both[:2]:
        with open(out / "grid/results.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    assert rows[0] == rows[1] and len(rows[0]) == 7 * 2 * 3


@pytest.mark.parametrize("name", ["wf", "pooler"])
def test_training_gives_the_same_losses_and_weights(both, name):
    metrics = [
        [json.loads(line) for line in open(out / name / "metrics.jsonl")] for out in both[:2]
    ]
    assert len(metrics[0]) == len(metrics[1])
    for a, b in zip(*metrics):
        assert {k: v for k, v in a.items() if k not in ("loss", "examples_per_second")} == {
            k: v for k, v in b.items() if k not in ("loss", "examples_per_second")
        }
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
    if name == "wf":
        assert len({row["step"] for row in metrics[0]}) == 18 and metrics[0][-1][
            "frozen_layers"
        ] == [0, 3]
    last = max(path.name for path in (both[0] / name / "epochs").iterdir() if path.name != "mean")
    for epoch in (last, "mean"):
        one, two = (
            load_file(out / name / "epochs" / epoch / "model.safetensors") for out in both[:2]
        )
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name, steps", [("wf", 18), ("pooler", 12)])
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_by_a_signal_and_started_again_is_as_never_stopped(both, processes, name, steps):
    """By one SIGTERM and a second at its heels, in one process or in each."""
    runs = [both[processes - 1] / name, both[processes - 1] / f"{name}-stopped"]
    whole, stopped = (
        [
            {k: v for k, v in json.loads(line).items() if k != "examples_per_second"}
            for line in open(run / "metrics.jsonl")
        ]
        for run in runs
    )
    assert whole == stopped and whole[-1]["step"] == steps
    for epoch in (steps // 6, "mean"):
        one, two = (load_file(run / f"epochs/{epoch}/model.safetensors") for run in runs)
        assert all(np.array_equal(one[key], two[key]) for key in one)


def test_only_one_process_speaks(both):
    text = both[2]
    assert (
        text.count("2 processes on cpu, float32 products (as asked)") == 7
        and text.count(": done") == 5
    )
    assert "stopped by SIGTERM after step 9" in text and "going on after step 10" in text
    assert (
        text.count("stopped by")
        == 3
        == text.count("to go on:\ntorchrun --nproc-per-node 2 train.py")
    )


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(both):
    one, two, _, model, data = both
    lines = [line for line in commands(model, data, two).splitlines() if line.startswith("train")][
        :1
    ]
    result = torchrun("\n".join(lines), two, 1)
    assert (
        result.returncode == 2
        and "processes was 2, is now 1" in result.stderr
        and "Traceback" not in result.stderr
    )
