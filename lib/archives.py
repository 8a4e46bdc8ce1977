"""Tables: a user's .csv, .jsonl and .tsv, and XNLI's and MASSIVE's published archives, as rows."""

import csv
import errno
import gzip
import http.client
import io
import json
import re
import sys
import tarfile
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.folders import write_atomic
from lib.messages import UserError, first_line, progress_bar, say_once

SPLITS = ("train", "dev", "test")
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")

XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip"
XNLI_MT_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip"
XNLI_LABELS = ["entailment", "neutral", "contradiction"]
MASSIVE_HOST = "https://amazon-massive-nlu-dataset.s3.amazonaws.com"
MASSIVE_URL = f"{MASSIVE_HOST}/amazon-massive-dataset-1.0.tar.gz"

# what the libraries raise for an archive that is damaged; a byte of a member's head may say that it
# is encrypted (RuntimeError), or that its name is of an encoding that it is not
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
)
# gzip's own errors have none; zipfile seeks before the start of a file that lacks its beginning
DAMAGED_ERRNOS = (None, errno.EINVAL)


class Table(NamedTuple):
    """One split in one language that is to be written."""

    header: list  # text, label; or text_a, text_b, label; perhaps group
    rows: list  # of as many cells
    source: dict  # where it is from, for sources.json


# --- tables as columns ---------------------------------------------------------------------------


def decode(content, name):
    """A file's bytes as text. UserError names the line that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: not UTF-8 (byte {content[error.start]:#04x}): save it as UTF-8"
        ) from None


def text_lines(content, name):
    """The lines of a file's bytes."""
    return decode(content, name).replace("\r\n", "\n").removesuffix("\n").split("\n")


def read_tsv(content, name):
    """Our own form, without quoting: header, rows, the line of each."""
    header, *rows = [line.split("\t") for line in text_lines(content, name)]
    while len(header) > 1 and rows and rows[-1] == [""]:  # empty lines at the end
        rows.pop()
    return header, rows, range(2, len(rows) + 2)


def read_csv(content, name):
    """As spreadsheets write it: separated by , ; or tab, with quotes and line breaks in cells."""
    text = decode(content, name)

    def width(mark):
        return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []))

    mark = max(",;\t", key=width)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows, lines, line = [], [], 1
    try:
        for cells in reader:
            if any(cells):  # spreadsheets write empty rows, too
                rows.append(cells)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: {error}") from None
    header, *rows = rows or [[""]]
    return header, rows, lines[1:]


def read_jsonl(content, name):
    """An object a line; a value that is no text is written as JSON, a missing one is empty."""
    records, lines, header = [], [], {}
    for number, line in enumerate(text_lines(content, name), 1):
        if not line.strip():
            continue
        record = {}
        try:
            for key, value in json.loads(line).items():
                if value is not None and not isinstance(value, str):
                    value = json.dumps(value)
                record[key] = value or ""
            "".join(record.values()).encode()  # half of a surrogate pair is an error
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{name}, line {number}: not a JSON object ({error})") from None
        header |= record
        records.append(record)
        lines.append(number)
    rows = [[record.get(key, "") for key in header] for record in records]
    return list(header), rows, lines


def clean(cell):
    """Text for a cell of a .tsv: tabs and line breaks become spaces, all else stays."""
    return re.sub(r"[\t\r\n]", " ", str(cell))


def write_tsv(file, columns):
    for cells in [columns, *zip(*columns.values())]:
        file.write("\t".join(map(clean, cells)) + "\n")


def write_csv(file, columns):
    file.write("\ufeff")  # without which a spreadsheet takes it for an older encoding
    csv.writer(file, lineterminator="\n").writerows([columns, *zip(*columns.values())])


def write_jsonl(file, columns):
    for cells in zip(*columns.values()):
        file.write(json.dumps(dict(zip(columns, cells)), ensure_ascii=False) + "\n")


# how each form is read, (bytes, name) -> header, rows, lines; and written, from {name: N cells}
FORMS = {
    "tsv": (read_tsv, write_tsv),
    "csv": (read_csv, write_csv),
    "jsonl": (read_jsonl, write_jsonl),
}


def parse_columns(content, name, form="tsv"):
    """A table's bytes -> {column name: [N cells]}, [N line numbers]. UserError for a broken one."""
    read, _ = FORMS[form]
    header, rows, lines = read(content, name)
    if len(set(header)) < len(header):
        raise UserError(f"{name}, line 1: two columns have one name: {', '.join(header)}")
    if not rows:
        raise UserError(f"{name} holds no rows: expected a header and one or more")
    for line, cells in zip(lines, rows):
        if len(cells) != len(header):
            raise UserError(
                f"{name}, line {line}: {len(cells)} columns, expected {len(header)} "
                f"({', '.join(header)})"
            )
    return dict(zip(header, map(list, zip(*rows)))), lines


def table_form(path):
    """How a file is written, by its name: csv, jsonl, and tsv for all others."""
    suffix = Path(path).suffix.lower()
    if suffix[1:] in FORMS:
        return suffix[1:]
    if suffix in SPREADSHEETS:
        raise UserError(
            f"{path}: a spreadsheet's own format is not read: save it as CSV "
            "(in Excel: Save As, CSV UTF-8) and give that file"
        )
    if suffix == ".json":
        raise UserError(f"{path}: JSON is read and written as lines, an object each, in a .jsonl")
    return "tsv"


def read_columns(path):
    """A table's columns, {name: [N cells]}, and [N numbers], the line that each row begins in.

    The form is .csv, .jsonl or .tsv (ours, also for other names), by the name; "-" is standard
    input. Whatever can be read will do, as a pipe.
    """
    form = table_form(path)
    if str(path) == "-":
        return parse_columns(sys.stdin.buffer.read(), "standard input", form)
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    return parse_columns(Path(path).read_bytes(), path, form)


def write_columns(path, columns):
    """Write {name: N cells} as .tsv, .csv or .jsonl; "-" is standard output."""
    _, write = FORMS[table_form(path)]
    if str(path) == "-":
        write(sys.stdout, columns)
        return
    with write_atomic(path) as file:
        write(file, columns)


def need_columns(columns, names, path):
    """UserError that says which columns there are, where one of `names` is missing."""
    for name in names:
        if name not in columns:
            raise UserError(
                f"{path}, line 1: no column {name!r}; there are: {', '.join(map(repr, columns))}"
            )


def label_index(label, labels, where):
    """The class index of a label. UserError names the place, the value and what is allowed."""
    if label in labels:
        return labels.index(label)
    message = f"{where}: unknown label {label[:60]!r}, expected one of {', '.join(labels[:8])}"
    if len(labels) > 8:
        message += ", ..."
    for known in labels:
        if folded(known) == folded(label):
            message += f"; {ascii(label)} is not {ascii(known)}"
    raise UserError(message)


def folded(text):
    """What looks the same is the same: one form of accents, no case, no space around."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


# --- published archives --------------------------------------------------------------------------


def find_archive(url, folder, out):
    """The path of an archive: in --archives, or else downloaded once, beside the data set."""
    path = Path(folder or Path(out).parent / "archives") / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    if folder:
        raise UserError(f"{path} does not exist (--archives); it can be had from {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, write_atomic(path, "wb") as file:
            bar = progress_bar(total=response.length, desc=path.name, unit="B", unit_scale=True)
            with bar:
                while block := response.read(1 << 20):
                    bar.update(file.write(block))
            if response.length:  # what is still to come; urllib does not mind
                raise OSError(f"it ended {response.length:,} bytes too early")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url}: {error}; or fetch the file yourself and give its folder with --archives"
        ) from None
    return path


def archive_members(path):
    """Yield (name, function that reads it) of each file in a .zip or .tar.gz."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                yield info.filename, partial(archive.read, info)
    else:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream) as archive:
            for info in archive:
                if info.isfile():
                    yield info.name, archive.extractfile(info).read
            stream.read()  # to the very end: gzip's checksum is there


def read_archive(path, wanted):
    """Yield (key, member's name, its columns) for {key: name, or a pattern with *}.

    UserError where the archive is damaged, and at the end where a member was not there.
    """
    missing = dict(wanted)
    try:
        for name, read in archive_members(path):
            keys = [key for key, pattern in wanted.items() if fnmatchcase(name, pattern)]
            if keys:
                columns, _ = parse_columns(read(), f"{path}:{name}", table_form(name))
            for key in keys:
                missing.pop(key, None)
                yield key, name, columns
    except ARCHIVE_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in DAMAGED_ERRNOS:
            raise
        raise UserError(
            f"{path} is damaged or cut short ({first_line(error)}): delete it and fetch it again"
        ) from None
    for pattern in missing.values():
        raise UserError(f"{path} has no member {pattern}")


def read_xnli(path, path_mt, languages, train_languages):
    """The XNLI archives -> {(split, language): Table}."""
    tables, header = {}, ["text_a", "text_b", "label"]
    members = {}
    for language in train_languages:
        members[language] = f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv"
    for language, member, columns in read_archive(path_mt, members):
        labels = [{"contradictory": "contradiction"}.get(l, l) for l in columns["label"]]
        rows = list(zip(columns["premise"], columns["hypo"], labels))
        source = {"archive": path_mt.name, "member": member}
        tables["train", language] = Table(header, rows, source)
    members = {split: f"XNLI-1.0/xnli.{split}.tsv" for split in ("dev", "test")}
    for split, member, columns in read_archive(path, members):
        source = {"archive": path.name, "member": member}
        rows = list(zip(columns["sentence1"], columns["sentence2"], columns["gold_label"]))
        for language in languages:
            of_language = [row for row, code in zip(rows, columns["language"]) if code == language]
            if not of_language:
                raise UserError(f"{path}:{member} has no rows for the language {language!r}")
            tables[split, language] = Table(header, of_language, source)
    return tables


def read_massive(path, languages, train_languages, intents, balance, seed):
    """The MASSIVE archive -> label names, {(split, language): Table}.

    The most frequent `intents` (0: all) of English train are kept, whatever the languages.
    """
    # rows of (text, intent) by split and language
    source = english(languages + train_languages)
    codes = [source, *languages, *train_languages]
    rows, members = {}, {}
    patterns = {code: f"1.0/data/{massive_locale(code)}.jsonl" for code in codes}
    for code, member, columns in read_archive(path, patterns):
        members[code] = member
        for split in SPLITS:
            rows[split, code] = []
        for split, *row in zip(columns["partition"], columns["utt"], columns["intent"]):
            rows[split, code].append(row)
    # the most frequent intents
    counts = Counter(intent for _, intent in rows["train", source])
    labels = sorted(sorted(counts, key=lambda intent: (-counts[intent], intent))[: intents or None])
    # their rows
    tables = {}
    for split, codes in {"train": train_languages, "dev": languages, "test": languages}.items():
        for code in codes:
            kept = [row for row in rows[split, code] if row[1] in labels]
            if balance and split == "train":
                kept = balanced(kept, seed)
            origin = {"archive": path.name, "member": members[code]}
            tables[split, code] = Table(["text", "label"], kept, origin)
    return labels, tables


def massive_locale(code):
    """zh is zh-CN; de, as any other, the one de-* there is; pt-PT and pt_PT are themselves."""
    if code == "zh":
        return "zh-CN"
    if len(code) == 2:
        return f"{code}-*"
    return code.replace("_", "-")


def english(languages):
    """The code that English has among some languages, else "en"."""
    return next((code for code in languages if code.startswith("en")), "en")


def balanced(rows, seed):
    """Repeat (text, label) rows of the smaller classes until all are as large as the largest.

    Paper section 1.3.
    """
    random = np.random.default_rng(seed)
    counts = Counter(label for _, label in rows)
    largest = max(counts.values())
    for label in sorted(counts):
        of_class = [row for row in rows if row[1] == label]
        copies = np.arange(largest - len(of_class)) % len(of_class)
        rows = rows + [of_class[i] for i in random.permutation(copies)]
    return rows


# --- a user's own tables -------------------------------------------------------------------------


def read_own(files, names, share, seed):
    """A user's tables -> label names by falling count in train, {(split, language): Table}.

    files: {split: [(language, path)]}, where files of one language are joined; names: {our name of
    a column: the user's}. Where a language of train has no dev, `share` of its rows becomes that.
    """
    header = list(names)
    label_at = header.index("label")
    group_at = header.index("group") if "group" in names else 0  # else the first text
    tables, counts = {}, Counter()
    for split in SPLITS:  # train first
        for language, path in files[split]:
            rows = own_rows(path, list(names.values()), label_at)
            known = list(counts)
            for line, cells in rows:
                if split == "train":
                    counts[cells[label_at]] += 1
                else:
                    label_index(cells[label_at], known, f"{path}, line {line}")
            source = {"files": [], "columns": names}
            table = tables.setdefault((split, language), Table(header, [], source))
            table.rows.extend(cells for _, cells in rows)
            table.source["files"].append(str(path))
    for split, language in list(tables):
        if split == "train" and share and ("dev", language) not in tables:
            table = tables["train", language]
            train, dev = hold_out(table.rows, group_at, label_at, share, seed)
            tables["train", language] = table._replace(rows=train)
            if dev:
                tables["dev", language] = table._replace(rows=dev)
    return sorted(counts, key=lambda label: (-counts[label], label)), tables


def own_rows(path, names, label_at):
    """[(line, cells)] of the named columns: one text or two, the label, perhaps a group.

    A warning where cells are empty, for such rows are left out, and where a text has two labels.
    """
    columns, lines = read_columns(path)
    need_columns(columns, names, path)
    rows, empty, differing, first = [], [], [], {}
    for line, *cells in zip(lines, *(columns[name] for name in names)):
        cells = [clean(cell).strip() for cell in cells]
        if not all(cells):
            empty.append(line)
            continue
        rows.append((line, cells))
        texts, label = tuple(cells[:label_at]), cells[label_at]
        label_before, line_before = first.setdefault(texts, (label, line))
        if label != label_before:
            differing.append(f"line {line}: {label!r}, in line {line_before} {label_before!r}")
    if not rows:
        raise UserError(f"{path}: no row has {' and '.join(names)}")
    if empty:
        say_once(
            f"warning: {path}, line {empty[0]}: no {' or no '.join(names)}; "
            f"rows left out for that: {len(empty):,}"
        )
    if differing:
        say_once(
            f"warning: {path}, {differing[0]}, for the same text; "
            f"such rows, which are kept: {len(differing):,}"
        )
    return rows


def hold_out(rows, group_at, label_at, share, seed):
    """Split rows into train and dev: whole groups, about `share` of the rows of each class.

    A group counts as its first row's class. A class of two groups or more is in both.
    """
    random = np.random.default_rng(seed)
    label_of, groups_of, held = {}, {}, set()
    sizes = Counter(row[group_at] for row in rows)
    for row in rows:
        label_of.setdefault(row[group_at], row[label_at])
    for group, label in label_of.items():
        groups_of.setdefault(label, []).append(group)
    for _, groups in sorted(groups_of.items()):
        left = share * sum(sizes[group] for group in groups)
        chosen = []
        for i in random.permutation(len(groups)):
            if sizes[groups[i]] / 2 < left:  # more of it fits than does not
                chosen.append(groups[i])
                left -= sizes[groups[i]]
        chosen = chosen or [min(groups, key=sizes.get)]
        held.update(chosen[: len(groups) - 1])
    train = [row for row in rows if row[group_at] not in held]
    return train, [row for row in rows if row[group_at] in held]
