"""Phase 1a: run a frozen encoder once over a data set and keep every layer's pooled hidden states.

    python extract.py --model bert-base-multilingual-uncased --data data/massive --out features/massive

Reads   DATA/{train,dev,test}.LANG.tsv and labels.txt, and the encoder.
Writes  OUT/SPLIT.LANG.POOLING.npy (layers, rows, hidden), OUT/SPLIT.LANG.labels.npy (rows,) and, last,
        OUT/manifest.json. Stopped and started again with the same command it goes on where it was.
Paper   section 1.1, phase one.
"""
import argparse
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import SPLITS, collate, encode, fingerprint, read_labels, read_split, sorted_batches, split_languages
from device import agree, autocast, out_of_memory, pick_device, pick_precision, start_processes, to_device, versions
from files import (UserError, claim, cli, create_array, finish_folder, in_range, load_array, progress_bar, start_folder,
                   write_atomic)
from model import (POOLINGS, blocks, drop_pooler, hidden_states, load_encoder, load_tokenizer, model_identity, pool,
                   token_limit)


def pool_all(encoder, batch):
    """One forward pass -> every pooling of every layer: (P, L, B, D) float32, in the order of POOLINGS."""
    states, _ = hidden_states(encoder, batch)
    return torch.stack([torch.stack([pool(layer, batch["attention_mask"], pooling) for layer in states])
                        for pooling in POOLINGS])


def to_dtype(pooled, dtype, where):
    """Pooled states as NumPy `dtype`. UserError for a value that is not finite, or that float16 cannot hold."""
    values = pooled.cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{where}: the encoder gives hidden states that are not finite; try --precision fp32")
    largest = np.abs(values).max()
    if dtype == "float16" and largest > np.finfo(np.float16).max:
        raise UserError(f"{where}: a hidden state of {largest:.3g} does not fit float16: give --dtype float32")
    return values.astype(dtype)


def gather_batches(values, shape, dtype, device):
    """Bring the batches of a round to the first process: a list with one array of `shape` (or less) for each process.

    values: this process's (P, L, B, D) NumPy array, or None. Other processes than the first get an empty list.
    """
    if not dist.is_initialized():
        return [values]
    buffer = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    if values is not None:
        buffer[:, :, :values.shape[2]] = torch.from_numpy(values)
    received = [torch.empty_like(buffer) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(buffer, received)
    return [array.cpu().numpy() for array in received or []]


class PartFiles:
    """The .npy files of one split in one language while they grow: P memory-mapped arrays and a count of batches.

    They live under hidden names until finish(); what was written survives a kill of the process.
    """

    def __init__(self, folder, stem, shape, dtype):
        self.finals = [folder / f"{stem}.{pooling}.npy" for pooling in POOLINGS]
        self.parts = [folder / f".{path.name}.part" for path in self.finals]
        self.counter = folder / f".{stem}.batches"
        if not self.counter.exists():
            for path in self.parts:
                create_array(path, shape, dtype)
            with write_atomic(self.counter, "wb") as file:
                file.write(bytes(8))
        self.arrays = [load_array(part if part.exists() else final, shape, mode="r+",  # a stop in finish() renamed some
                                  remedy="--overwrite starts anew") for part, final in zip(self.parts, self.finals)]
        self.done = np.memmap(self.counter, np.int64, "r+", shape=(1,))

    def write(self, rows, values):
        """values (P, L, B, D) go to columns `rows` of the P arrays; one batch more is done."""
        for array, value in zip(self.arrays, values):
            array[:, rows] = value
        self.done[0] += 1

    def finish(self):
        for array, part, final in zip(self.arrays, self.parts, self.finals):
            array.flush()
            if part.exists():
                os.replace(part, final)
        self.counter.unlink()


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--model", required=True, help="encoder: hub name or folder")
    group.add_argument("--data", required=True, help="data set folder (python data.py --help)")
    group.add_argument("--out", required=True, help="feature folder to write")
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16",
                       help="of the files (default: float16)")
    group.add_argument("--overwrite", action="store_true", help="delete what is in OUT and start anew")
    group = parser.add_argument_group("the forward pass")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                       help="of matrix products (default: auto: bf16 where the hardware has it, else fp16 on a GPU)")
    group.add_argument("--max-length", type=int, default=128, help="tokens a row may have (default: 128)")
    group.add_argument("--batch-size", type=in_range(int, 1), default=64,
                       help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, out, (rank, world) = pick_device(), Path(args.out), start_processes()
    dtype = pick_precision(args.precision, device)
    labels = read_labels(args.data)
    data = {f"{split}.{language}": read_split(args.data, split, language, labels)
            for split in SPLITS for language in split_languages(args.data, split)}
    if not data:
        raise UserError(f"{args.data} has no train, dev or test file")
    tokenizer = load_tokenizer(args.model)
    encoder, _ = load_encoder(args.model)
    drop_pooler(encoder)
    encoder.to(device).eval()
    token_limit(encoder, args.max_length)
    layers, hidden = len(blocks(encoder)) + 1, encoder.config.hidden_size
    sums = fingerprint(args.data, [f"{stem}.tsv" for stem in data])
    manifest = {"format": 1, **model_identity(encoder, tokenizer, args.model),
                "layers": list(range(layers)), "poolings": list(POOLINGS), "hidden_size": hidden, "dtype": args.dtype,
                "precision": str(dtype).removeprefix("torch."), "max_length": args.max_length, "labels": labels,
                "inputs": {f"{stem}.tsv": {"sha256": sums[f"{stem}.tsv"], "rows": len(rows.labels)}
                           for stem, rows in data.items()},
                "batch_size": args.batch_size}
    with claim(out) if rank == 0 else nullcontext():
        if agree(rank == 0 and start_folder(out, "manifest.json", manifest, {"versions": versions()}, args.overwrite)):
            if rank == 0:
                print(f"{out} is complete already: nothing to do")
            return 0
        total = sum(len(rows.labels) for rows in data.values())
        if rank == 0:
            print(f"{total:,} rows in {len(data)} files -> {layers} layers x {len(POOLINGS)} poolings x {hidden}, "
                  f"{args.dtype}, {manifest['precision']} products on "
                  + (f"{world} processes" if world > 1 else str(device)))
        # autocast around the loop: the weights are cast once
        with torch.inference_mode(), autocast(device, dtype), \
                out_of_memory(f"--batch-size {args.batch_size} is too much, try {max(1, args.batch_size // 2)}"), \
                progress_bar(total=total, unit="row", smoothing=0.1, disable=rank > 0) as bar:
            for stem, rows in data.items():
                bar.set_description(stem)
                labels_path = out / f"{stem}.labels.npy"
                if agree(rank == 0 and labels_path.exists()):  # written last: this file is whole
                    bar.update(len(rows.labels))
                    continue
                encoded = encode(tokenizer, rows, args.max_length)
                batches = sorted_batches(encoded.lengths, args.batch_size)
                files = PartFiles(out, stem, (layers, len(rows.labels), hidden), args.dtype) if rank == 0 else None
                done = agree(int(files.done[0]) if rank == 0 else 0)
                bar.update(sum(len(batch) for batch in batches[:done]))
                for start in range(done, len(batches), world):  # a round: a batch a process, the first writes all
                    values = None
                    if start + rank < len(batches):
                        batch = collate(encoded, batches[start + rank], tokenizer.pad_token_id, args.max_length)
                        values = pool_all(encoder, to_device(batch, device))
                        values = to_dtype(values, args.dtype, f"{args.data}/{stem}.tsv")
                    shape = (len(POOLINGS), layers, max(map(len, batches)), hidden)
                    gathered = gather_batches(values, shape, args.dtype, device)
                    for index, values in zip(batches[start:start + world], gathered):
                        files.write(index, values[:, :, :len(index)])
                        bar.update(len(index))
                if rank == 0:
                    files.finish()
                    with write_atomic(labels_path, "wb") as file:
                        np.save(file, encoded.labels)
        if rank == 0:
            finish_folder(out, "manifest.json")
            print(f"{out}: done")
        agree(0)  # all leave together, once the manifest says complete
    return 0


if __name__ == "__main__":
    cli(main)
