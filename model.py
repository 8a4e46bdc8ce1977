"""The paper's model: pooled hidden states of chosen layers and a classifier over them; freezing;
saving, loading, predicting.

Read by the scripts, run by none. Paper: sections 1.4 and 1.6, Figure 4.

Letters in comments: B batch, T tokens, D hidden size, L layers, N rows, M models, S seeds,
C classes. Layers are numbered alike everywhere: 0 is the embedding output, k is the output of block
k, counted from 1, so that `hidden_states[k]` of transformers is layer k. A mask's 1 is a token, its
0 padding.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file

from lib.devices import autocast, to_device
from lib.encoders import blocks, drop_pooler, hidden_states, load_encoder, whole_state
from lib.folders import hidden_beside, read_json, write_json
from lib.messages import UserError, progress_bar

# --- pooling: a new one is a line here, and all scripts have it -----------------------------------

# (B, T, D) float32 states, (B, T, 1) bool mask of the tokens, [CLS] and [SEP] included, padding on
# the right -> (B, D)
POOLINGS = {
    "max": lambda states, tokens: states.masked_fill(~tokens, -torch.inf).amax(dim=1),
    "mean": lambda states, tokens: states.masked_fill(~tokens, 0).sum(dim=1) / tokens.sum(dim=1),
    "cls": lambda states, tokens: states[:, 0],
}


def pool(states, mask, pooling):
    """Pool one layer's states over the tokens, in float32: (B, T, D), (B, T) -> (B, D)."""
    return POOLINGS[pooling](states.float(), mask.bool()[:, :, None])


# --- the classifier -------------------------------------------------------------------------------


class Settings(NamedTuple):
    """All that a classifier is made of beside its weights, and all that labelling a text needs."""

    labels: list  # C names, in class-index order
    head: str = "layers"  # or "pooler", BERT's own
    layers: list = (6, 8, 11)  # those that are pooled
    pooling: str = "max"  # of POOLINGS
    combine: str = "concat"  # or "mix", a weighted sum
    dropout: float = 0.1  # on the classifier's input
    hidden: int = 0  # units of a hidden layer, 0: none
    pairs: bool = False  # whether it reads pairs of texts
    max_length: int = 128  # tokens
    precision: str = "auto"  # of matrix products


class Classifier(nn.Module):
    """An encoder with a classifier on top.

    head "layers": the pooled states of the chosen layers, concatenated -> dropout -> linear (the
                   paper's model); with `hidden` a ReLU layer of that size and a second dropout
                   stand between (its conclusion 8); with combine "mix" their sum with learned
                   softmax weights in the place of the concatenation.
    head "pooler": [CLS] of the last layer -> dense + tanh -> dropout -> linear (BERT's own head);
                   the dense is the pretrained pooler's, or begins at random where there is none.
    """

    def __init__(self, encoder, settings):
        super().__init__()
        self.encoder = encoder
        size = encoder.config.hidden_size
        features = size
        self.dense = None
        if settings.head == "pooler":  # it reads [CLS] of the last layer: classifier.json says so
            settings = settings._replace(layers=[len(blocks(encoder))], pooling="cls")
            if getattr(encoder, "pooler", None) is None:
                self.dense = nn.Linear(size, size)
        elif settings.combine == "mix":
            self.mix = nn.Parameter(torch.zeros(len(settings.layers)))  # begins as the plain mean
        else:
            features = size * len(settings.layers)
        parts = [nn.Dropout(settings.dropout)]
        if settings.hidden:
            parts += [nn.Linear(features, settings.hidden), nn.ReLU(), nn.Dropout(settings.dropout)]
            features = settings.hidden
        self.classifier = nn.Sequential(*parts, nn.Linear(features, len(settings.labels)))
        self.settings = settings

    def forward(self, batch):
        """input_ids, attention_mask, token_type_ids (B, T) -> logits (B, C)."""
        states, output = hidden_states(self.encoder, batch)
        if self.settings.head == "layers":
            features = self.pooled(states, batch["attention_mask"])
        elif self.dense is None:
            features = output.pooler_output
        else:
            features = torch.tanh(self.dense(states[-1][:, 0]))
        with torch.autocast(features.device.type, enabled=False):  # in float32
            return self.classifier(features.float())  # (B, C)

    def pooled(self, states, mask):
        """The chosen layers, pooled: side by side (B, L * D), or their weighted sum (B, D)."""
        pooled = [pool(states[k], mask, self.settings.pooling) for k in self.settings.layers]
        if self.settings.combine == "concat":
            return torch.cat(pooled, dim=1)
        return (torch.stack(pooled, dim=2) * self.mix.softmax(0)).sum(2)  # (B, D, L) -> (B, D)


# --- freezing -------------------------------------------------------------------------------------


def freeze_layers(encoder, layers, readers):
    """Stop training exactly these layers (paper section 1.6): requires_grad off, the gradient gone.

    readers: of encoders.parameter_layers(), {name: (first, last layer that reads it)}. A parameter
    is frozen when every layer that reads it is. Dropout stays on, as in the paper. Returns the
    parameters frozen now.
    """
    frozen = []
    for name, parameter in encoder.named_parameters():
        if name not in readers or not parameter.requires_grad:
            continue
        first, last = readers[name]
        if all(layer in layers for layer in range(first, last + 1)):
            parameter.requires_grad = False
            parameter.grad = None
            frozen.append(parameter)
    return frozen


# --- saving and loading ---------------------------------------------------------------------------


def save_model(model, tokenizer, folder):
    """Write a Classifier, whole or not at all: transformers' own files beside classifier.*."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = hidden_beside(folder), hidden_beside(folder)  # two random names
    new.mkdir()
    try:
        model.encoder.save_pretrained(new, state_dict=whole_state(model.encoder))
        tokenizer.save_pretrained(new)
        weights = {}
        for name, weight in model.state_dict().items():
            if not name.startswith("encoder."):
                weights[name] = weight.contiguous()
        save_file(weights, new / "classifier.safetensors")
        write_json(new / "classifier.json", model.settings._asdict())
        mode = (new / "classifier.json").stat().st_mode
        for path in new.glob("*.safetensors"):  # which the library makes private
            with suppress(OSError):  # some file systems have no modes
                os.chmod(path, mode)
        if folder.exists():  # out of the way, and gone once the new one is in its place
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder):
    """Read a folder of save_model(): a Classifier. UserError when a part is missing."""
    folder = Path(folder)
    written = read_json(folder / "classifier.json", "train.py", Settings._fields)
    settings = Settings(**{key: written[key] for key in Settings._fields})
    encoder, pretrained_pooler = load_encoder(folder)
    if settings.head == "layers":
        drop_pooler(encoder)
    elif getattr(encoder, "pooler", None) is not None and not pretrained_pooler:
        raise UserError(f"{folder}: model.safetensors lacks the pooler that its head reads")
    model = Classifier(encoder, settings)
    weights = load_file(folder / "classifier.safetensors")
    for name, weight in encoder.state_dict().items():  # which is there already
        weights[f"encoder.{name}"] = weight
    model.load_state_dict(weights)  # a weight too many or too few is an error
    return model


# --- prediction -----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, batches, count, dtype, desc=None):
    """Logits of `count` rows: (N, C) float32 NumPy, in the rows' own order; the model in eval mode.

    batches: of data.eval_batches(), this process's share; all processes return all rows. `desc`:
    what the progress bar says, None for no bar. UserError for logits that are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    logits = torch.zeros(count, len(model.settings.labels), device=device)
    bar = progress_bar(
        total=count, unit="row", desc=desc, leave=False, delay=2, disable=desc is None
    )
    with autocast(device, dtype), bar:  # around the loop: the weights are cast once
        for batch in batches:
            batch = to_device(batch, device)
            logits[batch["rows"]] = model(batch).float()
            bar.update(len(batch["rows"]))
    if dist.is_initialized():
        dist.all_reduce(logits)
    if not logits.isfinite().all():
        raise UserError(
            f"{desc or 'prediction'}: the model gives logits that are not finite; try "
            "--precision fp32"
        )
    return logits.cpu().numpy()
