"""Phase 1a: run a frozen encoder once over a data set and keep every layer's pooled hidden states.

    python extract.py --model bert-base-multilingual-uncased --data data/massive --out features/massive

Reads   DATA/train.LANG.tsv of the source language, DATA/{dev,test}.*.tsv and labels.txt, and the encoder.
Writes  OUT/SPLIT.LANG.POOLING.npy (layers, rows, hidden), OUT/SPLIT.LANG.labels.npy (rows,) and, last,
        OUT/manifest.json. Stopped and started again with the same command it goes on at the batch it was at.
Paper   section 1.1, phase one.
"""

import argparse
import functools
import math
import os
from pathlib import Path

import numpy as np
import torch

from data import (
    collate,
    encode,
    fingerprint,
    load_tokenizer,
    read_labels,
    read_sets,
    sorted_batches,
    split_languages,
    tokenizer_identity,
    train_language,
)
from lib.devices import agree, autocast, pick_device, pick_precision, start_processes, to_device
from lib.encoders import (
    blocks,
    check_length,
    check_tokens,
    drop_pooler,
    hidden_states,
    load_encoder,
)
from lib.folders import claim, finish_folder, load_array, start_folder, versions, write_atomic
from lib.hub import revision
from lib.messages import UserError, cli, in_range, out_of_memory, progress_bar
from model import POOLINGS, pool


def pool_all(encoder, batch):
    """One forward pass -> every pooling of every layer: (P, L, B, D) float32, in the order of POOLINGS."""
    states, _ = hidden_states(encoder, batch)
    return torch.stack(
        [
            torch.stack([pool(layer, batch["attention_mask"], pooling) for layer in states])
            for pooling in POOLINGS
        ]
    )


def to_dtype(pooled, dtype, where):
    """Pooled states as NumPy `dtype`. UserError for a value that is not finite, or that float16 cannot hold."""
    values = pooled.cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            f"{where}: the encoder gives hidden states that are not finite; try --precision fp32"
        )
    if np.abs(values).max() > np.finfo(dtype).max:
        raise UserError(
            f"{where}: a hidden state of {np.abs(values).max():.3g} does not fit {dtype}: "
            "give --dtype float32"
        )
    return values.astype(dtype)


def grow_array(path, shape, dtype):
    """A .npy file of zeros, unless it is there, that processes write into, memory-mapped; its room on the disk is taken
    at once, for a full disk would be a bus error later."""
    if not path.exists():
        with write_atomic(path, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            )
            size = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)


def extract_file(encoder, encoded, out, stem, bar, *, pad_id, max_length, batch_size, dtype):
    """Write the features of one split in one language; the processes of torchrun fill the same files.

    They grow under hidden names, beside a list of the batches that are done: a process killed anywhere loses a batch.
    """
    rank, world = start_processes()
    batches, layers = sorted_batches(encoded.lengths, batch_size), len(blocks(encoder)) + 1
    shape = (layers, len(encoded.labels), encoder.config.hidden_size)
    final = {pooling: out / f"{stem}.{pooling}.npy" for pooling in POOLINGS}
    grown = {pooling: out / f".{path.name}.part" for pooling, path in final.items()}
    ready = (
        out / f".{stem}.done.part"
    )  # (batches,) 1 for each that is written; gone when the files are renamed
    if rank == 0 and not any(path.exists() for path in final.values()):
        for path in grown.values():
            grow_array(path, shape, dtype)
        grow_array(ready, (len(batches),), np.uint8)
    agree()
    if ready.exists():
        reopen = functools.partial(load_array, mode="r+", remedy="--overwrite starts anew")
        arrays, done = (
            [reopen(path, shape) for path in grown.values()],
            reopen(ready, (len(batches),), "u"),
        )
        bar.update(sum(len(rows) for rows, already in zip(batches, done) if already))
        for i in range(rank, len(batches), world):
            if not done[i]:
                batch = collate(encoded, rows := batches[i], pad_id, max_length)
                values = to_dtype(
                    pool_all(encoder, to_device(batch, encoder.device)), dtype, f"{stem}.tsv"
                )
                for array, value in zip(arrays, values):
                    array[:, rows] = value  # (L, B, D)
                done[i] = 1
                bar.update(len(rows) * world)
        for array in arrays:
            array.flush()
    agree()  # all batches are written
    if rank == 0:
        ready.unlink(missing_ok=True)
        for pooling, path in grown.items():
            if path.exists():
                os.replace(path, final[pooling])
        with write_atomic(
            out / f"{stem}.labels.npy", "wb"
        ) as file:  # written last: this file is whole
            np.save(file, encoded.labels)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("files")
    group.add_argument("--model", required=True, help="encoder: hub name or folder")
    group.add_argument("--data", required=True, help="data set folder (python data.py --help)")
    group.add_argument("--out", required=True, help="feature folder to write")
    group.add_argument(
        "--train-languages",
        nargs="+",
        metavar="LANG",
        help="languages whose train file is read (default: en, or the only one there is)",
    )
    group.add_argument(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        help="of the files (default: float16)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the features that are in OUT and start anew",
    )
    group = parser.add_argument_group("the forward pass")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of matrix products (default: auto: bf16 where the hardware has it, else fp16 on a GPU)",
    )
    group.add_argument(
        "--max-length", type=int, default=128, help="tokens a row may have (default: 128)"
    )
    group.add_argument(
        "--batch-size",
        type=in_range(int, 1),
        default=64,
        help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, out, (rank, world) = pick_device(), Path(args.out), start_processes()
    dtype = pick_precision(args.precision, device)
    labels = read_labels(args.data)
    languages = [train_language(args.data, wanted) for wanted in args.train_languages or [None]]
    keys = [("train", language) for language in dict.fromkeys(languages)]
    keys += [
        (split, code)
        for split in ("dev", "test")
        for code in split_languages(args.data, split, languages[0])
    ]
    data = {
        f"{split}.{language}": rows
        for (split, language), rows in read_sets(args.data, keys, labels).items()
    }
    tokenizer = load_tokenizer(args.model)
    encoder, _ = load_encoder(args.model)
    drop_pooler(encoder)
    encoder.to(device).eval()
    check_length(encoder, args.max_length)
    layers, hidden, sums = (
        len(blocks(encoder)) + 1,
        encoder.config.hidden_size,
        fingerprint(args.data, keys),
    )
    manifest = {
        "format": 1,
        "revision": revision(args.model),
        "tokenizer": tokenizer_identity(tokenizer),
        "layers": list(range(layers)),
        "poolings": list(POOLINGS),
        "hidden_size": hidden,
        "dtype": args.dtype,
        "precision": str(dtype).removeprefix("torch."),
        "max_length": args.max_length,
        "labels": labels,
        "inputs": {
            f"{stem}.tsv": {"sha256": sums[f"{stem}.tsv"], "rows": len(rows.labels)}
            for stem, rows in data.items()
        },
        "batch_size": args.batch_size,
    }
    with claim(out, rank):
        if agree(
            rank == 0
            and start_folder(
                out,
                "manifest.json",
                "extract.py",
                manifest,
                {"model": args.model, "versions": versions()},
                args.overwrite,
            )
        ):
            if rank == 0:
                print(f"{out} is complete already: nothing to do")
            return 0
        total = sum(len(rows.labels) for rows in data.values())
        if rank == 0:
            print(
                f"{total:,} rows in {len(data)} files -> {layers} layers x {len(POOLINGS)} poolings x {hidden}, "
                f"{args.dtype}, {manifest['precision']} products on "
                + (f"{world} processes" if world > 1 else str(device))
            )
        # autocast around the loop: the weights are cast once
        with (
            torch.inference_mode(),
            autocast(device, dtype),
            out_of_memory(
                f"--batch-size {args.batch_size} is too much, try {max(1, args.batch_size // 2)}"
            ),
            progress_bar(total=total, unit="row", smoothing=0.1, disable=rank > 0) as bar,
        ):
            for stem, rows in data.items():
                bar.set_description(stem)
                if agree(rank == 0 and (out / f"{stem}.labels.npy").exists()):
                    bar.update(len(rows.labels))
                    continue
                encoded = encode(tokenizer, rows, args.max_length)
                check_tokens(encoder, encoded.ids)
                extract_file(
                    encoder,
                    encoded,
                    out,
                    stem,
                    bar,
                    pad_id=tokenizer.pad_token_id,
                    dtype=args.dtype,
                    max_length=args.max_length,
                    batch_size=args.batch_size,
                )
        if rank == 0:
            finish_folder(out, "manifest.json")
            print(f"{out}: done")
        agree()  # all leave together, once the manifest says complete
    return 0


if __name__ == "__main__":
    cli(main)
