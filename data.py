"""The data set: made from published archives or own tables, checked; read, tokenised, batched.

    python data.py xnli    --out data/xnli                 # English to train, 15 languages to test
    python data.py massive --out data/massive --intents 4  # stands in for the paper's intents
    python data.py own     --out data/tickets --train en=tickets.csv --dev de=checked.csv \\
        --text body --label queue                          # your own .csv, .jsonl or .tsv
    python data.py check   data/xnli --model bert-base-multilingual-uncased

Reads   archives, downloaded to OUT/../archives or taken from --archives; your tables; any data set
        folder; a model's tokenizer.
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
    XNLI_MT_URL,
    XNLI_URL,
    english,
    find_archive,
    label_index,
    need_columns,
    read_columns,
    read_massive,
    read_own,
    read_xnli,
    text_lines,
    write_columns,
)
from lib.devices import start_processes
from lib.folders import sha256, write_json, write_text
from lib.hub import model_folder
from lib.messages import UserError, cli, first_line, in_range, make_parser, say_once
from lib.tables import markdown_table

LANGUAGE = re.compile("[A-Za-z0-9_-]+")


class Rows(NamedTuple):
    """One split in one language: N texts, or pairs of texts; each list has N entries."""

    text_a: list
    text_b: list | None = None  # the second texts of pairs
    labels: list | None = None  # class indices, -1 unknown
    groups: list | None = None  # names; rows that belong together have one


class Encoded(NamedTuple):
    """N tokenised rows end to end: row i is ids[starts[i]:starts[i + 1]]."""

    ids: np.ndarray  # (all tokens,) int32
    starts: np.ndarray  # (N + 1,) int64
    second: np.ndarray  # (N,) int32, where in the row its second text begins
    labels: np.ndarray  # (N,) int64

    @property
    def lengths(self):
        """Tokens of each row, the special ones included: (N,)."""
        return np.diff(self.starts)


# --- the folder format ---------------------------------------------------------------------------


def split_name(split, language):
    """The file name of one split in one language."""
    return f"{split}.{language}.tsv"


def split_path(folder, split, language):
    """The file of one split in one language. UserError lists the languages that there are."""
    path = Path(folder) / split_name(split, language)
    if not path.exists():
        languages = " ".join(split_languages(folder, split)) or "no language"
        raise UserError(f"{path} does not exist; {split} is there in: {languages}")
    return path


def split_languages(folder, split, first="en"):
    """The languages that a split is there in: `first` first, then by name.

    Warns of files that look like a split's and are not.
    """
    languages = []
    for path in sorted(Path(folder).glob("*.*")):
        name, _, language = path.stem.partition(".")
        well_named = LANGUAGE.fullmatch(language) and path.name == split_name(name, language)
        if well_named and name in SPLITS:
            if name == split:
                languages.append(language)
        elif re.match(r"(train|dev|test|valid\w*)\..*tsv$", path.name, re.I):
            say_once(
                f"warning: {path} is not read: a split's file is named train, dev or test, "
                "a language code without a dot and .tsv, as dev.pt-BR.tsv"
            )
    return sorted(languages, key=lambda language: (language != first, language))


def train_language(folder, wanted=None):
    """The source language: the one asked for, else "en" where train has it, else the only one."""
    languages = split_languages(folder, "train")
    if wanted is None and len(languages) > 1 and "en" not in languages:
        raise UserError(
            f"{folder} has train files in {' '.join(languages)}: say which with --train-language"
        )
    language = wanted or next(iter(languages), "en")
    split_path(folder, "train", language)
    return language


def read_labels(folder):
    """The label names of a data set folder, in class-index order."""
    path = Path(folder) / "labels.txt"
    if not path.exists():
        raise UserError(
            f"{folder} is not a data set folder: it has no labels.txt (python data.py --help)"
        )
    labels = text_lines(path.read_bytes(), path)
    while labels and not labels[-1]:  # empty lines at the end
        labels.pop()
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
        raise UserError(
            f"{path}: expected two or more different labels, one a line, got {labels[:8]}"
        )
    return labels


def read_split(folder, split, language, labels):
    """Rows of one split in one language; `labels` are the classes in index order."""
    path = split_path(folder, split, language)
    columns, lines = read_columns(path)
    texts = ["text_a", "text_b"] if "text_a" in columns else ["text"]
    need_columns(columns, [*texts, "label"], path)
    unread = [name for name in columns if name not in (*texts, "label", "group")]
    if unread:
        say_once(f"note: {path}: columns that are not read: {' '.join(unread)}")
    classes = []
    for line, label in zip(lines, columns["label"]):
        classes.append(label_index(label, labels, f"{path}, line {line}"))
    return Rows(columns[texts[0]], columns.get("text_b"), classes, columns.get("group"))


def read_sets(folder, keys, labels, pairs=None):
    """Rows of each (split, language) in `keys`: {key: Rows}. UserError where pairs and texts mix.

    pairs: whether they have to be pairs, where a model knows it.
    """
    sets = {}
    for key in keys:
        rows = read_split(folder, *key, labels)
        are_pairs = rows.text_b is not None
        if pairs is None:
            pairs = are_pairs
        if are_pairs != pairs:
            raise UserError(
                f"{split_path(folder, *key)} holds {kind(are_pairs)}, expected {kind(pairs)}, "
                "as in training"
            )
        sets[key] = rows
    return sets


def kind(pairs):
    """What a file or a model holds, in words."""
    return "pairs (text_a, text_b)" if pairs else "single texts (text)"


def take(rows, count):
    """`count` rows spread evenly over Rows, the same ones in every language; all for None."""
    total = len(rows.text_a)
    if count is None or count >= total:
        return rows
    indices = [i * total // count for i in range(count)]
    columns = []
    for column in rows:
        if column is not None:
            column = [column[i] for i in indices]
        columns.append(column)
    return Rows(*columns)


def group_numbers(rows):
    """Number the groups of Rows in order of appearance: (N,) int64.

    A group is what the column says, else the pairs with one first text, else each row its own.
    """
    names = range(len(rows.text_a))
    if rows.text_b:
        names = rows.text_a
    if rows.groups:
        names = rows.groups
    numbers = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def fingerprint(folder, keys):
    """SHA-256 of the file of each (split, language): {file name: hexadecimal}."""
    return {path.name: sha256(path) for path in sorted(split_path(folder, *key) for key in keys)}


def write_data_set(out, labels, tables):
    """Write a data set folder; tables: {(split, language): Table}."""
    if len(labels) < 2:
        raise UserError(f"train has the labels {labels}, expected two or more")
    out = Path(out)
    others = {path.name for path in out.glob("*.*.tsv")} - {split_name(*key) for key in tables}
    if others:
        raise UserError(
            f"{out} holds another data set ({min(others)}): give another --out, or delete it"
        )
    write_text(out / "labels.txt", "\n".join(labels) + "\n")
    sources = {}
    for key, (header, rows, source) in tables.items():
        path = out / split_name(*key)
        write_columns(path, dict(zip(header, zip(*rows))))
        sources[path.name] = {**source, "sha256": sha256(path), "rows": len(rows)}
        print(f"{path}: {len(rows):,} rows")
    write_json(out / "sources.json", sources)


# --- tokens and batches --------------------------------------------------------------------------


def load_tokenizer(name):
    """The model's own fast tokenizer. UserError when it cannot be had, or does not mark texts."""
    folder = model_folder(name, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        why = "it has no vocabulary (tokenizer.json or vocab.txt)"  # transformers makes one up
    except (OSError, ValueError, KeyError, ImportError) as error:
        tokenizer = None
        why = first_line(error)
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"no tokenizer can be loaded from {str(name)!r}: {why}")
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {str(name)!r} is not a fast one with a padding token")
    single = tokenizer.num_special_tokens_to_add(pair=False)
    pair = tokenizer.num_special_tokens_to_add(pair=True)
    if single < 2 or pair < 3:
        raise UserError(
            f"the tokenizer of {str(name)!r} puts {single} special tokens around a text and {pair} "
            "around two, expected one before, between and after: give its tokenizer.json a "
            "post_processor that does so"
        )
    # a cased model's vocabulary, read lower-cased
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None and normalizer.normalize_str("A") == "a":
        cased = [piece for piece in tokenizer.get_vocab() if re.fullmatch("[A-Z][a-z]+", piece)]
        if cased:
            say_once(
                f"warning: the tokenizer of {str(name)!r} puts texts into lower case, but its "
                f"vocabulary has {len(cased):,} words with a capital, as {min(cased)}: for a cased "
                'model, put {"do_lower_case": false} into its tokenizer_config.json'
            )
    return tokenizer


def tokenizer_identity(tokenizer):
    """SHA-256 of all that a tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def plain_texts(texts, tokenizer):
    """Texts of which no part is a special token: a text's own "[SEP]" or "<s>" becomes "[ SEP]".

    The space does what split_special_tokens=True does for word pieces, and also where that fails:
    XLM-R's vocabulary has the word piece "<s>". Texts without such tokens stay as they are.
    """
    everything = "\n".join(texts)
    for token in tokenizer.special_tokens_map.values():
        if isinstance(token, str) and token in everything:
            texts = [text.replace(token, f"{token[0]} {token[1:]}") for text in texts]
    return texts


def encode(tokenizer, rows, max_length=128, chunk=8192):
    """Tokenise Rows with the model's own fast tokenizer, pairs as pairs, cutting the longer first.

    Returns Encoded; rows without labels get class -1. `max_length` is in tokens, the special ones
    included. What reads like a special token in a text is text.
    """
    ids, second = [], []
    for start in range(0, len(rows.text_a), chunk):
        text_a = plain_texts(rows.text_a[start : start + chunk], tokenizer)
        text_b = None
        if rows.text_b:
            text_b = plain_texts(rows.text_b[start : start + chunk], tokenizer)
        tokens = tokenizer(
            text_a,
            text_b,
            max_length=max_length,
            truncation="longest_first",
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        ids += [np.array(row, dtype=np.int32) for row in tokens["input_ids"]]
        # types are 0 ... 0 1 ... 1, or 0 throughout: where the first 1 stands, or the end
        second += [len(types) - sum(types) for types in tokens["token_type_ids"]]
    tokenizer.backend_tokenizer.no_truncation()  # it would be saved with the model
    flat = np.concatenate(ids)
    unknown = np.mean(flat == tokenizer.unk_token_id)
    if unknown > 0.1:
        print(f"warning: {unknown:.0%} of the tokens are unknown to the tokenizer", file=sys.stderr)
    labels = rows.labels
    if labels is None:
        labels = [-1] * len(ids)
    return Encoded(
        flat,
        np.cumsum([0, *map(len, ids)]),
        np.array(second, dtype=np.int32),
        np.array(labels, dtype=np.int64),
    )


def train_batches(lengths, size, seed, epoch):
    """One epoch's batches: rows of one rounded length together, from (seed, epoch) alone.

    lengths (N,) in tokens -> list of index arrays of `size` rows (one may be shorter), every row
    once. Rounding to a multiple of 8 is then nearly all the padding there is, and there are few
    shapes. Rows of one length, and batches, come in random order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    order = order[np.argsort(round_up(lengths[order]), kind="stable")]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def round_up(lengths, multiple=8):
    """Lengths in tokens as they are padded, so that there are few shapes."""
    return -(-lengths // multiple) * multiple


def sorted_batches(lengths, size, window=1 << 15):
    """Batches for evaluation and extraction, by falling length, of `size` * 24 tokens at most.

    Padding counts, so that memory and the size of a matrix product are the same for short and for
    long texts. Rows are sorted within windows, so that what is written of them lies together in the
    files.
    """
    batches, tokens = [], size * 24
    for first in range(0, len(lengths), window):
        order = first + np.argsort(-lengths[first : first + window], kind="stable")
        widths = round_up(lengths[order])
        start = 0
        while start < len(order):
            count = max(1, tokens // widths[start])  # the widest comes first
            batches.append(order[start : start + count])
            start += count
    return batches


def collate(encoded, rows, pad_id, limit):
    """Pad some rows of an Encoded to a multiple of 8 tokens, at most to `limit`, encode()'s own.

    rows: (B,) indices. Returns NumPy arrays input_ids, attention_mask (1: a token) and
    token_type_ids, each (B, T) int64, and labels (B,) int64.
    """
    starts = encoded.starts[rows]
    lengths = encoded.starts[rows + 1] - starts
    columns = np.arange(min(round_up(lengths.max()), limit))
    mask = columns < lengths[:, None]  # (B, T)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = encoded.ids[(starts[:, None] + columns)[mask]]
    types = mask & (columns >= encoded.second[rows][:, None])
    return {
        "input_ids": ids,
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": types.astype(np.int64),
        "labels": encoded.labels[rows],
    }


def eval_batches(encoded, pad_id, limit, size=64):
    """Yield this process's share of sorted_batches(): what collate() gives, and `rows`, (B,)."""
    rank, world = start_processes()
    for rows in sorted_batches(encoded.lengths, size)[rank::world]:
        yield {**collate(encoded, rows, pad_id, limit), "rows": rows}


# --- the commands --------------------------------------------------------------------------------


def check(folder, model=None, max_length=128):
    """Print what a data set folder holds and what is odd about it."""
    labels = read_labels(folder)
    keys = [(split, language) for split in SPLITS for language in split_languages(folder, split)]
    if not keys:
        raise UserError(f"{folder} has no train, dev or test file")
    header = ["file", "rows", "groups", "smallest", "largest", "twice", "in train"]
    legend = (
        "groups: of rows that belong together; smallest, largest: the class of the fewest and the\n"
        "most rows; twice: rows that are there again; in train: rows whose text is in train"
    )
    if model:
        tokenizer = load_tokenizer(model)
        header += ["tokens", "unknown", "cut"]
        legend += f";\ncut: longer than {max_length} tokens"
    table, train, first = [], set(), {}
    for (split, language), rows in read_sets(folder, keys, labels).items():
        texts = rows.text_a
        if rows.text_b:
            texts = list(zip(rows.text_a, rows.text_b))
        share = np.bincount(rows.labels, minlength=len(labels)) / len(texts)
        line = [f"{split}.{language}", f"{len(texts):,}", f"{group_numbers(rows).max() + 1:,}"]
        line += [f"{share.min():.1%}", f"{share.max():.1%}", f"{len(texts) - len(set(texts)):,}"]
        if split == "train":
            train.update(texts)
            line.append("")
        else:
            line.append(f"{sum(text in train for text in texts):,}")
        if model:
            encoded = encode(tokenizer, rows, max_length=1 << 20)
            unknown = np.mean(encoded.ids == tokenizer.unk_token_id)
            cut = np.mean(encoded.lengths > max_length)
            line += [f"{encoded.lengths.mean():.1f}", f"{unknown:.2%}", f"{cut:.1%}"]
        table.append(line)
        other, expected = first.setdefault(split, (language, rows.labels))
        if split != "train" and rows.labels != expected:
            legend += (
                f"\nnote: {split}.{language} is not row-parallel with {split}.{other}: "
                "no mean over languages will be compared"
            )
    names = " ".join(labels[:8])
    if len(labels) > 8:
        names += " ..."
    print(f"{folder}: {len(labels)} labels: {names}\n")
    print(f"{markdown_table(header, table)}\n\n{legend}")


def language_file(text):
    """A type for argparse: LANG=FILE."""
    language, _, path = text.partition("=")
    if not LANGUAGE.fullmatch(language) or not path:
        raise argparse.ArgumentTypeError(f"{text!r}, expected LANG=FILE, as de=tickets.csv")
    return language, path


def parse_args(argv):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    xnli = commands.add_parser("xnli", help="fetch and convert XNLI", allow_abbrev=False)
    massive = commands.add_parser("massive", help="fetch and convert MASSIVE", allow_abbrev=False)
    own = commands.add_parser("own", help="convert your own tables", allow_abbrev=False)
    for command in (xnli, massive, own):
        command.add_argument("--out", required=True, help="data set folder to write")
    for command, languages in (xnli, "en zh es de ar ur"), (massive, "en de es fr zh"):
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
            help=f"languages of dev and test (default: {languages})",
        )
        command.add_argument(
            "--train-languages",
            nargs="+",
            metavar="LANG",
            help="languages of train (default: English)",
        )
    massive.add_argument(
        "--intents",
        type=in_range(int, 0),
        default=4,
        help="keep the N most frequent intents of English train (default: 4; 0: all 60)",
    )
    massive.add_argument(
        "--balance",
        action="store_true",
        help="repeat train rows of the smaller classes until all are equal, as the paper did",
    )
    for split in SPLITS:
        own.add_argument(
            f"--{split}",
            nargs="+",
            type=language_file,
            default=[],
            required=split == "train",
            metavar="LANG=FILE",
            help=f"tables that make {split}: .csv, .jsonl or .tsv",
        )
    own.add_argument("--text", required=True, metavar="COLUMN", help="column of the text")
    own.add_argument("--text-b", metavar="COLUMN", help="column of the second text, for pairs")
    own.add_argument("--label", required=True, metavar="COLUMN", help="column of the label")
    own.add_argument(
        "--group", metavar="COLUMN", help="column that names rows that belong together"
    )
    own.add_argument(
        "--hold-out",
        type=in_range(float, 0, below=1),
        default=0.1,
        metavar="SHARE",
        help="of a language's train rows that become its dev, where it has none (default: 0.1)",
    )
    for command in (massive, own):
        command.add_argument(
            "--seed", type=in_range(int, 0), default=0, help="of what is drawn (default: 0)"
        )
    command = commands.add_parser(
        "check", help="print what a data set folder holds and what is odd", allow_abbrev=False
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
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.command == "xnli":
        train_languages = args.train_languages or [english(args.languages)]
        paths = [find_archive(url, args.archives, args.out) for url in (XNLI_URL, XNLI_MT_URL)]
        write_data_set(args.out, XNLI_LABELS, read_xnli(*paths, args.languages, train_languages))
    elif args.command == "massive":
        train_languages = args.train_languages or [english(args.languages)]
        path = find_archive(MASSIVE_URL, args.archives, args.out)
        labels, tables = read_massive(
            path, args.languages, train_languages, args.intents, args.balance, args.seed
        )
        write_data_set(args.out, labels, tables)
    elif args.command == "own":
        names = {"text": args.text, "label": args.label}
        if args.text_b:
            names = {"text_a": args.text, "text_b": args.text_b, "label": args.label}
        if args.group:
            names["group"] = args.group
        files = {"train": args.train, "dev": args.dev, "test": args.test}
        labels, tables = read_own(files, names, args.hold_out, args.seed)
        write_data_set(args.out, labels, tables)
        check(args.out)
    else:
        check(args.folder, args.model, args.max_length)


if __name__ == "__main__":
    cli(main)
