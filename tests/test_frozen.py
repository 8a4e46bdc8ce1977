"""--freeze-cache: steps that begin above the frozen lowest layers, against steps that run them."""
import numpy as np
import pytest
import torch
from conftest import STILL, make_model, make_tokenizer
from test_train import assert_same_run, fine_tune, interrupted, metrics, watching, weights
from transformers import AutoModel, DebertaV2Config, DebertaV2Model

import train
from frozen import FrozenStates
from model import hidden_states

CACHED = "--layers 3 5 --freeze-layers 0 1 2 --freeze-epoch 1 --freeze-cache"


@pytest.mark.parametrize("family, still", [("bert", STILL), ("xlm-roberta", STILL),
                                           ("distilbert", dict(dropout=0.0, attention_dropout=0.0))])
@pytest.mark.parametrize("flags, layer", [
    ("--layers 3 5 --freeze-layers 0 1 2 4 --freeze-epoch 1", 2), ("--layers 2 4 --freeze-layers 3 2 1 0 --freeze-epoch 0", 2),
    ("--layers 0 3 --freeze-layers 0 1 --freeze-epoch 2", 0), ("--head pooler --freeze-layers 0 1 2 3 4 5 --freeze-epoch 1", 5)])
def test_without_dropout_it_is_the_same_run(flags, layer, family, still, data_folder, tmp_path):
    model, first = make_model(tmp_path / "model", family, **still), []
    fine_tune(tmp_path / "plain", model, data_folder, flags, "--dropout 0 --accumulate 2 --eval-steps 3")
    with watching(lambda model, optimizer, batches: first.append(("states" in batches[0], getattr(model.encoder, "given", None)))):
        fine_tune(tmp_path / "kept", model, data_folder, flags, "--dropout 0 --accumulate 2 --eval-steps 3 --freeze-cache")
    frozen = 5 * int(flags[-1])
    assert first == [(False, None)] * frozen + [(True, layer)] * (15 - frozen)
    rows, others = metrics(tmp_path / "plain"), metrics(tmp_path / "kept")
    for row, other in zip(rows, others, strict=True):
        assert row.pop("loss") == pytest.approx(other.pop("loss"), abs=1e-4) and row == other
    one, two = (weights(tmp_path / name / "epochs/3") for name in ("plain", "kept"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_states_are_those_of_the_layer_and_what_is_below_does_not_run(dropout, model_folder, data_folder, tmp_path):
    """Without dropout they are what the layer gives; with it they are the same in each epoch, and other ones by --seed."""
    run, seen = [], []

    def look(model, optimizer, batches):
        assert model.training and all(module.training for module in model.modules())
        batch = batches[0]
        if "states" in batch:
            model.eval()
            with torch.no_grad():
                plain = model.encoder(**{key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")},
                                      output_hidden_states=True).hidden_states[2]
            model.train()
            mask = batch["attention_mask"].bool()
            close = np.isclose(batch["states"][mask], plain[mask], atol=1e-5)
            assert close.mean() < 0.1 if dropout else close.all()
            assert not batch["states"][~mask].any() and batch["states"].dtype == torch.float32
            if not seen:  # from the next step on, note which blocks run in training
                for i, block in enumerate(model.encoder.encoder.layer):
                    block.register_forward_hook(lambda block, *_, i=i: run.append(i) if block.training else None)
            seen.append({tuple(ids[keep].tolist()): states[keep] for ids, keep, states in
                         zip(batch["input_ids"], mask, batch["states"])})

    with watching(look):
        for seed in (0, 1):
            fine_tune(tmp_path / str(seed), model_folder, data_folder, CACHED.replace("epoch 1", "epoch 0"), f"--seed {seed}",
                      "" if dropout else "--encoder-dropout 0")
    assert len(seen) == 30 and run == [2, 3, 4] * 14
    epochs = [{text: states for step in seen[start:start + 5] for text, states in step.items()} for start in (0, 5, 15)]
    assert len(epochs[0]) > 50
    for text in epochs[0]:
        assert torch.equal(epochs[0][text], epochs[1][text])
        assert torch.equal(epochs[0][text], epochs[2][text]) != dropout


@pytest.mark.parametrize("head, losses", [("", 3), ("--encoder-dropout 0", 1)])
def test_dropout_stays_on_above(head, losses, model_folder, data_folder, tmp_path):
    """With next to no learning rate the train losses of three epochs differ by dropout alone."""
    fine_tune(tmp_path / "run", model_folder, data_folder, CACHED.replace("epoch 1", "epoch 0"), "--lr 1e-12 --dropout 0", head)
    assert len({round(row["loss"], 5) for row in metrics(tmp_path / "run") if row["split"] == "train"}) == losses


@pytest.mark.parametrize("stops", [[4], [5], [6], [11], [6, 3, 2]])
@pytest.mark.parametrize("when", ["1", "auto --eval-steps 2"])
def test_stopped_and_started_again_is_as_never_stopped(when, stops, unstopped, model_folder, data_folder, tmp_path):
    flags = f"{CACHED.replace('epoch 1', f'epoch {when}')} --save-steps 2"
    for steps in stops:
        with interrupted(train, "train_step", steps):
            fine_tune(tmp_path / "run", model_folder, data_folder, flags)
    fine_tune(tmp_path / "run", model_folder, data_folder, flags)
    assert_same_run(tmp_path / "run", unstopped(flags))
    assert any(0 < row["epoch"] < 3 and row["frozen_layers"] for row in metrics(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run/resume").iterdir()] == ["state.pt"]


@pytest.fixture(scope="module")
def unstopped(model_folder, data_folder, tmp_path_factory):
    outs = {}

    def get(flags):
        if flags not in outs:
            outs[flags] = tmp_path_factory.mktemp("unstopped") / "run"
            fine_tune(outs[flags], model_folder, data_folder, flags)
        return outs[flags]
    return get


@pytest.mark.parametrize("precision, kind, tolerance", [("fp32", np.float32, 2e-6), ("bf16", np.float16, 2e-3)])
def test_the_file_holds_half_precision_where_the_products_have_it(precision, kind, tolerance, still_model, data_folder, tmp_path):
    made, found = FrozenStates.__init__, []

    def watched(self, model, encoded, frozen, path, pad_id, dtype, *rest):
        made(self, model, encoded, frozen, path, pad_id, dtype, *rest)
        assert self.kept.shape == (len(encoded.ids), 36) and self.kept.dtype == kind and not path.exists()
        found.append(self)

    def look(model, optimizer, batches):
        if found:
            batch = {key: value for key, value in batches[0].items() if key != "states"}
            mask = batch["attention_mask"].bool()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                plain = hidden_states(model.encoder, batch)[0][2]
                below = hidden_states(model.encoder, batches[0])[0]
            assert plain.dtype == torch.float32 and below[:2] == (None, None) and below[2].dtype == torch.float32
            np.testing.assert_allclose(below[2][mask], plain[mask], atol=tolerance, rtol=tolerance)

    with pytest.MonkeyPatch.context() as patch, watching(look):
        patch.setattr(FrozenStates, "__init__", watched)
        fine_tune(tmp_path / "run", still_model, data_folder, CACHED, "--precision", precision)
    assert len(found) == 1


@pytest.mark.parametrize("kernel, name", [(0, "encoder.rel_embeddings.weight"), (3, "encoder.rel_embeddings.weight")])
def test_an_encoder_with_weights_outside_its_layers_is_refused(kernel, name, script, data_folder, tmp_path):
    """DeBERTa's blocks share relative positions, which go on training."""
    size = make_tokenizer(tmp_path / "deberta")
    DebertaV2Model(DebertaV2Config(vocab_size=size, hidden_size=36, num_hidden_layers=5, num_attention_heads=3, intermediate_size=52,
                                   max_position_embeddings=64, relative_attention=True, position_biased_input=False,
                                   pos_att_type=["p2c", "c2p"], conv_kernel_size=kernel)).save_pretrained(tmp_path / "deberta")
    status, _, error = script("train", "--model", tmp_path / "deberta", "--data", data_folder, "--out", tmp_path / "run",
                              *CACHED.replace("epoch 1", "epoch 0").split(), "--max-length", 32)
    assert status == 2 and f"--freeze-cache: DebertaV2Model has weights outside its layers ({name})" in error and "Traceback" not in error


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(script, model_folder, data_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.posix_fallocate", full)
    status, _, error = script("train", "--model", model_folder, "--data", data_folder, "--out", tmp_path / "run", *CACHED.split(),
                              "--max-length", 32, "--epochs", 2)
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert not (tmp_path / "run/resume/.frozen.tmp").exists()


def test_a_state_that_float16_cannot_hold_is_refused(script, data_folder, tmp_path):
    folder = make_model(tmp_path / "model")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight *= 1e5
    model.save_pretrained(folder)
    status, _, error = script("train", "--model", folder, "--data", data_folder, "--out", tmp_path / "run",
                              *CACHED.replace("epoch 1", "epoch 0").split(), "--max-length", 32, "--precision", "bf16")
    assert status == 2 and "a state of layer 2 does not fit float16; try --precision fp32" in error and "Traceback" not in error


def test_several_machines_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    status, _, error = script("train", "--model", "none", "--data", "none", "--out", tmp_path / "run", *CACHED.split())
    assert status == 2 and "it goes on one machine only" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    "--freeze-layers 1 2 --freeze-epoch 1", "", "--random-freeze 2 --freeze-epoch 1",
    "--freeze-layers 0 1 --freeze-epoch 1 --freeze-lr 0.1", "--freeze-layers 0 1 --freeze-epoch 1 --compile default"])
def test_flags_it_does_not_go_with(flags, script, tmp_path):
    status, _, error = script("train", "--model", "none", "--data", "none", "--out", tmp_path / "run", "--freeze-cache", *flags.split())
    assert status == 2 and "--freeze-cache needs 0 among --freeze-layers, and goes with neither --freeze-lr nor --compile" in error
    assert not (tmp_path / "run").exists()
