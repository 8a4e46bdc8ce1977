"""bench.py: what it counts, and that it runs; what it measures is for a quiet machine. Needs requirements-bench.txt."""
import json

import numpy as np
import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

pytest.importorskip("sentence_transformers", reason="requirements-bench.txt is not installed")
pytest.importorskip("accelerate", reason="requirements-bench.txt is not installed")
import bench


def test_operations_are_those_that_torch_counts():
    config = BertConfig(hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=52, vocab_size=50)
    model = BertModel._from_config(config, attn_implementation="eager")
    model.pooler = None
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(4, 11, dtype=torch.long))
    assert bench.operations(config, np.full(4, 11)) == counter.get_total_flops()


def test_it_runs_and_writes_every_part(tmp_path, script, monkeypatch):
    monkeypatch.setattr(bench.product_rate, "__defaults__", (128, 2))  # small products
    data = tmp_path / "data"
    data.mkdir()
    (data / "labels.txt").write_text("entailment\nneutral\ncontradiction\n")
    rows = [f"my money {'please ' * (i % 7)}\torder now\t{['entailment', 'neutral', 'contradiction'][i % 3]}\n" for i in range(40)]
    (data / "train.en.tsv").write_text("text_a\ttext_b\tlabel\n" + "".join(rows))
    model = make_model(tmp_path / "model", blocks=8, max_position_embeddings=130)
    status, out, error = script("bench", "--model", model, "--data", data, "--out", tmp_path / "out", "--rows", 33, "--batch-size", 8,
                                "--search-rows", 60, "--token-rows", 100, "--repeats", 1, "--precision", "fp32")
    assert status == 0, error
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert {row["goal"] for row in found["rows"]} == {"9", "3.5", "0.65", "20", "1", "6", "1.25", "0.5", "1.6", ""}
    assert all(row["ratio"] > 0 for row in found["rows"]) and out.count("(goal") == len(found["rows"])
    assert sum("--freeze-cache" in row["work"] for row in found["rows"]) == 2
