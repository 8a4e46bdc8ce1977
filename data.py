"""The data sets: read and check their files, tokenise rows, put them in batches; run as a script, make them.

    python data.py xnli    --out data/xnli                  # MultiNLI in English to train, XNLI to test
    python data.py massive --out data/massive --intents 4   # the stand-in for the paper's in-house intents
    python data.py check   data/xnli --model bert-base-multilingual-uncased

The commands are in convert.py, which says what they read and write.
Paper   section 1.3.
"""
import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import UserError, cli, sha256, write_atomic

SPLITS = ("train", "dev", "test")
MAX_LINE = 1 << 20  # bytes; a longer line is a broken file, not a text


class Rows(NamedTuple):
    """One split in one language: N texts, or pairs of texts, and N class indices (None where there are no labels)."""
    text_a: list
    text_b: list | None
    labels: list | None

    def columns(self, labels):
        """The columns of its file, {name: N texts}; `labels` names the classes."""
        texts = {"text": self.text_a} if self.text_b is None else {"text_a": self.text_a, "text_b": self.text_b}
        return texts if self.labels is None else texts | {"label": [labels[i] for i in self.labels]}


class Encoded(NamedTuple):
    """N tokenised rows end to end: row i is ids[starts[i]:starts[i + 1]], its second text begins at second[i]."""
    ids: np.ndarray     # (all tokens,) int32
    starts: np.ndarray  # (N + 1,) int64
    second: np.ndarray  # (N,) int32
    labels: np.ndarray  # (N,) int64

    @property
    def lengths(self):
        """Tokens of each row, the special ones included: (N,)."""
        return np.diff(self.starts)


# --- the folder format -------------------------------------------------------------------------------------------

def text_lines(stream, name):
    """Yield (line number, text) from a binary stream. UserError for a line that is too long or not UTF-8."""
    number = 0
    while raw := stream.readline(MAX_LINE):
        number += 1
        if len(raw) == MAX_LINE:
            raise UserError(f"{name}, line {number}: longer than {MAX_LINE:,} bytes")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: "
                            f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start})") from None


def table_lines(stream, name):
    """Yield a tab-separated table's header (a list), then (line number, cells). UserError for a ragged row."""
    header = None
    for number, line in text_lines(stream, name):
        cells = line.split("\t")
        if header is None:
            yield (header := cells)
        elif len(cells) != len(header):
            raise UserError(f"{name}, line {number}: {len(cells)} columns, expected {len(header)} "
                            f"({', '.join(header[:4])}{', ...' * (len(header) > 4)})")
        else:
            yield number, cells
    if header is None:
        raise UserError(f"{name} is empty")


def label_index(label, labels, where):
    """The class index of a label. UserError names the place, the value and what is allowed."""
    try:
        return labels.index(label)
    except ValueError:
        shown = ", ".join(labels[:8]) + ", ..." * (len(labels) > 8)
        raise UserError(f"{where}: unknown label {label[:60]!r}, expected one of {shown}") from None


def read_labels(folder):
    """The label names of a data set folder, in class-index order."""
    path = Path(folder) / "labels.txt"
    if not path.is_file():
        raise UserError(f"{folder} is not a data set folder: it has no labels.txt (python data.py --help)")
    with open(path, "rb") as file:
        labels = [line for _, line in text_lines(file, path)]
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
        raise UserError(f"{path}: expected two or more different labels, one a line, got {labels[:8]}")
    return labels


def read_table(path, labels=None):
    """Read a .tsv file of texts or pairs; `labels` (class-index order) are needed where it has a label column.

    Returns Rows. UserError names the file, the line and what was expected.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    with open(path, "rb") as file:
        lines = table_lines(file, path)
        header = next(lines)
        texts = [name for name in header if name != "label"]
        if texts not in (["text"], ["text_a", "text_b"]) or header not in (texts, texts + ["label"]):
            raise UserError(f"{path}, line 1: the header is {header[:6]}, "
                            "expected text or text_a, text_b, then label, separated by tabs")
        columns, indices = [[] for _ in texts], []
        for number, cells in lines:
            for column, cell in zip(columns, cells):
                column.append(cell)
            if "label" in header:
                indices.append(label_index(cells[-1], labels, f"{path}, line {number}"))
    if not columns[0]:
        raise UserError(f"{path} holds a header and no rows")
    return Rows(columns[0], columns[1] if len(texts) == 2 else None, indices if "label" in header else None)


def write_table(path, columns):
    """Write {header: N texts} as a .tsv file."""
    with write_atomic(path) as file:
        file.writelines("\t".join(cells) + "\n" for cells in zip(*([name, *texts] for name, texts in columns.items())))


def split_path(folder, split, language):
    """The file of one split in one language. UserError lists the languages there are when that one is not."""
    path = Path(folder) / f"{split}.{language}.tsv"
    if not path.is_file():
        there = split_languages(folder, split)
        raise UserError(f"{path} does not exist; {split} is there in: {' '.join(there) or 'no language'}")
    return path


def read_split(folder, split, language, labels):
    """Rows of one split in one language."""
    path = split_path(folder, split, language)
    rows = read_table(path, labels)
    if rows.labels is None:
        raise UserError(f"{path}, line 1: no label column")
    return rows


def split_languages(folder, split):
    """The languages a split is there in: English first, then by name."""
    found = [path.name.split(".")[1] for path in Path(folder).glob(f"{split}.*.tsv") if path.name.count(".") == 2]
    return sorted(found, key=lambda language: (language != "en", language))


def check_rows(rows, folder, split):
    """UserError unless the languages of {language: Rows} have the same classes row by row, as translations have."""
    (first, expected), *others = rows.items()
    for language, found in others:
        if found.labels != expected.labels:
            raise UserError(f"{split_path(folder, split, language)} is not row by row what {split}.{first}.tsv is: "
                            "the rows' labels differ, so systems cannot be compared on the same rows")


def take(rows, count):
    """`count` rows spread evenly over Rows, the same ones in every language; all when there are fewer, or for None."""
    total = len(rows.text_a)
    if count is None or count >= total:
        return rows
    return Rows(*(column and [column[i * total // count] for i in range(count)] for column in rows))


def fingerprint(folder, files):
    """SHA-256 of each named file of a data set folder: {name: hexadecimal}."""
    return {name: sha256(Path(folder) / name) for name in sorted(files)}


# --- tokens and batches ------------------------------------------------------------------------------------------

def encode(tokenizer, rows, max_length=128, chunk=8192):
    """Tokenise Rows with the model's own fast tokenizer, pairs as pairs, cutting the longer text first.

    Returns Encoded; rows without labels get class -1. `max_length` is in tokens, the special ones included.
    """
    ids, lengths, second = [], [], []
    for start in range(0, len(rows.text_a), chunk):
        part = slice(start, start + chunk)
        tokens = tokenizer(rows.text_a[part], rows.text_b[part] if rows.text_b else None, max_length=max_length,
                           truncation="longest_first", return_attention_mask=False, return_token_type_ids=True)
        ids += [np.array(row, dtype=np.int32) for row in tokens["input_ids"]]
        lengths += [len(row) for row in tokens["input_ids"]]
        second += [len(types) - sum(types) for types in tokens["token_type_ids"]]
    ids = np.concatenate(ids)
    if np.mean(ids == tokenizer.unk_token_id) > 0.1:
        print(f"warning: {np.mean(ids == tokenizer.unk_token_id):.0%} of the tokens are unknown to the tokenizer",
              file=sys.stderr)
    labels = rows.labels if rows.labels is not None else [-1] * len(lengths)
    return Encoded(ids, np.concatenate([[0], np.cumsum(lengths)]), np.array(second, dtype=np.int32),
                   np.array(labels, dtype=np.int64))


def encode_split(tokenizer, identity, folder, split, language, labels, max_length=128, limit=None):
    """read_split(), take() and encode() in one: Encoded, kept in FOLDER/.tokens/ for the next time.

    `identity` (a string) tells the tokenizer from another. What is kept belongs to these very bytes of the file.
    """
    parts = [identity, sha256(split_path(folder, split, language)), labels, max_length, limit]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    kept = Path(folder) / ".tokens" / f"{split}.{language}.{key[:16]}.npz"
    with contextlib.suppress(Exception):  # not there, or damaged: it is made anew
        with np.load(kept) as arrays:
            encoded = Encoded(*(arrays[name] for name in Encoded._fields))
        if len(encoded.ids) == encoded.starts[-1] and len(encoded.labels) == len(encoded.second) \
                == len(encoded.starts) - 1 and 0 <= encoded.ids.min() <= encoded.ids.max() < len(tokenizer):
            return encoded
    encoded = encode(tokenizer, take(read_split(folder, split, language, labels), limit), max_length)
    try:
        with write_atomic(kept, "wb") as file:
            np.savez(file, **encoded._asdict())
    except OSError as error:
        print(f"note: the token ids are not kept for the next time ({error})", file=sys.stderr)
    return encoded


def train_batches(lengths, size, seed, epoch, multiple=8):
    """One epoch's batches: random rows of one rounded length together, in random order, from (seed, epoch) alone.

    lengths (N,) in tokens -> list of index arrays of `size` rows (one may be shorter), every row once.
    Rounding to a multiple of 8 is then nearly all the padding there is, and there are few shapes.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    order = order[np.argsort(-(-lengths[order] // multiple), kind="stable")]
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def sorted_batches(lengths, size, multiple=8, tokens=24, window=1 << 15):
    """Batches for evaluation and extraction, by falling length: as many rows of one rounded length as hold `size` times
    `tokens` tokens. So memory and the size of a matrix product are the same for short and for long texts.

    Rows are sorted within windows, so that what is written of them lies together in the files.
    """
    batches = []
    for first in range(0, len(lengths), window):
        order = first + np.argsort(-lengths[first:first + window], kind="stable")
        widths, start = -(-lengths[order] // multiple) * multiple, 0
        while start < len(order):
            batches.append(order[start:start + max(1, size * tokens // widths[start])])
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
    mask = columns < lengths[:, None]                                               # (B, T)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = encoded.ids[(encoded.starts[rows][:, None] + columns)[mask]]
    types = mask & (columns >= encoded.second[rows][:, None])
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": types.astype(np.int64),
            "labels": encoded.labels[rows]}


def main(argv=None):
    import convert  # not at the top: it imports this file
    return convert.main(argv)


if __name__ == "__main__":
    cli(main)
