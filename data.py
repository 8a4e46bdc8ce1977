"""The data set: fetch and convert the published archives, check a folder; read its rows, tokenise them, batch them.

    python data.py xnli    --out data/xnli                  # MultiNLI in English to train, XNLI to test
    python data.py massive --out data/massive --intents 4   # the stand-in for the paper's in-house intents
    python data.py check   data/xnli --model bert-base-multilingual-uncased

Reads   the archives, downloaded to OUT/../archives or taken from --archives; any data set folder; a model's tokenizer.
Writes  OUT/labels.txt, OUT/{train,dev,test}.LANG.tsv, OUT/sources.json (formats: README).
Paper   section 1.3.
"""
import argparse
import functools
import hashlib
import http.client
import io
import json
import re
import sys
import tarfile
import unicodedata
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import AutoTokenizer

from common import (UserError, check_model_name, cli, first_line, in_range, progress_bar, sha256, start_processes,
                    write_atomic, write_json)

SPLITS = ("train", "dev", "test")
MAX_LINE = 1 << 20  # bytes; a longer line is a broken file, not a text
XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip"
XNLI_MT_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip"
MASSIVE_URL = "https://amazon-massive-nlu-dataset.s3.amazonaws.com/amazon-massive-dataset-1.0.tar.gz"
XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
XNLI_LABELS = ["entailment", "neutral", "contradiction"]
XNLI_ROWS = {"train": 392_702, "dev": 2_490, "test": 5_010}
MASSIVE_ROWS = {"train": 11_514, "dev": 2_033, "test": 2_974}


class Rows(NamedTuple):
    """One split in one language: N texts, or pairs of texts, and N class indices (None without labels, -1 unknown)."""
    text_a: list
    text_b: list | None
    labels: list | None


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
    if label in labels:
        return labels.index(label)

    def look(text):
        return unicodedata.normalize("NFKC", text).strip().casefold()

    show = ascii if look(label) in map(look, labels) else repr  # two that print alike are shown as code points
    raise UserError(f"{where}: unknown label {show(label[:60])}, expected one of "
                    + ", ".join(show(known) if show is ascii else known for known in labels[:8])
                    + ", ..." * (len(labels) > 8))


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
        if not set(texts) <= set(header) or {"text", "text_a"} <= set(header) or len(set(header)) < len(header):
            raise UserError(f"{path}, line 1: the header is {header[:6]}, expected text, or text_a and text_b, "
                            "and label, separated by tabs")
        rows = [(number, *cells) for number, cells in lines]
    if not rows:
        raise UserError(f"{path} holds a header and no rows")
    numbers, *cells = map(list, zip(*rows))
    columns = dict(zip(header, cells))
    classes = columns.get("label") and [-1 if unknown and not label else
                                        label_index(label, labels, f"{path}, line {number}")
                                        for number, label in zip(numbers, columns["label"])]
    return Rows(columns[texts[0]], columns[texts[1]] if len(texts) == 2 else None, classes), columns


def write_table(path, columns):
    """Write {header: N texts} as a .tsv file."""
    with write_atomic(path) as file:
        file.writelines("\t".join(cells) + "\n" for cells in zip(*([name, *texts] for name, texts in columns.items())))


@functools.cache
def say_once(sentence):
    print(sentence, file=sys.stderr)


def split_languages(folder, split, first="en"):
    """The languages a split is there in: `first` first, then by name. Warns of files that look like one and are not."""
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else []:
        if match := re.fullmatch(rf"{split}\.([A-Za-z0-9_-]+)\.tsv", path.name):
            found.append(match[1])
        elif re.match(r"(train|dev|test|valid\w*)\..*tsv$", path.name, re.I) and not re.fullmatch(
                rf"({'|'.join(SPLITS)})\.[A-Za-z0-9_-]+\.tsv", path.name):
            say_once(f"warning: {path} is not read: a split's file is named train, dev or test, a language code without "
                     "a dot and .tsv, as dev.pt-BR.tsv")
    return sorted(found, key=lambda language: (language != first, language))


def train_language(folder, wanted=None):
    """The source language: the one asked for, else "en" where there is a train.en, else the only one there is."""
    there = split_languages(folder, "train")
    if wanted is None and len(there) > 1 and "en" not in there:
        raise UserError(f"{folder} has train files in {' '.join(there)}: say which with --train-language")
    wanted = wanted or (there[0] if there else "en")
    split_path(folder, "train", wanted)
    return wanted


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
    rows, columns = read_table(path, labels)
    if rows.labels is None:
        raise UserError(f"{path}, line 1: no label column")
    if more := [name for name in columns if name not in ("text", "text_a", "text_b", "label")]:
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
            raise UserError(f"{split_path(folder, *key)} holds {kind(rows.text_b is not None)}, "
                            f"expected {kind(pairs)}, as in training")
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


def fingerprint(folder, keys):
    """SHA-256 of the file of each (split, language): {file name: hexadecimal}."""
    return {path.name: sha256(path) for path in sorted(split_path(folder, *key) for key in keys)}


# --- tokens and batches ------------------------------------------------------------------------------------------

def load_tokenizer(name):
    """The model's own fast tokenizer. UserError when it cannot be had, or does not mark where texts begin and end."""
    check_model_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"no tokenizer can be loaded from {str(name)!r}: {first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {str(name)!r} is not a fast one with a padding token")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one up where files are missing
        raise UserError(f"no tokenizer can be loaded from {str(name)!r}: "
                        "it has no vocabulary (tokenizer.json or vocab.txt)")
    for texts in (["a"], ["a"], ["b"]), ([""], [""], [""]):
        one, pair = (tokenizer(*part)["input_ids"][0] for part in (texts[:1], texts[1:]))
        marks = [token in tokenizer.all_special_ids for token in pair]
        if len(one) < 2 or not {one[0], one[-1]} <= set(tokenizer.all_special_ids) or sum(marks) < 3 or not (
                marks[0] and marks[-1]):
            raise UserError(f"the tokenizer of {str(name)!r} does not put a special token before a text, between two and "
                            f"after them (it gives {tokenizer.convert_ids_to_tokens(pair)} for {texts[1:]}): give its "
                            "tokenizer.json a post_processor that does")
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
        tokens = tokenizer(rows.text_a[part], rows.text_b[part] if rows.text_b else None, max_length=max_length,
                           truncation="longest_first", return_attention_mask=False, return_token_type_ids=True)
        ids += [np.array(row, dtype=np.int32) for row in tokens["input_ids"]]
        second += [len(types) - sum(types) for types in tokens["token_type_ids"]]
    tokenizer.backend_tokenizer.no_truncation()  # which tokenising leaves on: it would be saved with the model
    flat = np.concatenate(ids)
    if np.mean(flat == tokenizer.unk_token_id) > 0.1:
        print(f"warning: {np.mean(flat == tokenizer.unk_token_id):.0%} of the tokens are unknown to the tokenizer",
              file=sys.stderr)
    labels = rows.labels if rows.labels is not None else [-1] * len(ids)
    return Encoded(flat, np.cumsum([0, *map(len, ids)]), np.array(second, dtype=np.int32),
                   np.array(labels, dtype=np.int64))


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


def eval_batches(encoded, pad_id, limit, size=64):
    """Yield the batches of sorted_batches(), of which each process of torchrun has its share: those of collate(), and
    `rows`, (B,), which they are of."""
    rank, world = start_processes()
    for rows in sorted_batches(encoded.lengths, size)[rank::world]:
        yield {**collate(encoded, rows, pad_id, limit), "rows": rows}


# --- archives ----------------------------------------------------------------------------------------------------

def find_archive(url, folder, out):
    """The path of an archive: in --archives when given, else downloaded beside the data set once."""
    path = Path(folder or Path(out).parent / "archives") / url.rsplit("/", 1)[1]
    if not path.is_file():
        if folder:
            raise UserError(f"{path} does not exist (--archives); it can be had from {url}")
        try:
            with (urllib.request.urlopen(url, timeout=60) as response, write_atomic(path, "wb") as file,
                  progress_bar(total=response.length, desc=path.name, unit="B", unit_scale=True) as bar):
                while block := response.read(1 << 20):
                    bar.update(file.write(block))
                if response.length:  # counted down as it is read, and short of 0 is no error to urllib or torch.hub
                    raise OSError(f"it ended {response.length:,} bytes too early")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url}: {error}; or fetch the file yourself and give its folder with --archives") from None
    return path


def read_archive(path, wanted):
    """Yield the members of a .zip or .tar.gz whose names match `wanted`, a regular expression: (name, bytes)."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as opened:
                for name in filter(re.compile(wanted).fullmatch, opened.namelist()):
                    yield name, opened.read(name)
        else:
            with tarfile.open(path) as opened:
                for info in opened:
                    if info.isfile() and re.fullmatch(wanted, info.name):
                        yield info.name, opened.extractfile(info).read()
                while opened.fileobj.read(1 << 20):  # to the very end: gzip's checksum is there
                    pass
    except PermissionError:
        raise
    except Exception as error:  # nothing but zipfile and tarfile runs here; a wrong byte can surface as any error
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{path} is damaged or cut short ({reason}): delete it and fetch it again") from None


def pick_columns(content, name, columns):
    """Yield (line number, the named cells, clean) of a table in bytes. UserError when a column is missing."""
    lines = table_lines(io.BytesIO(content), name)
    header = next(lines)
    if missing := [column for column in columns if column not in header]:
        raise UserError(f"{name}, line 1: no column {missing[0]!r} in {header[:19]}")
    where = [header.index(column) for column in columns]
    for number, cells in lines:
        yield number, [clean(cells[i]) for i in where]


def clean(text):
    """Text for one cell: tabs and line breaks become spaces, all else stays."""
    return re.sub(r"[\t\r\n]", " ", text)


def read_xnli(path, path_mt, languages, train_languages):
    """The XNLI archives -> {(split, language): Rows}, {(split, language): where it came from}."""
    data, sources = {}, {}
    members = {f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv": language for language in train_languages}
    for member, content in read_archive(path_mt, "|".join(map(re.escape, members))):
        rows = data["train", members[member]] = Rows([], [], [])
        for number, (premise, hypo, label) in pick_columns(content, f"{path_mt}:{member}", ["premise", "hypo", "label"]):
            label = "contradiction" if label == "contradictory" else label
            add_pair(rows, premise, hypo, label, f"{path_mt}:{member}, line {number}")
        if not rows.labels:
            raise UserError(f"{path_mt}:{member} holds a header and no rows")
        sources["train", members[member]] = {"archive": path_mt.name, "member": member}
    columns, found = ["language", "gold_label", "sentence1", "sentence2", "pairID"], set()
    for member, content in read_archive(path, r"XNLI-1\.0/xnli\.(dev|test)\.tsv"):
        found.add(member)
        split, pairs = member.split(".")[-2], {}
        for language in languages:
            data[split, language] = Rows([], [], [])
            sources[split, language] = {"archive": path.name, "member": member}
        for number, (language, label, premise, hypothesis, pair) in pick_columns(content, f"{path}:{member}", columns):
            if language in languages:
                add_pair(data[split, language], premise, hypothesis, label, f"{path}:{member}, line {number}")
                pairs.setdefault(language, []).append(pair)
        check_parallel(pairs, f"{path}:{member}", languages)
    for archive, member in [(path_mt, member) for member, language in members.items() if ("train", language) not in data] \
            + [(path, f"XNLI-1.0/xnli.{split}.tsv") for split in ("dev", "test") if not any(key[0] == split for key in data)]:
        raise UserError(f"{archive} has no member {member}")
    return data, sources


def add_pair(rows, premise, hypothesis, label, where):
    rows.text_a.append(premise)
    rows.text_b.append(hypothesis)
    rows.labels.append(label_index(label, XNLI_LABELS, where))


def massive_locale(language):
    """A regular expression for MASSIVE's locales of a language code: zh is zh-CN, de any de-*, pt-PT itself alone."""
    language = language.replace("_", "-")
    return "zh-CN" if language == "zh" else language if "-" in language else f"{language}-[A-Z]{{2}}"


def read_massive(path, languages, train_languages, intents, balance, seed):
    """The MASSIVE archive -> label names, {(split, language): Rows}, {(split, language): where it came from}.

    The most frequent `intents` (0: all) of English train are kept, whatever the languages.
    """
    records, members, english = {}, {}, next((l for l in languages if l.startswith("en")), "en")
    languages = list(dict.fromkeys([english, *languages]))
    for member, content in read_archive(path, rf"1\.0/data/({'|'.join(map(massive_locale, languages))})\.jsonl"):
        language = next(l for l in languages if re.fullmatch(rf"1\.0/data/{massive_locale(l)}\.jsonl", member))
        rows = records[language] = {split: [] for split in SPLITS}
        members[language] = member
        for number, line in text_lines(io.BytesIO(content), f"{path}:{member}"):
            try:
                record = json.loads(line)
                (record["intent"] + record["utt"]).encode("utf-8")  # half of a surrogate pair is an error
                rows[record["partition"]].append((str(record["id"]), record["intent"], clean(record["utt"])))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{path}:{member}, line {number}: expected a JSON object with id, partition "
                                f"(train, dev or test), intent and utt ({error!r})") from None
    for language in languages:
        if language not in records:
            raise UserError(f"{path} has no member 1.0/data/{language}{'' if '-' in language else '-*'}.jsonl")
        for split in SPLITS:
            check_parallel({tongue: [row[:2] for row in records[tongue][split]] for tongue in (english, language)},
                           f"{path}:{members[language]}, partition {split}", [language])
            warn_count(members[language], split, len(records[language][split]), MASSIVE_ROWS)
    counts = Counter(intent for _, intent, _ in records[english]["train"])
    labels = sorted(sorted(counts, key=lambda intent: (-counts[intent], intent))[:intents or None])
    if len(labels) < 2:
        raise UserError(f"{path}:{members[english]}: {len(labels)} intents in the train partition, expected two or more")
    data, sources = {}, {}
    for language in languages:
        for split in SPLITS if language in train_languages else SPLITS[1:]:
            kept = [(labels.index(intent), text) for _, intent, text in records[language][split] if intent in labels]
            if split == "train" and balance:
                kept = balanced(kept, seed)
            data[split, language] = Rows([text for _, text in kept], None, [label for label, _ in kept])
            sources[split, language] = {"archive": path.name, "member": members[language]}
    return labels, data, sources


def balanced(rows, seed):
    """Repeat (label, text) rows of the smaller classes until all are as large as the largest (paper section 1.3)."""
    random = np.random.default_rng(seed)
    largest = max(Counter(label for label, _ in rows).values())
    for label in sorted({label for label, _ in rows}):
        mine = [row for row in rows if row[0] == label]
        rows = rows + [mine[i] for i in random.permutation(np.arange(largest - len(mine)) % len(mine))]
    return rows


def check_parallel(ids, where, languages):
    """UserError unless each language's row ids are the first language's."""
    first, *rest = [(language, ids.get(language, [])) for language in dict.fromkeys([*ids, *languages])]
    for language, mine in [first, *rest]:
        if not mine:
            raise UserError(f"{where} has no rows for the language {language!r}")
        if mine != first[1]:
            at = next((i for i, (a, b) in enumerate(zip(mine, first[1])) if a != b), min(len(mine), len(first[1])))
            raise UserError(f"{where}: {language} is not row-parallel with {first[0]}: they differ at row {at + 1} of "
                            f"{len(mine)} and {len(first[1])}")


def warn_count(name, split, rows, published):
    if rows != published.get(split, rows):
        print(f"warning: {name} has {rows:,} rows where the published {split} set has {published[split]:,}",
              file=sys.stderr)


def write_data_set(out, labels, data, sources, published):
    """Write a data set folder, and warn where a row count is not the published one."""
    out = Path(out)
    names = {key: f"{key[0]}.{key[1]}.tsv" for key in data}
    others = sorted({path.name for path in out.glob("*.*.tsv")} - set(names.values())) if out.is_dir() else []
    if others or (out / "labels.txt").is_file() and read_labels(out) != labels:
        raise UserError(f"{out} holds another data set ({others[0] if others else 'other labels'}): "
                        "give another --out, or delete it")
    with write_atomic(out / "labels.txt") as file:
        file.write("".join(f"{label}\n" for label in labels))
    for key, name in names.items():
        rows = data[key]
        texts = {"text": rows.text_a} if rows.text_b is None else {"text_a": rows.text_a, "text_b": rows.text_b}
        write_table(out / name, texts | {"label": [labels[i] for i in rows.labels]})
        sources[key] |= {"sha256": sha256(out / name), "rows": len(rows.labels)}
        print(f"{out / name}: {len(rows.labels):,} rows")
        warn_count(name, key[0], len(rows.labels), published)
    write_json(out / "sources.json", {names[key]: sources[key] for key in data})


def check(folder, model=None, max_length=128):
    """Print what a data set folder holds and what is odd about it; 1 when something is wrong, else 0."""
    labels = read_labels(folder)
    data = {(split, language): read_split(folder, split, language, labels)
            for split in SPLITS for language in split_languages(folder, split)}
    if not data:
        raise UserError(f"{folder} has no train, dev or test file")
    tokenizer = model and load_tokenizer(model)
    print(f"{folder}: {len(labels)} labels: {' '.join(labels[:8])}{' ...' * (len(labels) > 8)}")
    print(f"{'file':<16}{'rows':>9}{'smallest':>10}{'largest':>9}{'twice':>8}{'in train':>10}"
          + f"{'tokens':>8}{'unknown':>9}{'cut':>7}" * bool(model))
    train, first, odd = set(), {}, []
    pairs = next(iter(data.values())).text_b is not None
    for (split, language), rows in data.items():
        texts = list(zip(rows.text_a, rows.text_b)) if rows.text_b else rows.text_a
        if split == "train":
            train.update(texts)
        share = np.bincount(rows.labels, minlength=len(labels)) / len(texts)
        line = (f"{split + '.' + language:<16}{len(texts):>9,}{share.min():>10.1%}{share.max():>9.1%}"
                f"{len(texts) - len(set(texts)):>8,}"
                f"{'' if split == 'train' else sum(text in train for text in texts):>10}")
        if model:
            encoded = encode(tokenizer, rows, max_length=1 << 20)
            unknown = np.mean(encoded.ids == tokenizer.unk_token_id)
            line += f"{encoded.lengths.mean():>8.1f}{unknown:>9.2%}{np.mean(encoded.lengths > max_length):>7.1%}"
        print(line)
        name, expected = first.setdefault(split, (language, rows.labels))
        if split != "train" and rows.labels != expected:
            odd.append(f"note: {split}.{language}.tsv is not row-parallel with {split}.{name}.tsv: no mean over "
                       "languages will be compared")
        if (rows.text_b is not None) != pairs:
            odd.append(f"warning: {split}.{language}.tsv and {'.'.join(next(iter(data)))}.tsv: "
                       "one holds pairs, the other single texts")
    print("smallest, largest: the class with the fewest and the most rows; twice: rows that are there again;\n"
          "in train: rows whose text is in a train file too" + f"; cut: longer than {max_length} tokens" * bool(model))
    print("".join(f"{sentence}\n" for sentence in odd), end="")
    return int(any(sentence.startswith("warning") for sentence in odd))


def language_code(text):
    """A type for argparse: a language code as MASSIVE has them."""
    if not re.fullmatch("[a-z]{2}([-_][A-Z]{2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a code as de or zh-CN")
    return text


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, languages, form in (("xnli", "en zh es de ar ur", {"choices": XNLI_LANGUAGES}),
                                  ("massive", "en de es fr zh", {"type": language_code})):
        command = commands.add_parser(name, help=f"fetch and convert {name}", allow_abbrev=False)
        command.add_argument("--out", required=True, help="data set folder to write")
        command.add_argument("--archives", metavar="DIR",
                             help="folder that holds the archives (default: download them)")
        command.add_argument("--languages", nargs="+", default=languages.split(), metavar="LANG", **form,
                             help=f"languages of dev and test (default: {languages})")
        command.add_argument("--train-languages", nargs="+", default=["en"], metavar="LANG", **form,
                             help="languages of train (default: en)")
        if name == "massive":
            command.add_argument("--intents", type=in_range(int, 0), default=4,
                                 help="keep the N most frequent intents of English train (default: 4; 0: all 60)")
            command.add_argument("--balance", action="store_true",
                                 help="repeat train rows of the smaller classes until all are equal, as the paper did")
            command.add_argument("--seed", type=in_range(int, 0), default=0, help="for --balance (default: 0)")
    command = commands.add_parser("check", help="print what a data set folder holds and what is odd about it",
                                  allow_abbrev=False)
    command.add_argument("folder", help="data set folder")
    command.add_argument("--model", help="model whose tokenizer to count tokens with (hub name or folder)")
    command.add_argument("--max-length", type=in_range(int, 1), default=128,
                         help="tokens a row may have (default: 128)")
    args = parser.parse_args(argv)
    if args.command == "massive" and args.intents == 1:
        parser.error("--intents 1: expected 0 (all) or 2 and more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.command == "check":
        return check(args.folder, args.model, args.max_length)
    if args.command == "xnli":
        paths = [find_archive(url, args.archives, args.out) for url in (XNLI_URL, XNLI_MT_URL)]
        data, sources = read_xnli(*paths, dict.fromkeys(args.languages), dict.fromkeys(args.train_languages))
        write_data_set(args.out, XNLI_LABELS, data, sources, XNLI_ROWS)
    else:
        path = find_archive(MASSIVE_URL, args.archives, args.out)
        labels, data, sources = read_massive(path, [*args.languages, *args.train_languages], args.train_languages,
                                             args.intents, args.balance, args.seed)
        data = {key: rows for key, rows in data.items() if key[0] == "train" or key[1] in args.languages}
        write_data_set(args.out, labels, data, sources, {})  # read_massive has counted, before it chose intents
    return 0


if __name__ == "__main__":
    cli(main)
