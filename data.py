"""The data set: fetch and convert the published archives, check a folder; read its rows, tokenise them, batch them.

    python data.py xnli    --out data/xnli                  # MultiNLI in English to train, XNLI to test
    python data.py massive --out data/massive --intents 4   # the stand-in for the paper's in-house intents
    python data.py check   data/xnli --model bert-base-multilingual-uncased

Reads   the archives, downloaded to OUT/../archives or taken from --archives; any data set folder; a model's tokenizer.
Writes  OUT/labels.txt, OUT/{train,dev,test}.LANG.tsv, OUT/sources.json (formats: README).
Paper   section 1.3.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import AutoTokenizer

from lib.archives import (
    MASSIVE_URL,
    SPLITS,
    XNLI_LABELS,
    XNLI_LANGUAGES,
    XNLI_MT_URL,
    XNLI_URL,
    english,
    find_archive,
    label_index,
    read_massive,
    read_xnli,
    table_lines,
    text_lines,
)
from lib.devices import start_processes
from lib.folders import sha256, write_atomic, write_json
from lib.hub import model_folder
from lib.messages import UserError, cli, first_line, in_range, say_once
from lib.tables import markdown_table


class Rows(NamedTuple):
    """One split in one language: N texts, or pairs of texts, each list of N."""

    text_a: list
    text_b: list | None = None  # the second texts of pairs
    labels: list | None = None  # class indices, -1 unknown
    groups: list | None = None  # names; rows that belong together have one


class Encoded(NamedTuple):
    """N tokenised rows end to end: row i is ids[starts[i]:starts[i + 1]], its second text begins at second[i]."""

    ids: np.ndarray  # (all tokens,) int32
    starts: np.ndarray  # (N + 1,) int64
    second: np.ndarray  # (N,) int32
    labels: np.ndarray  # (N,) int64

    @property
    def lengths(self):
        """Tokens of each row, the special ones included: (N,)."""
        return np.diff(self.starts)


# --- the folder format -------------------------------------------------------------------------------------------


def read_labels(folder):
    """The label names of a data set folder, in class-index order."""
    path = Path(folder) / "labels.txt"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a data set folder: it has no labels.txt (python data.py --help)"
        )
    with open(path, "rb") as file:
        labels = list(text_lines(file, path))
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
        raise UserError(
            f"{path}: expected two or more different labels, one a line, got {labels[:8]}"
        )
    return labels


def read_table(path, labels=None, unknown=False):
    """Read a .tsv file whose columns `text`, or `text_a` and `text_b`, and `label` stand in any order.

    labels: the classes in index order; with `unknown` an empty label is class -1, else a UserError, which names the
    file, the line and what was expected. Returns Rows and all columns as they are, {name: N cells}.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    with open(path, "rb") as file:
        lines = table_lines(file, path)
        header = next(lines)
        texts = ["text"] if "text" in header else ["text_a", "text_b"]
        if (
            not set(texts) <= set(header)
            or {"text", "text_a"} <= set(header)
            or len(set(header)) < len(header)
            or "\r" in "".join(header)
        ):  # old Mac line ends
            raise UserError(
                f"{path}, line 1: the header is {header[:6]}, expected text, or text_a and text_b, "
                "and label, separated by tabs"
            )
        columns = dict(zip(header, map(list, zip(*lines))))
    if not columns:
        raise UserError(f"{path} holds a header and no rows")
    classes = [
        -1 if unknown and not label else label_index(label, labels, f"{path}, line {number}")
        for number, label in enumerate(columns.get("label", []), 2)
    ]
    text_b = columns[texts[1]] if len(texts) == 2 else None
    return Rows(columns[texts[0]], text_b, classes or None, columns.get("group")), columns


def write_table(path, columns):
    """Write {header: N texts} as a .tsv file."""
    with write_atomic(path) as file:
        file.writelines(
            "\t".join(cells) + "\n"
            for cells in zip(*([name, *texts] for name, texts in columns.items()))
        )


def split_languages(folder, split, first="en"):
    """The languages a split is there in: `first` first, then by name. Warns of files that look like one and are not."""
    found = []
    for path in sorted(Path(folder).glob("*.*")):
        match = re.fullmatch(r"(train|dev|test)\.([A-Za-z0-9_-]+)\.tsv", path.name)
        if match and match[1] == split:
            found.append(match[2])
        elif not match and re.match(r"(train|dev|test|valid\w*)\..*tsv$", path.name, re.I):
            say_once(
                f"warning: {path} is not read: a split's file is named train, dev or test, a language code without"
                " a dot and .tsv, as dev.pt-BR.tsv"
            )
    return sorted(found, key=lambda language: (language != first, language))


def train_language(folder, wanted=None):
    """The source language: the one asked for, else "en" where there is a train.en, else the only one there is."""
    there = split_languages(folder, "train")
    if wanted is None and len(there) > 1 and "en" not in there:
        raise UserError(
            f"{folder} has train files in {' '.join(there)}: say which with --train-language"
        )
    wanted = wanted or (there[0] if there else "en")
    split_path(folder, "train", wanted)
    return wanted


def split_path(folder, split, language):
    """The file of one split in one language. UserError lists the languages there are when that one is not."""
    path = Path(folder) / f"{split}.{language}.tsv"
    if not path.is_file():
        there = split_languages(folder, split)
        raise UserError(
            f"{path} does not exist; {split} is there in: {' '.join(there) or 'no language'}"
        )
    return path


def read_split(folder, split, language, labels):
    """Rows of one split in one language."""
    path = split_path(folder, split, language)
    rows, columns = read_table(path, labels)
    if rows.labels is None:
        raise UserError(f"{path}, line 1: no label column")
    known = ("text", "text_a", "text_b", "label", "group")
    if more := [name for name in columns if name not in known]:
        say_once(f"note: {path}: columns that are not read: {' '.join(more)}")
    return rows


def read_sets(folder, keys, labels, pairs=None):
    """Rows of each (split, language) in `keys`: {key: Rows}. UserError where some are pairs and others single texts.

    pairs: whether they have to be pairs, where a model knows it.
    """
    sets = {key: read_split(folder, *key, labels) for key in keys}
    for key, rows in sets.items():
        pairs = rows.text_b is not None if pairs is None else pairs
        if (rows.text_b is not None) != pairs:
            raise UserError(
                f"{split_path(folder, *key)} holds {kind(rows.text_b is not None)}, "
                f"expected {kind(pairs)}, as in training"
            )
    return sets


def kind(pairs):
    """What a file or a model holds, in words."""
    return "pairs (text_a, text_b)" if pairs else "single texts (text)"


def take(rows, count):
    """`count` rows spread evenly over Rows, the same ones in every language; all when there are fewer, or for None."""
    total = len(rows.text_a)
    if count is None or count >= total:
        return rows
    return Rows(*(column and [column[i * total // count] for i in range(count)] for column in rows))


def group_numbers(rows):
    """Number the groups of Rows in order of appearance: (N,) int64.

    A group is what the column says, else the pairs with one first text; without either each row is its own.
    """
    names = rows.groups
    if names is None and rows.text_b is not None:
        names = rows.text_a
    if names is None:
        return np.arange(len(rows.text_a))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def fingerprint(folder, keys):
    """SHA-256 of the file of each (split, language): {file name: hexadecimal}."""
    return {path.name: sha256(path) for path in sorted(split_path(folder, *key) for key in keys)}


# --- tokens and batches ------------------------------------------------------------------------------------------


def load_tokenizer(name):
    """The model's own fast tokenizer. UserError when it cannot be had, or does not mark where texts begin and end."""
    folder = model_folder(name, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:
        why = (
            "its vocabulary is a SentencePiece file: pip install sentencepiece"
            if "tiktoken" in str(error)
            else first_line(error)
        )
        raise UserError(f"no tokenizer can be loaded from {str(name)!r}: {why}") from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {str(name)!r} is not a fast one with a padding token")
    if len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # transformers makes an empty one up where files are missing
        raise UserError(
            f"no tokenizer can be loaded from {str(name)!r}: "
            "it has no vocabulary (tokenizer.json or vocab.txt)"
        )
    special = set(tokenizer.all_special_ids)
    for a, b in ("a", "b"), ("", ""):
        one, pair = tokenizer([a])["input_ids"][0], tokenizer([a], [b])["input_ids"][0]
        if (
            len(one) < 2
            or sum(token in special for token in pair) < 3
            or not ({one[0], one[-1], pair[0], pair[-1]} <= special)
        ):
            raise UserError(
                f"the tokenizer of {str(name)!r} does not put a special token before a text, between two "
                f"and after them (it gives {tokenizer.convert_ids_to_tokens(pair)} for {[a, b]}): give its "
                "tokenizer.json a post_processor that does"
            )
    return tokenizer


def tokenizer_identity(tokenizer):
    """SHA-256 of all that a tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def encode(tokenizer, rows, max_length=128, chunk=8192):
    """Tokenise Rows with the model's own fast tokenizer, pairs as pairs, cutting the longer text first.

    Returns Encoded; rows without labels get class -1. `max_length` is in tokens, the special ones included.
    """
    ids, second = [], []
    for start in range(0, len(rows.text_a), chunk):
        part = slice(start, start + chunk)
        tokens = tokenizer(
            rows.text_a[part],
            rows.text_b[part] if rows.text_b else None,
            max_length=max_length,
            truncation="longest_first",
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        ids += [np.array(row, dtype=np.int32) for row in tokens["input_ids"]]
        second += [len(types) - sum(types) for types in tokens["token_type_ids"]]
    tokenizer.backend_tokenizer.no_truncation()  # which tokenising leaves on: it would be saved with the model
    flat = np.concatenate(ids)
    if np.mean(flat == tokenizer.unk_token_id) > 0.1:
        print(
            f"warning: {np.mean(flat == tokenizer.unk_token_id):.0%} of the tokens are unknown to the tokenizer",
            file=sys.stderr,
        )
    labels = rows.labels if rows.labels is not None else [-1] * len(ids)
    return Encoded(
        flat,
        np.cumsum([0, *map(len, ids)]),
        np.array(second, dtype=np.int32),
        np.array(labels, dtype=np.int64),
    )


def train_batches(lengths, size, seed, epoch, multiple=8):
    """One epoch's batches: random rows of one rounded length together, in random order, from (seed, epoch) alone.

    lengths (N,) in tokens -> list of index arrays of `size` rows (one may be shorter), every row once.
    Rounding to a multiple of 8 is then nearly all the padding there is, and there are few shapes.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    order = order[np.argsort(-(-lengths[order] // multiple), kind="stable")]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def sorted_batches(lengths, size, multiple=8, tokens=24, window=1 << 15):
    """Batches for evaluation and extraction, by falling length: as many rows of one rounded length as hold `size` times
    `tokens` tokens. So memory and the size of a matrix product are the same for short and for long texts.

    Rows are sorted within windows, so that what is written of them lies together in the files.
    """
    batches = []
    for first in range(0, len(lengths), window):
        order = first + np.argsort(-lengths[first : first + window], kind="stable")
        widths, start = -(-lengths[order] // multiple) * multiple, 0
        while start < len(order):
            batches.append(order[start : start + max(1, size * tokens // widths[start])])
            start += len(batches[-1])
    return batches


def collate(encoded, rows, pad_id, limit=None, multiple=8):
    """Pad some rows of an Encoded to a multiple of 8 tokens, `limit` at most.

    rows: (B,) indices. Returns NumPy arrays input_ids, attention_mask (1: a token) and token_type_ids, each (B, T)
    int64, and labels (B,) int64.
    """
    lengths = encoded.starts[rows + 1] - encoded.starts[rows]
    width = max(lengths.max(), min(-(-lengths.max() // multiple) * multiple, limit or 1 << 30))
    columns = np.arange(width)
    mask = columns < lengths[:, None]  # (B, T)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = encoded.ids[(encoded.starts[rows][:, None] + columns)[mask]]
    types = mask & (columns >= encoded.second[rows][:, None])
    return {
        "input_ids": ids,
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": types.astype(np.int64),
        "labels": encoded.labels[rows],
    }


def eval_batches(encoded, pad_id, limit, size=64):
    """Yield the batches of sorted_batches(), of which each process of torchrun has its share: those of collate(), and
    `rows`, (B,), which they are of."""
    rank, world = start_processes()
    for rows in sorted_batches(encoded.lengths, size)[rank::world]:
        yield {**collate(encoded, rows, pad_id, limit), "rows": rows}


# --- archives ----------------------------------------------------------------------------------------------------


def write_data_set(out, labels, columns, data):
    """Write a data set folder. columns: names of a row's cells; data: {(split, language): (rows, archive, member)}."""
    out, sources, names = Path(out), {}, {f"{split}.{language}.tsv" for split, language in data}
    others = sorted({path.name for path in out.glob("*.*.tsv")} - names)
    if others or (out / "labels.txt").is_file() and read_labels(out) != labels:
        raise UserError(
            f"{out} holds another data set ({others[0] if others else 'other labels'}): "
            "give another --out, or delete it"
        )
    with write_atomic(out / "labels.txt") as file:
        file.writelines(f"{label}\n" for label in labels)
    for (split, language), (rows, archive, member) in data.items():
        path = out / f"{split}.{language}.tsv"
        write_table(path, dict(zip(columns, zip(*rows))))
        sources[path.name] = {
            "archive": archive,
            "member": member,
            "sha256": sha256(path),
            "rows": len(rows),
        }
        print(f"{path}: {len(rows):,} rows")
    write_json(out / "sources.json", sources)


# --- the commands ------------------------------------------------------------------------------------------------


def check(folder, model=None, max_length=128):
    """Print what a data set folder holds and what is odd about it."""
    labels = read_labels(folder)
    keys = [(split, language) for split in SPLITS for language in split_languages(folder, split)]
    if not keys:
        raise UserError(f"{folder} has no train, dev or test file")
    tokenizer = model and load_tokenizer(model)
    table, notes, train, first = [], "", set(), {}
    for (split, language), rows in read_sets(folder, keys, labels).items():
        texts = list(zip(rows.text_a, rows.text_b or rows.text_a))
        share = np.bincount(rows.labels, minlength=len(labels)) / len(texts)
        again = "" if split == "train" else f"{sum(text in train for text in texts):,}"
        train.update(texts if split == "train" else [])
        table.append(
            [
                f"{split}.{language}",
                f"{len(texts):,}",
                f"{group_numbers(rows).max() + 1:,}",
                f"{share.min():.1%}",
                f"{share.max():.1%}",
                f"{len(texts) - len(set(texts)):,}",
                again,
            ]
        )
        if model:
            encoded = encode(tokenizer, rows, max_length=1 << 20)
            table[-1] += [
                f"{encoded.lengths.mean():.1f}",
                f"{np.mean(encoded.ids == tokenizer.unk_token_id):.2%}",
                f"{np.mean(encoded.lengths > max_length):.1%}",
            ]
        name, expected = first.setdefault(split, (language, rows.labels))
        if split != "train" and rows.labels != expected:
            notes += (
                f"note: {split}.{language}.tsv is not row-parallel with {split}.{name}.tsv: "
                "no mean over languages will be compared\n"
            )
    print(f"{folder}: {len(labels)} labels: {' '.join(labels[:8])}{' ...' * (len(labels) > 8)}\n")
    print(
        markdown_table(
            ["file", "rows", "groups", "smallest", "largest", "twice", "in train"]
            + ["tokens", "unknown", "cut"] * bool(model),
            table,
        )
    )
    print(
        "\ngroups: of rows that belong together; smallest, largest: the class with the fewest and the most rows; twice: rows that are there again;\n"
        "in train: rows whose text is in a train file too"
        + f"; cut: longer than {max_length} tokens"
        * bool(model)
    )
    print(notes, end="")


def language_code(text):
    """A type for argparse: a language code as MASSIVE has them."""
    if not re.fullmatch("[a-z]{2}([-_][A-Z]{2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a code as de or zh-CN")
    return text


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, languages, form in (
        ("xnli", "en zh es de ar ur", {"choices": XNLI_LANGUAGES}),
        ("massive", "en de es fr zh", {"type": language_code}),
    ):
        command = commands.add_parser(name, help=f"fetch and convert {name}", allow_abbrev=False)
        command.add_argument("--out", required=True, help="data set folder to write")
        command.add_argument(
            "--archives",
            metavar="DIR",
            help="folder that holds the archives (default: download them)",
        )
        command.add_argument(
            "--languages",
            nargs="+",
            default=languages.split(),
            metavar="LANG",
            **form,
            help=f"languages of dev and test (default: {languages})",
        )
        command.add_argument(
            "--train-languages",
            nargs="+",
            metavar="LANG",
            **form,
            help="languages of train (default: English)",
        )
        if name == "massive":
            command.add_argument(
                "--intents",
                type=in_range(int, 0),
                default=4,
                help="keep the N most frequent intents of English train (default: 4; 0: all 60)",
            )
            command.add_argument(
                "--balance",
                action="store_true",
                help="repeat train rows of the smaller classes until all are equal, as the paper did",
            )
            command.add_argument(
                "--seed", type=in_range(int, 0), default=0, help="for --balance (default: 0)"
            )
    command = commands.add_parser(
        "check",
        help="print what a data set folder holds and what is odd about it",
        allow_abbrev=False,
    )
    command.add_argument("folder", help="data set folder")
    command.add_argument(
        "--model", help="model whose tokenizer to count tokens with (hub name or folder)"
    )
    command.add_argument(
        "--max-length",
        type=in_range(int, 1),
        default=128,
        help="tokens a row may have (default: 128)",
    )
    args = parser.parse_args(argv)
    if args.command == "massive" and args.intents == 1:
        parser.error("--intents 1: expected 0 (all) or 2 and more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.command == "check":
        return check(args.folder, args.model, args.max_length)
    train_languages = args.train_languages or [english(args.languages)]
    if args.command == "xnli":
        paths = [find_archive(url, args.archives, args.out) for url in (XNLI_URL, XNLI_MT_URL)]
        data = read_xnli(*paths, args.languages, train_languages)
        write_data_set(args.out, XNLI_LABELS, ["text_a", "text_b", "label"], data)
    else:
        path = find_archive(MASSIVE_URL, args.archives, args.out)
        labels, data = read_massive(
            path, args.languages, train_languages, args.intents, args.balance, args.seed
        )
        write_data_set(args.out, labels, ["text", "label"], data)


if __name__ == "__main__":
    cli(main)
