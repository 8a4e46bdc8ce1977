"""Make data set folders: fetch the published archives, convert them, and check what a folder holds.

The commands of data.py, kept apart from what the other scripts read.

    python data.py xnli    --out data/xnli                  # MultiNLI in English to train, XNLI to test
    python data.py massive --out data/massive --intents 4   # the stand-in for the paper's in-house intents
    python data.py check   data/xnli --model bert-base-multilingual-uncased

Reads   the published archives, downloaded to OUT/../archives or taken from --archives.
Writes  OUT/labels.txt, OUT/{train,dev,test}.LANG.tsv, OUT/sources.json (formats: README).
Paper   section 1.3.
"""
import argparse
import contextlib
import http.client
import io
import json
import lzma
import os
import re
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import (SPLITS, Rows, encode, label_index, read_labels, read_split, split_languages, table_lines, text_lines,
                  write_table)
from files import UserError, cli, in_range, sha256, write_atomic, write_json

XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip"
XNLI_MT_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip"
MASSIVE_URL = "https://amazon-massive-nlu-dataset.s3.amazonaws.com/amazon-massive-dataset-1.0.tar.gz"
XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
XNLI_LABELS = ["entailment", "neutral", "contradiction"]
XNLI_ROWS = {"train": 392_702, "dev": 2_490, "test": 5_010}
MASSIVE_ROWS = {"train": 11_514, "dev": 2_033, "test": 2_974}


# --- archives ----------------------------------------------------------------------------------------------------

def download(url, path, tries=5):
    """Download to `path`, going on where an earlier try stopped. UserError after `tries` failures in a row."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, furthest = 0, 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                have = have if response.status == 206 else 0  # 200: the server starts from the beginning
                length = response.headers.get("Content-Length")
                total = have + int(length) if length else None
                with open(part, "ab" if have else "wb") as file, \
                        tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=Path(path).name) as bar:
                    while block := response.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            size = part.stat().st_size
            if total in (None, size):
                os.replace(part, path)
                return
            problem = f"the connection ended after {size:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing left to send: the part is whole, or not this file's
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise UserError(f"{url}: {error.code} {error.reason}") from None
            problem = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            problem = str(error)
        size = part.stat().st_size if part.exists() else 0
        failures, furthest = (1, size) if size > furthest else (failures + 1, furthest)  # new bytes: count anew
        if failures >= tries:
            raise UserError(f"{url}: {problem}; the part is kept, run the command again to go on, or fetch the file "
                            f"yourself and give its folder with --archives")
        time.sleep(min(failures, 5) * 0.2)


def find_archive(url, folder, out):
    """The path of an archive: in --archives when given, else downloaded beside the data set once."""
    path = Path(folder or Path(out).parent / "archives") / url.rsplit("/", 1)[1]
    if not path.is_file():
        if folder:
            raise UserError(f"{path} does not exist (--archives); it can be had from {url}")
        download(url, path)
    return path


@contextlib.contextmanager
def archive(path, opener):
    """Open an archive; whatever is wrong with its bytes is a UserError."""
    try:
        with opener(path) as opened:
            yield opened
    except PermissionError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError,
            ValueError, RuntimeError) as error:  # a wrong byte can surface as any of these, on many lines too
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{path} is damaged or cut short ({reason}): delete it and fetch it again") from None


def clean(text):
    """Text for one cell: tabs and line breaks become spaces, all else stays."""
    return re.sub(r"[\t\r\n]", " ", text)


def zip_table(opened, path, member, columns):
    """Yield (line number, the named cells) of a tab-separated member. UserError when it or a column is missing."""
    try:
        stream = opened.open(member)
    except KeyError:
        raise UserError(f"{path} has no member {member}") from None
    with io.BufferedReader(stream, 1 << 20) as buffered:
        lines = table_lines(buffered, f"{path}:{member}")
        header = next(lines)
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(f"{path}:{member}, line 1: no column {missing[0]!r} in {header[:19]}")
        where = [header.index(name) for name in columns]
        for number, cells in lines:
            yield number, [cells[i] for i in where]


# --- the data sets -----------------------------------------------------------------------------------------------

def read_xnli(path, path_mt, languages, train_languages):
    """The XNLI archives -> {(split, language): Rows}, {(split, language): where it came from}."""
    data, sources = {}, {}
    with archive(path_mt, zipfile.ZipFile) as opened:
        for language in train_languages:
            member = f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv"
            rows = Rows([], [], [])
            for number, (premise, hypo, label) in zip_table(opened, path_mt, member, ["premise", "hypo", "label"]):
                rows.text_a.append(clean(premise))
                rows.text_b.append(clean(hypo))
                label = "contradiction" if label == "contradictory" else label
                rows.labels.append(label_index(label, XNLI_LABELS, f"{path_mt}:{member}, line {number}"))
            if not rows.labels:
                raise UserError(f"{path_mt}:{member} holds a header and no rows")
            data["train", language], sources["train", language] = rows, {"archive": path_mt.name, "member": member}
    columns = ["language", "gold_label", "sentence1", "sentence2", "pairID"]
    with archive(path, zipfile.ZipFile) as opened:
        for split in ("dev", "test"):
            member = f"XNLI-1.0/xnli.{split}.tsv"
            found, pairs = {language: Rows([], [], []) for language in languages}, {}
            for number, (language, label, premise, hypothesis, pair) in zip_table(opened, path, member, columns):
                if language in found:
                    rows = found[language]
                    rows.text_a.append(clean(premise))
                    rows.text_b.append(clean(hypothesis))
                    rows.labels.append(label_index(label, XNLI_LABELS, f"{path}:{member}, line {number}"))
                    pairs.setdefault(language, []).append(pair)
            check_parallel(pairs, f"{path}:{member}", languages)
            for language, rows in found.items():
                data[split, language], sources[split, language] = rows, {"archive": path.name, "member": member}
    return data, sources


def read_massive(path, languages, train_languages, intents, balance, seed):
    """The MASSIVE archive -> label names, {(split, language): Rows}, {(split, language): where it came from}."""
    records, members = {}, {}
    with archive(path, tarfile.open) as opened:
        for info in opened:
            match = re.fullmatch(r"1\.0/data/([a-z]{2})-([A-Z]{2})\.jsonl", info.name)
            if not match or match[1] not in languages or match[1] == "zh" and match[2] != "CN" or not info.isfile():
                continue
            rows = records[match[1]] = {split: [] for split in SPLITS}
            members[match[1]] = info.name
            for number, line in text_lines(opened.extractfile(info), f"{path}:{info.name}"):
                try:
                    record = json.loads(line)
                    (record["intent"] + record["utt"]).encode("utf-8")  # half of a surrogate pair is an error
                    rows[record["partition"]].append((str(record["id"]), record["intent"], clean(record["utt"])))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(f"{path}:{info.name}, line {number}: expected a JSON object with id, partition "
                                    f"(train, dev or test), intent and utt ({error!r})") from None
        while opened.fileobj.read(1 << 20):  # to the very end: gzip's checksum is there, after the last member
            pass
    for language in languages:
        if language not in records:
            raise UserError(f"{path} has no member 1.0/data/{language}-*.jsonl")
        for split in SPLITS:
            check_parallel({tongue: [row[:2] for row in records[tongue][split]] for tongue in ("en", language)},
                           f"{path}:{members[language]}, partition {split}", [language])
            warn_count(members[language], split, len(records[language][split]), MASSIVE_ROWS)
    counts = Counter(intent for _, intent, _ in records["en"]["train"])
    labels = sorted(sorted(counts, key=lambda intent: (-counts[intent], intent))[:intents or None])
    if len(labels) < 2:
        raise UserError(f"{path}:{members['en']}: {len(labels)} intents in the train partition, expected two or more")
    data, sources = {}, {}
    for language in languages:
        for split in SPLITS:
            if split == "train" and language not in train_languages:
                continue
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


def warn_count(name, split, rows, known):
    """Warn where a split's number of rows is not the published one, `known` ({split: rows})."""
    if rows != known.get(split, rows):
        print(f"warning: {name} has {rows:,} rows where the published {split} set has {known[split]:,}",
              file=sys.stderr)


def write_data_set(out, labels, data, sources, known):
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
        count = len(data[key].labels)
        write_table(out / name, data[key].columns(labels))
        sources[key] |= {"sha256": sha256(out / name), "rows": count}
        print(f"{out / name}: {count:,} rows")
        warn_count(name, key[0], count, known)
    write_json(out / "sources.json", {names[key]: sources[key] for key in data})


# --- check -------------------------------------------------------------------------------------------------------

def check(folder, model=None, max_length=128):
    """Print what a data set folder holds and what is odd about it; 1 when something is wrong, else 0."""
    labels = read_labels(folder)
    data = {(split, language): read_split(folder, split, language, labels)
            for split in SPLITS for language in split_languages(folder, split)}
    if not data:
        raise UserError(f"{folder} has no train, dev or test file")
    if model:
        from model import load_tokenizer  # and torch, which takes seconds
        tokenizer = load_tokenizer(model)
    print(f"{folder}: {len(labels)} labels: {' '.join(labels[:8])}{' ...' * (len(labels) > 8)}")
    print(f"{'file':<16}{'rows':>9}{'smallest':>10}{'largest':>9}{'twice':>8}{'in train':>10}"
          + f"{'tokens':>8}{'unknown':>9}{'cut':>7}" * bool(model))
    train, wrong = set(), []
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
        first = split_languages(folder, split)[0]
        if split != "train" and rows.labels != data[split, first].labels:
            wrong.append(f"{split}.{language}.tsv is not row-parallel with {split}.{first}.tsv")
        if (rows.text_b is None) != (next(iter(data.values())).text_b is None):
            wrong.append(f"{split}.{language}.tsv and {'.'.join(next(iter(data)))}.tsv: "
                         "one holds pairs, the other single texts")
    print("smallest, largest: the class with the fewest and the most rows; twice: rows that are there again;\n"
          "in train: rows whose text is in a train file too" + f"; cut: longer than {max_length} tokens" * bool(model))
    for sentence in wrong:
        print(f"warning: {sentence}")
    return int(bool(wrong))


def language_code(text):
    """A type for argparse: two lower-case letters."""
    if not re.fullmatch("[a-z]{2}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a two-letter code")
    return text


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, languages, form in (("xnli", "en zh es de ar ur", {"choices": XNLI_LANGUAGES}),
                                  ("massive", "en de es fr zh", {"type": language_code})):
        command = commands.add_parser(name, help=f"fetch and convert {name}")
        command.add_argument("--out", required=True, help="data set folder to write")
        command.add_argument("--archives", metavar="DIR",
                             help="folder that holds the archives (default: download them)")
        command.add_argument("--languages", nargs="+", default=languages.split(), metavar="LANG", **form,
                             help=f"languages of dev and test, two-letter codes (default: {languages})")
        command.add_argument("--train-languages", nargs="+", default=["en"], metavar="LANG", **form,
                             help="languages of train (default: en); others are for Translate-Train, not zero-shot")
        if name == "massive":
            command.add_argument("--intents", type=in_range(int, 0), default=4,
                                 help="keep the N most frequent intents of English train (default: 4; 0: all 60)")
            command.add_argument("--balance", action="store_true",
                                 help="repeat train rows of the smaller classes until all are equal, as the paper did")
            command.add_argument("--seed", type=in_range(int, 0), default=0, help="for --balance (default: 0)")
    command = commands.add_parser("check", help="print what a data set folder holds and what is odd about it")
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
        labels, known = XNLI_LABELS, XNLI_ROWS
        data, sources = read_xnli(*paths, dict.fromkeys(args.languages), dict.fromkeys(args.train_languages))
    else:
        path = find_archive(MASSIVE_URL, args.archives, args.out)
        languages = list(dict.fromkeys(["en", *args.languages, *args.train_languages]))
        labels, data, sources = read_massive(path, languages, args.train_languages, args.intents, args.balance,
                                             args.seed)
        data = {key: rows for key, rows in data.items() if key[0] == "train" or key[1] in args.languages}
        known = {}  # read_massive has counted them, before it chose intents
    write_data_set(args.out, labels, data, sources, known)


if __name__ == "__main__":
    cli(main)
