"""Frozen lowest layers, run once: their states of every train token are kept in a file, and steps begin above them.

Read by train.py for --freeze-cache, run by none. Work followed: AutoFreeze (Liu et al. 2021) keeps states so.
"""
import numpy as np
import torch
from tqdm import tqdm, trange

from data import collate, sorted_batches
from device import agree, autocast, start_processes, to_device
from files import UserError, create_array
from model import hidden_states, part_of

LAYERS = ("embeddings.", "encoder.layer.", "transformer.layer.", "pooler.")  # where an encoder's weights may be


class FrozenStates:
    """The states of one layer, of each token of an Encoded, in a file: (all tokens, D), float32 where the products are,
    else float16. The layer is the highest up to which all are in `frozen` and none but itself is pooled.

    Dropout is on, drawn once by (seed, batch). The processes of torchrun fill the file together; it has no name any
    more once all have opened it, so it is gone when they are, however they end. UserError for an encoder with weights
    outside its layers, or a state that does not fit.
    """

    def __init__(self, model, encoded, frozen, path, pad_id, dtype, max_length, batch_size, seed):
        self.encoded, layer = encoded, -1
        while layer + 1 in frozen and layer < min(model.layers):
            layer += 1
        encoder, device, (rank, world) = model.encoder, next(model.parameters()).device, start_processes()
        if outside := [name for name, _ in encoder.named_parameters() if not name.startswith(LAYERS)]:
            raise UserError(f"--freeze-cache: {type(encoder).__name__} has weights outside its layers ({outside[0]}), "
                            "so what its lowest layers give changes though they are frozen")
        encoder.given, batches = layer, sorted_batches(encoded.lengths, batch_size)
        shape = len(encoded.ids), encoder.config.hidden_size
        if rank == 0:
            path.parent.mkdir(exist_ok=True)
            create_array(path, shape, np.float32 if dtype == torch.float32 else np.float16)
            tqdm.write(f"the states of layer {layer} are kept until the run ends, {path.stat().st_size / 2 ** 20:,.0f} "
                       "MiB: what is below does not run in training any more")
        agree(0)
        self.kept = np.load(path, mmap_mode="r+")
        agree(0)
        if rank == 0:
            path.unlink()
        with torch.inference_mode(), autocast(device, dtype):
            # when it first runs, transformers marks the blocks whose states it gives: all of them, then, not a part
            hidden_states(encoder, to_device(collate(encoded, batches[-1], pad_id, max_length), device))
            for i in trange(rank, len(batches), world, desc=f"layers up to {layer}", leave=False,
                            disable=rank > 0 or None):
                batch = collate(encoded, rows := batches[i], pad_id, max_length)
                torch.manual_seed((seed * 1_000_003 + i) * 1024 + 1023)  # no step has this seed
                with part_of(encoder, 0, layer):
                    states, _ = hidden_states(encoder, to_device(batch, device))
                places, mask = self.places(batch, rows)
                with np.errstate(over="ignore"):
                    values = states[layer].float().cpu().numpy()[mask].astype(self.kept.dtype)
                if not np.isfinite(values).all():
                    raise UserError(f"--freeze-cache: a state of layer {layer} does not fit {self.kept.dtype}; "
                                    "try --precision fp32")
                self.kept[places] = values
        agree(0)

    def places(self, batch, rows):
        """Where the tokens of a batch of collate() stand in the file, in order; and its mask, (B, T)."""
        mask = batch["attention_mask"] == 1
        return (self.encoded.starts[rows][:, None] + np.arange(mask.shape[1]))[mask], mask

    def of(self, batch, rows):
        """The states of a batch of collate() with these rows: (B, T, D), 0 where it is padded."""
        places, mask = self.places(batch, rows)
        states = np.zeros((*mask.shape, self.kept.shape[1]), self.kept.dtype)
        states[mask] = self.kept[places]
        return states
