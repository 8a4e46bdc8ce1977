"""bench.py: what it counts, and that it runs; what it measures is for a quiet machine.

Needs requirements-bench.txt.
"""

import json
import time

import numpy as np
import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

pytest.importorskip("sentence_transformers", reason="requirements-bench.txt is not installed")
pytest.importorskip("accelerate", reason="requirements-bench.txt is not installed")
import train
from data import Rows
from experiments import bench


def test_operations_are_those_that_torch_counts():
    config = BertConfig(
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=52,
        vocab_size=50,
    )
    model = BertModel._from_config(config, attn_implementation="eager")
    model.pooler = None
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(4, 11, dtype=torch.long))
    assert bench.operations(config, np.full(4, 11)) == counter.get_total_flops()


def test_training_is_timed_by_its_steps_alone(model_folder, monkeypatch):
    """Five steps an epoch, each 20 ms longer; an evaluation a second longer does not count."""
    score_sets, rate = train.score_sets, train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *args: time.sleep(0.02) or rate(*args))
    monkeypatch.setattr(train, "score_sets", lambda *args: time.sleep(1) or score_sets(*args))
    texts = ["my money"] * 33, ["order now"] * 33
    rows = Rows(*texts, [i % 3 for i in range(33)])
    job = bench.Job("toy", model_folder, rows, 8, "fp32", repeats=1)
    flags = "--head pooler --freeze-layers 0 --freeze-epoch 1 --max-length 32"
    seconds, memory = bench.our_training(job, 3, *flags.split())
    assert len(seconds) == 3 and 5 * 0.02 < min(seconds) < 1 and memory > 0


def test_it_runs_and_writes_every_part(tmp_path, script, monkeypatch):
    monkeypatch.setattr(bench.product_rate, "__defaults__", (128, 2))  # small products
    data = tmp_path / "data"
    data.mkdir()
    labels = ["entailment", "neutral", "contradiction"]
    (data / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    rows = [f"my money {'please ' * (i % 7)}\torder now\t{labels[i % 3]}\n" for i in range(40)]
    (data / "train.en.tsv").write_text("text_a\ttext_b\tlabel\n" + "".join(rows))
    model = make_model(tmp_path / "model", blocks=8, max_position_embeddings=130)
    flags = "--rows 33 --batch-size 8 --search-rows 60 --token-rows 100 --repeats 1"
    flags = (*flags.split(), "--precision", "fp32", "--out", tmp_path / "out")
    status, out, error = script("experiments.bench", "--model", model, "--data", data, *flags)
    assert status == 0, error
    rows = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    goals = {"9", "3.5", "0.65", "20", "1", "6", "1.25", "0.5", "1.6", ""}
    assert {row["goal"] for row in rows} == goals
    assert all(row["ratio"] > 0 for row in rows) and out.count("(goal") == len(rows)
    frozen = [row["work"] for row in rows if "frozen" in row["work"]]
    both = ["embeddings and lowest 4 frozen", "embeddings and lowest 4 frozen, MC-BERT"]
    assert frozen == both
