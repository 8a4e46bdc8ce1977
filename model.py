"""The model: a multilingual encoder cut at a layer, pooling, the classifier, freezing; loading, saving, predicting.

Read by the scripts, run by none. Paper: section 1.4 and Figure 4.

Letters in comments:  B batch  T tokens  D hidden size  L layers  N rows  M models  S seeds  C classes
Layers are numbered alike everywhere: 0 is the embedding output, k is the output of block k, counted from 1, so that
`hidden_states[k]` of transformers is layer k. A mask's 1 is a token, its 0 is padding.
"""
import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from data import collate, sorted_batches
from device import Dropout, autocast, start_processes, to_device
from files import UserError, first_line, read_json, sha256, write_json

POOLINGS = ("max", "mean", "cls")


# --- the encoder, its blocks, and freezing -----------------------------------------------------------------------

def inner_encoder(encoder):
    """The part of an encoder that runs its blocks one after the other: the list of them is its `layer`."""
    inner = getattr(encoder, "encoder", None) or getattr(encoder, "transformer", None)
    if not isinstance(getattr(inner, "layer", None), nn.ModuleList):
        raise UserError(f"{type(encoder).__name__} is not an encoder whose blocks are known here (as BERT, XLM-R, "
                        "DistilBERT, DeBERTa)")
    return inner


def blocks(encoder):
    """The encoder's nn.ModuleList of transformer blocks; layer k is block k - 1 of it."""
    return inner_encoder(encoder).layer


def layer_module(encoder, layer):
    """The module whose output is `layer`: the embeddings (0) or block `layer`, counted from 1."""
    return encoder.embeddings if layer == 0 else blocks(encoder)[layer - 1]


def check_layers(layers, count, flag):
    """UserError unless `layers` are different numbers from 0 to `count`."""
    wrong = [layer for layer in layers if not 0 <= layer <= count]
    if wrong:
        raise UserError(f"{flag} {wrong[0]}: the model has layers 0 (embeddings) to {count}")
    if len(set(layers)) < len(layers):
        raise UserError(f"{flag} {' '.join(map(str, layers))}: a layer is named twice")


def cut_after(encoder, layer):
    """Drop the blocks above `layer`: nothing that reads layers up to it can see the difference."""
    if layer == 0 and encoder.config.model_type.startswith("deberta"):  # transformers' DeBERTa needs a block to run
        raise UserError(f"layer 0: {type(encoder).__name__} gives no states without a block; "
                        "name a layer from 1 on as well")
    del blocks(encoder)[layer:]
    encoder.config.num_hidden_layers = layer  # DistilBERT's n_layers is an alias of it


def layer_parameters(encoder, layers):
    """The parameters of these layers; those above the cut have none."""
    return [parameter for layer in layers if layer <= len(blocks(encoder))
            for parameter in layer_module(encoder, layer).parameters()]


def freeze_layers(encoder, layers):
    """Stop training exactly these layers (paper section 1.6): requires_grad off and the gradient gone.

    Dropout in them stays on, as in the paper. Returns the parameters frozen now.
    """
    frozen = [parameter for parameter in layer_parameters(encoder, layers) if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad, parameter.grad = False, None
    return frozen


def keep_tokens(encoder, ids, pad_id):
    """Keep only the rows of the word embeddings that the token `ids` use, and those up to [PAD], whose number stays.

    Exact: the others get no gradient, yet Adam, clipping and the gradient itself would go over all of them at every
    step. save_model() puts the rows back. Returns the new id of each old one, (V,) int32. UserError for an id too high.
    """
    whole = encoder.get_input_embeddings()
    if max(ids) >= whole.num_embeddings:
        raise UserError(f"the tokenizer gives token {max(ids)}, the encoder knows {whole.num_embeddings:,}")
    used = np.zeros(whole.num_embeddings, dtype=bool)
    used[ids] = True
    used[:max(pad_id, whole.padding_idx or 0) + 1] = True
    encoder.kept_rows, encoder.whole_table = torch.from_numpy(np.flatnonzero(used)), whole.weight.detach().cpu()
    small = nn.Embedding.from_pretrained(encoder.whole_table[encoder.kept_rows], freeze=False,
                                         padding_idx=whole.padding_idx)
    encoder.set_input_embeddings(small.to(whole.weight.device))
    return (np.cumsum(used) - 1).astype(np.int32)


def whole_state(encoder, decay=1.0):
    """The encoder's state_dict with all rows of the word embeddings; those left out by keep_tokens() times `decay`."""
    state = encoder.state_dict()
    if hasattr(encoder, "whole_table"):
        table = encoder.get_input_embeddings().weight
        name = next(name for name, parameter in encoder.named_parameters() if parameter is table)
        state[name] = (encoder.whole_table * decay).index_copy(0, encoder.kept_rows, table.detach().cpu())
    return state


class Given(nn.Module):
    """In the place of the embeddings: gives states that are known already."""

    def __init__(self, states):
        super().__init__()
        self.states = states

    def forward(self, *_, **__):
        return self.states


@contextlib.contextmanager
def part_of(encoder, low, high=None, states=None):
    """Inside, the encoder has only the blocks after layer `low`, up to `high`; where `states` (B, T, D) of layer `low`
    are given it begins with them."""
    inner, embeddings = inner_encoder(encoder), encoder.embeddings
    whole, inner.layer = inner.layer, inner.layer[low:high]
    encoder.embeddings = embeddings if states is None else Given(states)
    try:
        yield
    finally:
        inner.layer, encoder.embeddings = whole, embeddings


def hidden_states(encoder, batch):
    """All layers' states of a batch, embeddings first: a tuple of (B, T, D); and transformers' own output.

    Where the batch brings `states`, (B, T, D) of layer `encoder.given`, what is below is not run, its states are None.
    """
    if "states" in batch:
        low, batch = encoder.given, dict(batch)
        with part_of(encoder, low, states=batch.pop("states").float()):
            states, output = hidden_states(encoder, batch)
        return (None,) * low + states, output
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if getattr(encoder.config, "type_vocab_size", 0) > 1:  # XLM-R has one type, DistilBERT takes none
        inputs["token_type_ids"] = batch["token_type_ids"]
    output = encoder(**inputs, output_hidden_states=True)
    return output.hidden_states or (output.last_hidden_state,), output  # no blocks: the embeddings alone


# --- pooling and the classifier ----------------------------------------------------------------------------------

def pool(states, mask, pooling):
    """Pool a layer's states over the tokens, [CLS] and [SEP] included, in float32: (B, T, D), (B, T) -> (B, D)."""
    if pooling == "cls":
        return states[:, 0].float()
    inside = mask.bool()[:, :, None]                                                    # (B, T, 1)
    if pooling == "max":
        return states.float().masked_fill(~inside, -torch.inf).amax(dim=1)
    return states.float().masked_fill(~inside, 0).sum(dim=1) / inside.sum(dim=1)


class Classifier(nn.Module):
    """An encoder with a classifier on top.

    head "layers": the pooled states of the chosen layers, concatenated -> dropout -> linear (the paper's model);
                   with `hidden` > 0 a ReLU layer of that size and a second dropout stand between (its conclusion 8).
    head "pooler": [CLS] of the last layer -> the pretrained dense + tanh -> dropout -> linear (BERT's own head).
    """

    def __init__(self, encoder, labels, head="layers", layers=(6, 8, 11), pooling="max", dropout=0.1, hidden=0):
        super().__init__()
        self.encoder, self.labels, self.head = encoder, list(labels), head
        self.layers, self.pooling, self.dropout, self.hidden = list(layers), pooling, dropout, hidden
        size = encoder.config.hidden_size
        if head == "pooler":
            self.layers, self.pooling, features = [len(blocks(encoder))], "cls", size
            self.dense = None if getattr(encoder, "pooler", None) is not None else nn.Linear(size, size)
        else:
            features = size * len(self.layers)
        parts = [nn.Dropout(dropout)]
        if hidden:
            parts += [nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(*parts, nn.Linear(hidden or features, len(self.labels)))
        for module in self.modules():
            if type(module) is nn.Dropout:
                module.__class__ = Dropout

    def forward(self, batch):
        """input_ids, attention_mask, token_type_ids (B, T) -> logits (B, C)."""
        states, output = hidden_states(self.encoder, batch)
        if self.head == "layers":
            features = torch.cat([pool(states[k], batch["attention_mask"], self.pooling) for k in self.layers], dim=1)
        elif self.dense is None:
            features = output.pooler_output
        else:
            features = torch.tanh(self.dense(states[-1][:, 0]))
        return self.classifier(features)                                                # (B, C)


# --- loading and saving ------------------------------------------------------------------------------------------

def load_tokenizer(name):
    """The model's own fast tokenizer. UserError when there is none, or it cannot be had."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"no tokenizer can be loaded from {str(name)!r}: {first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {str(name)!r} is not a fast one with a padding token")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one up where files are missing
        raise UserError(f"no tokenizer can be loaded from {str(name)!r}: "
                        "it has no vocabulary (tokenizer.json or vocab.txt)")
    return tokenizer


def load_encoder(name):
    """Load an encoder in float32, whatever its file holds.

    Reads safetensors alone and runs no code of the model's. Returns the encoder and whether it has a pretrained
    pooler. UserError when it cannot be had, or lacks weights.
    """
    try:
        encoder, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:
        raise UserError(f"no encoder can be loaded from {str(name)!r}: {first_line(error)}") from None
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise UserError(f"{str(name)!r} lacks weights of {type(encoder).__name__}: {(missing or ['wrong shapes'])[0]}")
    pretrained_pooler = getattr(encoder, "pooler", None) is not None and not info["missing_keys"]
    if not torch.cuda.is_available():
        encoder.set_attn_implementation("cpu")  # device.attention(); DeBERTa, which has its own, stays as it is
    return encoder, pretrained_pooler


def model_identity(encoder, tokenizer, name):
    """What tells a model from another: its name; the hub's commit, or its weight files' SHA-256; the tokenizer's."""
    weights = [sha256(path) for path in sorted(Path(name).glob("*.safetensors"))]
    return {"model": str(name), "revision": " ".join(weights) or encoder.config._commit_hash,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()}


def drop_pooler(encoder):
    """Take the pooler out of an encoder whose pooler nobody reads, so that none is trained, saved or counted."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None


def token_limit(encoder, max_length):
    """UserError when rows of `max_length` tokens do not fit the encoder's positions."""
    config = encoder.config
    roberta = config.model_type in ("roberta", "xlm-roberta", "camembert")
    limit = config.max_position_embeddings - (config.pad_token_id + 1 if roberta else 0)
    if not 3 <= max_length <= limit:
        raise UserError(f"--max-length {max_length}: expected 3 to {limit}, the positions this encoder has")


def save_model(model, tokenizer, folder, decay=1.0):
    """Write a Classifier to a folder, whole or not at all: transformers' own files beside classifier.*.

    `decay` is what weight decay has made of the embedding rows that keep_tokens() left out.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        model.encoder.save_pretrained(beside, state_dict=whole_state(model.encoder, decay))
        tokenizer.save_pretrained(beside)
        own = {key: weight.contiguous() for key, weight in model.state_dict().items() if not key.startswith("encoder.")}
        save_file(own, beside / "classifier.safetensors")
        settings = {key: getattr(model, key) for key in ("head", "layers", "pooling", "dropout", "hidden", "labels")}
        write_json(beside / "classifier.json", settings)
        os.chmod(beside, 0o755)
        old = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # out of the way, and gone once the new one is there
            os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def load_model(folder):
    """Read a folder of save_model(): a Classifier and its tokenizer. UserError when it is broken."""
    settings = read_json(Path(folder) / "classifier.json",
                         {"head": str, "layers": [int], "pooling": str, "hidden": int, "labels": [str]})
    encoder, pretrained_pooler = load_encoder(folder)
    if settings["head"] == "layers":
        drop_pooler(encoder)
    if getattr(encoder, "pooler", None) is not None and not pretrained_pooler:
        raise UserError(f"{folder}: model.safetensors lacks the pooler that the head {settings['head']!r} reads")
    try:
        if settings["head"] not in ("layers", "pooler") or settings["pooling"] not in POOLINGS:
            raise UserError(f"head {settings['head']!r}, pooling {settings['pooling']!r}: unknown")
        check_layers(settings["layers"], len(blocks(encoder)), "layers")
        model = Classifier(encoder, **settings)
        missing, unexpected = model.load_state_dict(load_file(Path(folder) / "classifier.safetensors"), strict=False)
        wrong = unexpected + [key for key in missing if not key.startswith("encoder.")]
    except Exception as error:
        raise UserError(f"{folder}: classifier.json and classifier.safetensors do not fit "
                        f"({first_line(error)})") from None
    if wrong:
        raise UserError(f"{folder}: classifier.safetensors does not fit classifier.json: {wrong[0]}")
    return model, load_tokenizer(folder)


# --- prediction --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def predict(model, encoded, pad_id, dtype, max_length=128, batch_size=64, desc=None):
    """Logits of every row of an Encoded, in the rows' own order: (N, C) float32 NumPy. Leaves the model in eval mode.

    The processes of torchrun share the batches out; each returns all rows.
    """
    model.eval()
    device = next(model.parameters()).device
    logits = torch.zeros(len(encoded.labels), len(model.labels), device=device)
    rank, world = start_processes()
    batches = sorted_batches(encoded.lengths, batch_size)[rank::world]
    with autocast(device, dtype):  # around the loop: the weights are cast once
        for rows in tqdm(batches, desc=desc, leave=False, disable=None if desc else True):
            batch = to_device({**collate(encoded, rows, pad_id, max_length), "rows": rows}, device)
            logits[batch["rows"]] = model(batch).float()
    if world > 1:
        dist.all_reduce(logits)
    return logits.cpu().numpy()
