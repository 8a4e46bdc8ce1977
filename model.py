"""The model: a multilingual encoder cut at a layer, pooling, the classifier, freezing; loading, saving, predicting.

Read by the scripts, run by none. Paper: section 1.4 and Figure 4.

Letters in comments:  B batch  T tokens  D hidden size  L layers  N rows  M models  S seeds  C classes
Layers are numbered alike everywhere: 0 is the embedding output, k is the output of block k, counted from 1, so that
`hidden_states[k]` of transformers is layer k. A mask's 1 is a token, its 0 is padding.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lib.devices import autocast, to_device
from lib.encoders import blocks, check_layers, drop_pooler, hidden_states, load_encoder, whole_state
from lib.folders import read_json, write_json
from lib.messages import UserError, first_line

# --- pooling: a new one is a line here, and all scripts have it --------------------------------------------------

# (B, T, D) float32 states, (B, T, 1) bool mask of the tokens, [CLS] and [SEP] included, padding on the right -> (B, D)
POOLINGS = {
    "max": lambda states, tokens: states.masked_fill(~tokens, -torch.inf).amax(dim=1),
    "mean": lambda states, tokens: states.masked_fill(~tokens, 0).sum(dim=1) / tokens.sum(dim=1),
    "cls": lambda states, tokens: states[:, 0],
}


def pool(states, mask, pooling):
    """Pool one layer's states over the tokens, in float32: (B, T, D), (B, T) -> (B, D)."""
    return POOLINGS[pooling](states.float(), mask.bool()[:, :, None])


# --- the encoder, its layers, and freezing -----------------------------------------------------------------------


def freeze_layers(encoder, layers, readers):
    """Stop training exactly these layers (paper section 1.6): requires_grad off and the gradient gone.

    readers: of parameter_layers(). A parameter is frozen when every layer that reads it is. Dropout stays on, as in the
    paper. Returns the parameters frozen now.
    """
    frozen = [
        parameter
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
        and name in readers
        and set(range(readers[name][0], readers[name][1] + 1)) <= set(layers)
    ]
    for parameter in frozen:
        parameter.requires_grad, parameter.grad = False, None
    return frozen


# --- token ids and the table of word embeddings ------------------------------------------------------------------


# --- the classifier ----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder with a classifier on top.

    head "layers": the pooled states of the chosen layers, concatenated -> dropout -> linear (the paper's model);
                   with `hidden` > 0 a ReLU layer of that size and a second dropout stand between (its conclusion 8);
                   with combine "mix" their sum with learned softmax weights in the place of the concatenation.
    head "pooler": [CLS] of the last layer -> the pretrained dense + tanh -> dropout -> linear (BERT's own head).
    `pairs` says whether it was trained on pairs of texts.
    """

    def __init__(
        self,
        encoder,
        labels,
        head="layers",
        layers=(6, 8, 11),
        pooling="max",
        combine="concat",
        dropout=0.1,
        hidden=0,
        pairs=False,
    ):
        super().__init__()
        self.encoder, self.labels, self.head, self.pairs = encoder, list(labels), head, pairs
        self.layers, self.pooling, self.combine = list(layers), pooling, combine
        self.dropout, self.hidden, size = dropout, hidden, encoder.config.hidden_size
        if head == "pooler":
            self.layers, self.pooling, features = [len(blocks(encoder))], "cls", size
            self.dense = (
                None if getattr(encoder, "pooler", None) is not None else nn.Linear(size, size)
            )
        elif combine == "mix":
            self.mix, features = (
                nn.Parameter(torch.zeros(len(self.layers))),
                size,
            )  # begins as the plain mean
        else:
            features = size * len(self.layers)
        parts = [nn.Dropout(dropout)]
        if hidden:
            parts += [nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(*parts, nn.Linear(hidden or features, len(self.labels)))

    def forward(self, batch):
        """input_ids, attention_mask, token_type_ids (B, T) -> logits (B, C)."""
        states, output = hidden_states(self.encoder, batch)
        if self.head == "layers":
            pooled = [pool(states[k], batch["attention_mask"], self.pooling) for k in self.layers]
            features = (
                torch.cat(pooled, dim=1)
                if self.combine == "concat"
                else (torch.stack(pooled, dim=2) * self.mix.softmax(0)).sum(2)
            )  # (B, D, L) -> (B, D)
        elif self.dense is None:
            features = output.pooler_output
        else:
            features = torch.tanh(self.dense(states[-1][:, 0]))
        return self.classifier(features)  # (B, C)


# --- loading and saving ------------------------------------------------------------------------------------------


def save_model(model, tokenizer, folder):
    """Write a Classifier to a folder, whole or not at all: transformers' own files beside classifier.*."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        model.encoder.save_pretrained(beside, state_dict=whole_state(model.encoder))
        tokenizer.save_pretrained(beside)
        own = {
            key: weight.contiguous()
            for key, weight in model.state_dict().items()
            if not key.startswith("encoder.")
        }
        save_file(own, beside / "classifier.safetensors")
        write_json(
            beside / "classifier.json",
            {
                key: getattr(model, key)
                for key in (
                    "head",
                    "layers",
                    "pooling",
                    "combine",
                    "dropout",
                    "hidden",
                    "labels",
                    "pairs",
                )
            },
        )
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
    """Read a folder of save_model(): a Classifier. UserError when it is broken."""
    settings = read_json(
        Path(folder) / "classifier.json",
        "train.py",
        {
            "head": str,
            "layers": [int],
            "pooling": str,
            "combine": str,
            "hidden": int,
            "labels": [str],
            "pairs": bool,
        },
    )
    encoder, pretrained_pooler = load_encoder(folder)
    if settings["head"] == "layers":
        drop_pooler(encoder)
    elif getattr(encoder, "pooler", None) is not None and not pretrained_pooler:
        raise UserError(
            f"{folder}: model.safetensors lacks the pooler that the head {settings['head']!r} reads"
        )
    try:
        if (
            settings["head"] not in ("layers", "pooler")
            or settings["pooling"] not in POOLINGS
            or settings["combine"] not in ("concat", "mix")
        ):
            raise UserError(
                f"head {settings['head']!r}, pooling {settings['pooling']!r} or combine "
                f"{settings['combine']!r}: unknown"
            )
        check_layers(settings["layers"], len(blocks(encoder)), "layers")
        model = Classifier(encoder, **settings)
        missing, unexpected = model.load_state_dict(
            load_file(Path(folder) / "classifier.safetensors"), strict=False
        )
        if wrong := unexpected + [key for key in missing if not key.startswith("encoder.")]:
            raise UserError(f"{wrong[0]} is on one side alone")
    except Exception as error:
        raise UserError(
            f"{folder}: classifier.json and classifier.safetensors do not fit ({first_line(error)})"
        ) from None
    return model


# --- prediction --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, batches, count, dtype, desc=None):
    """Logits of `count` rows: (N, C) float32 NumPy, in the rows' own order. Leaves the model in eval mode.

    batches: of data.eval_batches(), this process's share; all processes return all rows. UserError for logits that are
    not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    logits = torch.zeros(count, len(model.labels), device=device)
    with (
        autocast(device, dtype),
        tqdm(total=count, unit="row", desc=desc, leave=False, disable=not desc or None) as bar,
    ):
        for batch in batches:  # autocast around the loop: the weights are cast once
            batch = to_device(batch, device)
            logits[batch["rows"]] = model(batch).float()
            bar.update(len(batch["rows"]))
    if dist.is_initialized():
        dist.all_reduce(logits)
    if not logits.isfinite().all():
        raise UserError(
            f"{desc or 'prediction'}: the model gives logits that are not finite; try --precision fp32"
        )
    return logits.cpu().numpy()
