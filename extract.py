"""Phase 1a: run a frozen encoder once over a data set and keep every layer's pooled hidden states.

    python extract.py --model bert-base-multilingual-uncased --data data/massive \\
        --out features/massive

Reads   DATA/train.LANG.tsv of the source language, DATA/{dev,test}.*.tsv and labels.txt, and the
        encoder.
Writes  OUT/SPLIT.LANG.POOLING.npy (layers, rows, hidden), OUT/SPLIT.LANG.labels.npy (rows,) and
        OUT/manifest.json, which says whether all is complete. Stopped and started again with the
        same command it goes on at the batch it was at.
Paper   section 1.1, phase one.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

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
    split_name,
    tokenizer_identity,
    train_language,
)
from lib.devices import (
    autocast,
    broadcast,
    describe_device,
    pick_device,
    pick_precision,
    start_processes,
    to_device,
    wait_for_all,
)
from lib.encoders import (
    blocks,
    check_length,
    check_tokens,
    drop_pooler,
    hidden_states,
    load_encoder,
)
from lib.folders import finish_folder, lock, start_folder, versions, write_atomic
from lib.hub import revision
from lib.messages import UserError, cli, in_range, make_parser, out_of_memory, progress_bar
from model import POOLINGS, pool


class Extraction(NamedTuple):
    """How each file is extracted."""

    pad_id: int
    max_length: int  # tokens
    batch_size: int
    dtype: str  # of the files


def pool_all(encoder, batch):
    """One forward pass -> every pooling of every layer: (P, L, B, D) float32, as POOLINGS."""
    states, _ = hidden_states(encoder, batch)
    pooled = []
    for pooling in POOLINGS:
        layers = [pool(layer, batch["attention_mask"], pooling) for layer in states]
        pooled.append(torch.stack(layers))
    return torch.stack(pooled)


def to_dtype(pooled, dtype, where):
    """Pooled states as NumPy `dtype`. UserError for values not finite, or too large for it."""
    values = pooled.cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            f"{where}: the encoder gives hidden states that are not finite; try --precision fp32"
        )
    largest = np.abs(values).max()
    if largest > np.finfo(dtype).max:
        raise UserError(
            f"{where}: a hidden state of {largest:.3g} does not fit {dtype}: give --dtype float32"
        )
    return values.astype(dtype)


def make_array(path, shape, dtype):
    """A .npy file of zeros that processes write into, memory-mapped. Its room on the disk is taken
    now: to write to the memory map of a full disk would kill the process (SIGBUS)."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with write_atomic(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        size = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)


def extract_file(encoder, encoded, out, stem, settings, bar):
    """Write the features of one split in one language; all processes fill the same files.

    They grow under hidden names, beside a list of the batches that are done: a process killed
    anywhere loses a batch. The labels are written last.
    """
    rank, world = start_processes()
    batches = sorted_batches(encoded.lengths, settings.batch_size)
    shape = (len(blocks(encoder)) + 1, len(encoded.labels), encoder.config.hidden_size)
    growing = {p: out / f".{stem}.{p}.part" for p in POOLINGS}
    done_list = out / f".{stem}.part"  # (batches,), 1 for each that is written
    # 1. files of zeros
    if rank == 0 and not done_list.exists():
        for path in growing.values():
            make_array(path, shape, settings.dtype)
        make_array(done_list, (len(batches),), np.uint8)
    wait_for_all()
    # 2. the batches that are not done yet, each process its share
    done = np.load(done_list, "r+")
    if not done.all():
        arrays = [np.load(path, "r+") for path in growing.values()]
        bar.update(sum(len(rows) for rows, already in zip(batches, done) if already))
        for i in range(rank, len(batches), world):
            if done[i]:
                continue
            batch = collate(encoded, batches[i], settings.pad_id, settings.max_length)
            pooled = pool_all(encoder, to_device(batch, encoder.device))
            values = to_dtype(pooled, settings.dtype, f"{stem}.tsv")
            for array, value in zip(arrays, values):
                array[:, batches[i]] = value  # (L, B, D)
            done[i] = 1
            bar.update(len(batches[i]) * world)
        for array in arrays:
            array.flush()
    wait_for_all()  # all batches are written
    # 3. their names
    if rank == 0:
        for pooling, path in growing.items():
            if path.exists():  # or a process was killed after it had renamed it
                os.replace(path, out / f"{stem}.{pooling}.npy")
        with write_atomic(out / f"{stem}.labels.npy", "wb") as file:
            np.save(file, encoded.labels)


def extract_files(encoder, tokenizer, sets, out, settings, dtype):
    """Write the features of {(split, language): Rows}, one file after the other."""
    rank, _ = start_processes()
    total = sum(len(rows.labels) for rows in sets.values())
    with (
        torch.inference_mode(),
        autocast(encoder.device, dtype),  # around the loop: the weights are cast once
        progress_bar(total=total, unit="row", smoothing=0.1, disable=rank > 0) as bar,
    ):
        for (split, language), rows in sets.items():
            stem = f"{split}.{language}"
            bar.set_description(stem)
            if broadcast(rank == 0 and (out / f"{stem}.labels.npy").exists()):
                bar.update(len(rows.labels))
                continue
            encoded = encode(tokenizer, rows, settings.max_length)
            check_tokens(encoder, encoded.ids)
            extract_file(encoder, encoded, out, stem, settings, bar)


def parse_args(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--model", required=True, help="encoder: hub name or folder")
    add("--data", required=True, help="data set folder (python data.py --help)")
    add("--out", required=True, help="feature folder to write")
    add(
        "--train-languages",
        nargs="+",
        metavar="LANG",
        help="languages whose train file is read (default: en, or the only one there is)",
    )
    add(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        help="of the files (default: float16)",
    )
    add("--overwrite", action="store_true", help="delete the features in OUT and start anew")
    add = parser.add_argument_group("the forward pass").add_argument
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of matrix products (default: auto: bf16 where the hardware has it, else fp16 on a "
        "GPU)",
    )
    add("--max-length", type=int, default=128, help="tokens a row may have (default: 128)")
    add(
        "--batch-size",
        type=in_range(int, 1),
        default=64,
        help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)",
    )
    return parser.parse_args(argv)


def list_files(folder, train_languages):
    """The (split, language) of the train files asked for, and of all dev and test files."""
    languages = [train_language(folder, wanted) for wanted in train_languages or [None]]
    keys = [("train", language) for language in dict.fromkeys(languages)]
    for split in ("dev", "test"):
        keys += [(split, language) for language in split_languages(folder, split, languages[0])]
    return keys


def describe_inputs(data, sets):
    """What the manifest says of each file: {file name: its hash and rows}."""
    hashes, inputs = fingerprint(data, sets), {}
    for (split, language), rows in sets.items():
        name = split_name(split, language)
        inputs[name] = {"sha256": hashes[name], "rows": len(rows.labels)}
    return inputs


def main(argv=None):
    args = parse_args(argv)
    out, device = Path(args.out), pick_device()
    rank, _ = start_processes()
    dtype = pick_precision(args.precision, device)
    # 1. the data and the encoder
    labels = read_labels(args.data)
    keys = list_files(args.data, args.train_languages)
    sets = read_sets(args.data, keys, labels)
    tokenizer = load_tokenizer(args.model)
    encoder, _ = load_encoder(args.model)
    drop_pooler(encoder)
    encoder.to(device).eval()
    check_length(encoder, args.max_length)
    # 2. what the features are of
    manifest = {
        "format": 1,
        "revision": revision(args.model),
        "tokenizer": tokenizer_identity(tokenizer),
        "layers": list(range(len(blocks(encoder)) + 1)),
        "poolings": list(POOLINGS),
        "hidden_size": encoder.config.hidden_size,
        "dtype": args.dtype,
        "precision": str(dtype).removeprefix("torch."),
        "max_length": args.max_length,
        "labels": labels,
        "inputs": describe_inputs(args.data, sets),
        "batch_size": args.batch_size,
    }
    pairs = sets[keys[0]].text_b is not None
    not_compared = {"model": args.model, "pairs": pairs, "versions": versions()}
    settings = Extraction(tokenizer.pad_token_id, args.max_length, args.batch_size, args.dtype)
    with lock(out, rank):
        complete = rank == 0 and start_folder(
            out,
            "manifest.json",
            "extract.py",
            manifest | not_compared,
            tuple(not_compared),
            args.overwrite,
        )
        if broadcast(complete):
            if rank == 0:
                print(f"{out} is complete already: nothing to do")
            return 0
        # 3. the forward passes
        total = sum(len(rows.labels) for rows in sets.values())
        if rank == 0:
            print(
                f"{total:,} rows in {len(sets)} files -> {len(manifest['layers'])} layers x "
                f"{len(POOLINGS)} poolings x {manifest['hidden_size']}, {args.dtype}, "
                f"{manifest['precision']} products on {describe_device()}"
            )
        advice = f"--batch-size {args.batch_size} is too much, try {max(1, args.batch_size // 2)}"
        with out_of_memory(advice):
            extract_files(encoder, tokenizer, sets, out, settings, dtype)
        if rank == 0:
            finish_folder(out, "manifest.json")
            for path in out.glob(".*.part"):
                path.unlink()
            print(f"{out}: done")
        wait_for_all()  # all leave together, once the manifest says complete
    return 0


if __name__ == "__main__":
    cli(main)
