"""XNLI's and MASSIVE's published archives as rows."""

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
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from lib.folders import write_atomic
from lib.messages import UserError, progress_bar

SPLITS = ("train", "dev", "test")


MAX_LINE = 1 << 20  # bytes; a longer line is a broken file, not a text


XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip"


XNLI_MT_URL = "https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip"


MASSIVE_URL = (
    "https://amazon-massive-nlu-dataset.s3.amazonaws.com/amazon-massive-dataset-1.0.tar.gz"
)


XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()


XNLI_LABELS = ["entailment", "neutral", "contradiction"]


XNLI_ROWS = {"train": 392_702, "dev": 2_490, "test": 5_010}


MASSIVE_ROWS = {"train": 11_514, "dev": 2_033, "test": 2_974}


def text_lines(stream, name):
    """Yield the lines of a binary stream as text. UserError for one that is too long or not UTF-8."""
    for number, raw in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
        if len(raw) == MAX_LINE:
            raise UserError(f"{name}, line {number}: longer than {MAX_LINE:,} bytes")
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number}: not UTF-8 (byte {error.object[error.start]:#04x} at "
                f"{error.start})"
            ) from None
        yield text.removesuffix("\n").removesuffix("\r")


def table_lines(stream, name):
    """Yield the cells of a tab-separated table's header, then those of each line. UserError for a ragged one."""
    header = None
    for number, line in enumerate(text_lines(stream, name), 1):
        cells = line.split("\t")
        header = header or cells
        if len(cells) != len(header):
            raise UserError(
                f"{name}, line {number}: {len(cells)} columns, expected {len(header)} "
                f"({', '.join(header[:4])}{', ...' * (len(header) > 4)})"
            )
        yield cells
    if header is None:
        raise UserError(f"{name} is empty")


def label_index(label, labels, where):
    """The class index of a label. UserError names the place, the value and what is allowed."""
    if label in labels:
        return labels.index(label)

    def look(text):
        return unicodedata.normalize("NFKC", text).strip().casefold()

    alike = [
        f"; {ascii(label)} is not {ascii(known)}" for known in labels if look(known) == look(label)
    ]
    raise UserError(
        f"{where}: unknown label {label[:60]!r}, expected one of {', '.join(labels[:8])}"
        + ", ..." * (len(labels) > 8)
        + "".join(alike)
    )


def find_archive(url, folder, out):
    """The path of an archive: in --archives when given, else downloaded beside the data set once."""
    path = Path(folder or Path(out).parent / "archives") / url.rsplit("/", 1)[1]
    if not path.is_file():
        if folder:
            raise UserError(f"{path} does not exist (--archives); it can be had from {url}")
        try:
            with (
                urllib.request.urlopen(url, timeout=60) as response,
                write_atomic(path, "wb") as file,
                progress_bar(
                    total=response.length, desc=path.name, unit="B", unit_scale=True
                ) as bar,
            ):
                while block := response.read(1 << 20):
                    bar.update(file.write(block))
                if (
                    response.length
                ):  # counted down as it is read, and short of 0 is no error to urllib or torch.hub
                    raise OSError(f"it ended {response.length:,} bytes too early")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{url}: {error}; or fetch the file yourself and give its folder with --archives"
            ) from None
    return path


def read_archive(path, wanted):
    """Yield (key, member's name, bytes) for each of `wanted`, {key: name, or a pattern with *}, in a .zip or .tar.gz.

    UserError when the archive is damaged, and at the end when one of `wanted` was not there.
    """
    found = set()

    def keys(name):
        mine = [key for key, pattern in wanted.items() if fnmatchcase(name, pattern)]
        found.update(mine)
        return mine

    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as opened:
                for name in opened.namelist():
                    yield from ((key, name, opened.read(name)) for key in keys(name))
        else:
            with tarfile.open(path) as opened:
                for info in opened:
                    yield from (
                        (key, info.name, opened.extractfile(info).read()) for key in keys(info.name)
                    )
                while opened.fileobj.read(1 << 20):  # to the very end: gzip's checksum is there
                    pass
    except PermissionError:
        raise
    except (
        Exception
    ) as error:  # nothing but zipfile and tarfile runs here; a wrong byte can surface as any error
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(
            f"{path} is damaged or cut short ({reason}): delete it and fetch it again"
        ) from None
    if missing := [pattern for key, pattern in wanted.items() if key not in found]:
        raise UserError(f"{path} has no member {missing[0]}")


def clean(text):
    """Text for one cell: tabs and line breaks become spaces, all else stays."""
    return re.sub(r"[\t\r\n]", " ", text)


def read_xnli(path, path_mt, languages, train_languages):
    """The XNLI archives -> {(split, language): (rows of (text_a, text_b, label), archive, member)}."""
    data = {}
    members = {
        language: f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv"
        for language in train_languages
    }
    for language, member, content in read_archive(path_mt, members):
        rows = xnli_rows(content, f"{path_mt}:{member}", ["premise", "hypo", "label"])
        check_rows({language: rows}, f"{path_mt}:{member}", "train", XNLI_ROWS)
        data["train", language] = rows, path_mt.name, member
    members = {split: f"XNLI-1.0/xnli.{split}.tsv" for split in ("dev", "test")}
    columns = ["language", "pairID", "sentence1", "sentence2", "gold_label"]
    for split, member, content in read_archive(path, members):
        rows = {language: [] for language in languages}
        for language, *row in xnli_rows(content, f"{path}:{member}", columns):
            rows.get(language, []).append(row)
        check_rows(rows, f"{path}:{member}", split, XNLI_ROWS)
        data |= {
            (split, language): ([row[1:] for row in rows[language]], path.name, member)
            for language in languages
        }
    return data


def xnli_rows(content, name, columns):
    """The named columns of an XNLI table, of which the last is the label: N lists. UserError when one is missing."""
    lines = table_lines(io.BytesIO(content), name)
    header = next(lines)
    if missing := [column for column in columns if column not in header]:
        raise UserError(f"{name}, line 1: no column {missing[0]!r} in {header[:19]}")
    where = [header.index(column) for column in columns]
    rows = [[clean(cells[i]) for i in where] for cells in lines]
    for number, row in enumerate(rows, 2):
        row[-1] = "contradiction" if row[-1] == "contradictory" else row[-1]  # as XNLI-MT calls it
        label_index(row[-1], XNLI_LABELS, f"{name}, line {number}")
    return rows


def read_massive(path, languages, train_languages, intents, balance, seed):
    """The MASSIVE archive -> label names, {(split, language): (rows of (text, label), archive, member)}.

    The most frequent `intents` (0: all) of English train are kept, whatever the languages.
    """

    def locale(
        code,
    ):  # zh is zh-CN; de, as any other, the one de-* there is; pt-PT and pt_PT are themselves
        return "zh-CN" if code == "zh" else code.replace("_", "-") + "-*" * (len(code) == 2)

    source, everything = english(languages + train_languages), languages + train_languages
    records, members = {code: {split: [] for split in SPLITS} for code in [source, *everything]}, {}
    for code, member, content in read_archive(
        path, {code: f"1.0/data/{locale(code)}.jsonl" for code in records}
    ):
        members[code] = member
        for number, line in enumerate(text_lines(io.BytesIO(content), f"{path}:{member}"), 1):
            try:
                record = json.loads(line)
                (record["intent"] + record["utt"]).encode(
                    "utf-8"
                )  # half of a surrogate pair is an error
                records[code][record["partition"]].append(
                    (record["id"], clean(record["utt"]), record["intent"])
                )
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}:{member}, line {number}: expected a JSON object with id, partition "
                    f"(train, dev or test), intent and utt ({error!r})"
                ) from None
    for split in SPLITS:
        check_rows(
            {code: found[split] for code, found in records.items()},
            f"{path}, partition {split}",
            split,
            MASSIVE_ROWS,
        )
    counts = Counter(intent for _, _, intent in records[source]["train"])
    labels = sorted(sorted(counts, key=lambda intent: (-counts[intent], intent))[: intents or None])
    if len(labels) < 2:
        raise UserError(
            f"{path}:{members[source]}: {len(labels)} intents in the train partition, expected two or more"
        )
    data = {}
    for split in SPLITS:
        for code in train_languages if split == "train" else languages:
            rows = [row[1:] for row in records[code][split] if row[2] in labels]
            rows = balanced(rows, seed) if balance and split == "train" else rows
            data[split, code] = rows, path.name, members[code]
    return labels, data


def english(languages):
    """The code that English has among some languages, else "en"."""
    return next((code for code in languages if code.startswith("en")), "en")


def balanced(rows, seed):
    """Repeat (text, label) rows of the smaller classes until all are as large as the largest (paper section 1.3)."""
    random = np.random.default_rng(seed)
    counts = Counter(label for _, label in rows)
    for label in sorted(counts):
        mine = [row for row in rows if row[1] == label]
        rows = rows + [
            mine[i]
            for i in random.permutation(np.arange(max(counts.values()) - len(mine)) % len(mine))
        ]
    return rows


def check_rows(rows, where, split, published):
    """UserError unless each language has rows, with the first's ids and labels; a warning when they are not as many as
    published. rows: {language: rows of (id, ..., label)}; published: {split: count}."""
    keys = {language: [(row[0], row[-1]) for row in mine] for language, mine in rows.items()}
    first = next(iter(keys))
    for language, mine in keys.items():
        if not mine:
            raise UserError(f"{where} has no rows for the language {language!r}")
        if mine != keys[first]:
            raise UserError(
                f"{where}: {language} is not row-parallel with {first}: other ids or labels"
            )
    if len(mine) != published[split]:
        print(
            f"warning: {where} has {len(mine):,} rows where the published {split} set has {published[split]:,}",
            file=sys.stderr,
        )
