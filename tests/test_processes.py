"""Two processes of torchrun (gloo, CPU) against one: the same features, results and losses."""

import csv
import importlib
import json
import os
import re
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, STILL, make_data, make_model
from safetensors.torch import load_file
from test_messages import Child

import train

DRIVER = """
import json, os, shlex, signal, sys
sys.path.insert(0, {root!r})
import extract, grid_search, train
from lib import messages
train.LOG_STEPS = 4
rank = int(os.environ["RANK"])
rate, forward = train.learning_rate, train.Classifier.forward

def sent(number, step, group):
    left = [step]
    def learning_rate(*arguments):
        left[0] -= 1
        if left[0] == 0 and (group or rank == 1):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return rate(*arguments)
    return learning_rate

def stop(step, who, *arguments):
    # the last process, or (group) each, gets a SIGTERM during a step, twice
    train.learning_rate = sent(signal.SIGTERM, int(step), who == "group")
    assert train.main(arguments) == 143
    train.learning_rate = rate

def kill(step, *arguments):
    train.learning_rate = sent(signal.SIGKILL, int(step), False)
    train.main(arguments)

def note(path, *arguments):
    # the logits of each step in training
    seen = []
    def noted(model, batch):
        logits = forward(model, batch)
        if model.training:
            seen.append(logits.tolist())
        return logits
    train.Classifier.forward = noted
    train.main(arguments)
    train.Classifier.forward = forward
    with open(path + "." + str(rank), "w") as file:
        json.dump(seen, file)

COMMANDS = dict(extract=extract.main, grid_search=grid_search.main, train=train.main)
COMMANDS |= dict(stop=stop, kill=kill, note=note)
def main():
    for line in open(sys.argv[1]):
        name, *arguments = shlex.split(line)
        print("$", line.strip(), flush=True)
        if name in ("stop", "kill", "note"):
            COMMANDS[name](*arguments)
        else:
            COMMANDS[name](arguments)
messages.cli(main)
"""


def commands(model, data, same, out):
    """What one process and two do; what two do beside, until they are killed; what goes on then."""
    source = f"--model {model} --data {data} --max-length 32 --precision fp32"
    tuned = f"{source} --dropout 0 --batch-size 13 --lr 1e-3"
    frozen = "--layers 2 4 --freeze-layers 0 3 --freeze-epoch 1 --epochs 2 --eval-steps 2"
    pooler = f"{tuned} --head pooler --epochs 2 --accumulate 3"
    search = "--layers 1 3 5 --poolings max cls --seeds 3 --epochs 2 --precision fp32 --lr 1e-3"
    alike = f"--model {model} --data {same} --max-length 32 --layers 2 --batch-size 2 --epochs 1"
    alike += " --lr 1e-9 --precision fp32"
    shared = f"""extract {source} --out {out}/features --dtype float32 --batch-size 9
grid_search --features {out}/features --out {out}/grid {search}
train {tuned} --out {out}/wf {frozen}
train {pooler} --out {out}/pooler
"""
    until_killed = f"""stop 8 group {tuned} --out {out}/wf-stopped {frozen}
train {tuned} --out {out}/wf-stopped {frozen}
stop 3 one {pooler} --out {out}/pooler-stopped
train {pooler} --out {out}/pooler-stopped
note {out}/still {alike} --out {out}/alike-still --dropout 0
note {out}/drawn {alike} --out {out}/alike-drawn --dropout 0.5
kill 9 {pooler} --out {out}/pooler-killed --save-steps 2
"""
    return shared, until_killed, f"{pooler} --out {out}/pooler-killed --save-steps 2"


def torchrun(lines, folder):
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    (folder / "commands").write_text(lines)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launch, str(folder / "driver.py"), str(folder / "commands")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def two_forks(flags):
    """train.py in two processes that find each other as torchrun's do; what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def main(rank):
        os.environ.update(shared, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        return train.main(flags.split())

    processes = [Child(partial(main, rank)) for rank in (0, 1)]
    for process in processes:
        status, error = process.wait()
        assert status == 0, error
    return "".join(process.stdout.read() for process in processes)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders that one process and two made from the same commands, and what two printed."""
    folder = tmp_path_factory.mktemp("processes")
    model = make_model(folder / "model", **STILL)
    # the last batch of an epoch has one row: one process has none
    data = make_data(folder / "data", train=66, dev=5, test=5)
    same = make_data(folder / "same", dev=3)
    (folder / "same/train.en.tsv").write_text("text\tlabel\n" + "my late money\trefund\n" * 8)
    shared, *_ = commands(model, data, same, folder / "one")
    for line in shared.splitlines():
        name, *arguments = line.split()
        importlib.import_module(name).main(arguments)
    (folder / "two").mkdir()
    shared, until_killed, after = commands(model, data, same, folder / "two")
    done = torchrun(shared + until_killed, folder / "two")
    assert done.returncode != 0 and "$ kill" in done.stdout, done.stderr[-3000:]
    return folder / "one", folder / "two", done.stdout + two_forks(after)


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["examples_per_second"]
    return rows


def test_features_are_the_same(both):
    one, two = both[0] / "features", both[1] / "features"
    names = sorted(path.name for path in one.glob("*.npy"))
    assert names == sorted(path.name for path in two.glob("*.npy")) and len(names) == 7 * 4
    for name in names:
        np.testing.assert_allclose(np.load(one / name), np.load(two / name), atol=1e-5)
    assert not list(two.rglob(".*.tmp"))
    assert json.loads((two / "manifest.json").read_text())["complete"]


def test_the_search_gives_the_same_results(both):
    rows = []
    for out in both[:2]:
        with open(out / "grid/results.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    assert rows[0] == rows[1] and len(rows[0]) == 7 * 2 * 3


@pytest.mark.parametrize("name", ["wf", "pooler"])
def test_training_gives_the_same_losses_and_weights(both, name):
    one, two = (rows_of(out / name) for out in both[:2])
    assert len({row["step"] for row in one}) == {"wf": 6, "pooler": 2}[name]
    assert one[-1]["frozen_layers"] == {"wf": [0, 3], "pooler": []}[name]
    for a, b in zip(one, two, strict=True):
        assert a.pop("loss") == pytest.approx(b.pop("loss"), abs=2e-5)
        assert a == b
    for epoch in ("2", "mean"):
        files = [out / name / "epochs" / epoch / "model.safetensors" for out in both[:2]]
        one, two = map(load_file, files)
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", ["wf-stopped", "pooler-stopped", "pooler-killed"])
def test_stopped_and_started_again_is_as_never_stopped(both, name):
    """By one SIGTERM and a second at its heels, in one process or in each; by SIGKILL in one."""
    runs = both[1] / name.partition("-")[0], both[1] / name
    whole, stopped = map(rows_of, runs)
    assert whole == stopped and whole[-1]["step"] == 12
    for epoch in ("2", "mean"):
        one, two = (load_file(run / "epochs" / epoch / "model.safetensors") for run in runs)
        assert all(np.array_equal(one[key], two[key]) for key in one)


def test_processes_draw_different_dropout_for_the_same_row(both):
    first, second = (json.loads((both[1] / f"still.{rank}").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 4  # the processes have the same rows and weights
    first, second = (json.loads((both[1] / f"drawn.{rank}").read_text()) for rank in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_only_one_process_speaks_and_all_stop_at_the_next_sum(both):
    text = both[2]
    assert text.count("2 processes on cpu, float32 products (as asked)") == 10
    assert text.count(": done; best epoch") == 7
    # anywhere in a line: two processes write to one pipe
    assert re.findall(r"stopped by SIGTERM after step (\d+)", text) == ["8", "4"]
    assert text.count("the same command, without --overwrite, goes on") == 2
    assert re.findall(r"going on after step (\d+)", text) == ["8", "4", "8"]


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(both, script):
    command = json.loads((both[1] / "pooler/run.json").read_text())["command"]
    status, _, error = script("train", *command.split("train.py ")[1].split())
    assert status == 2 and "settings: processes was 2, is now 1. Give" in error
