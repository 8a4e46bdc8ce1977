"""data.py against hand-made archives and counts, Python's csv, the tokenizer itself and a local HTTP server."""

import csv
import hashlib
import http.server
import io
import itertools
import json
import random
import shutil
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from tokenizers import processors
from transformers import AutoTokenizer

import data
from lib import archives, folders
from lib.messages import UserError

XNLI_COLUMNS = (
    "language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 "
    "sentence2 promptID pairID genre label1 label2 label3 label4 label5 sentence1_tokenized "
    "sentence2_tokenized match"
).split()
DEV, TEST = "XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv"
TRAIN_EN, TRAIN_DE = (
    f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv" for language in ("en", "de")
)
PAIRS = {  # language: (premise, hypothesis) of three pairs, with what a careless reader trips over
    "ar": [('قال "نعم', "لا"), ("ب\u200fج", "د"), ("ه", "و")],
    "en": [
        ('He said "so', 'A lone " is text'),
        ("  two  spaces ", "no\u00a0break"),
        ('""', '"quoted"'),
    ],
    "de": [
        ('Er sagte „so"', "'ein"),
        ("Zeilen\u2028trenner", "und\x85\x0b\x0cmehr"),
        ("\\N", "NULL"),
    ],
    "zh": [("全角\u3000空格", "\ufeff不是开头"), ('他说"', "是"), ("中", "文")],
}
PAIR_LABELS = ["neutral", "contradiction", "entailment"]
TRAIN = [
    ('lone " quote', "a\rreturn", "contradictory"),
    (" lead", "trail ", "entailment"),
    ('"', "x", "neutral"),
    ("Grüße 你好", "🙂", "contradictory"),
]


# --- what the tests make -----------------------------------------------------------------------------------------


def table(rows, newline="\n", bom=""):
    return (bom + "".join("\t".join(row) + newline for row in rows)).encode("utf-8")


def xnli_table(columns=XNLI_COLUMNS, order=tuple(PAIRS), **form):
    """All languages' pairs, one pair after the other, with the columns in any order."""
    rows = [columns]
    for i, language in itertools.product(range(3), order):
        cells = {
            "language": language,
            "gold_label": PAIR_LABELS[i],
            "sentence1": PAIRS[language][i][0],
            "sentence2": PAIRS[language][i][1],
            "pairID": str(7 * i + 1),
            "match": "True",
        }
        rows.append([cells.get(column, "") for column in columns])
    return table(rows, **form)


def xnli_members(columns=XNLI_COLUMNS, train_columns=("premise", "hypo", "label")):
    place = [("premise", "hypo", "label").index(column) for column in train_columns]
    train = table([train_columns] + [[row[i] for i in place] for row in TRAIN], bom="\ufeff")
    return {
        "XNLI-1.0.zip": {
            DEV: xnli_table(columns, newline="\r\n"),
            TEST: xnli_table(columns, ("zh", "en", "de", "ar")),
        },
        "XNLI-MT-1.0.zip": {TRAIN_EN: train, TRAIN_DE: train.replace(b"lead", b"Blei")},
    }


def write_zips(folder, archives, compression=zipfile.ZIP_DEFLATED):
    folder.mkdir(exist_ok=True)
    for name, members in archives.items():
        with zipfile.ZipFile(folder / name, "w", compression) as opened:
            for member, content in members.items():
                opened.writestr(member, content)
    return folder


def edit(archives, member, change):
    """Change the bytes of one member: `change` is a function of them, or an (old, new) pair that replaces once."""
    members = next(members for members in archives.values() if member in members)
    old = members[member]
    members[member] = change(old) if callable(change) else old.replace(*change, 1)
    assert members[member] != old


def massive_records(language):
    """id, partition, intent, utt: intents in a known number, the partitions interleaved."""
    intents = (
        ["play"] * 9 + ["alarm"] * 7 + ["weather"] * 5 + ["news"] * 3 + ["joke"] * 3 + ["cook"]
    )
    rows = [("train", intent) for intent in intents]
    rows += [
        (split, intent) for split in ("dev", "test") for intent in ["play", *sorted(set(intents))]
    ]
    random.Random(4).shuffle(rows)
    return [
        {
            "id": str(i),
            "locale": language,
            "partition": split,
            "scenario": "s",
            "intent": intent,
            "utt": f'{language} "{i}',
        }
        for i, (split, intent) in enumerate(rows)
    ]


def massive_members():
    return {
        f"1.0/data/{locale}.jsonl": massive_records(locale)
        for locale in "en-US de-DE zh-TW zh-CN pt-PT".split()
    }


def write_massive(folder, members, **options):
    folder.mkdir(exist_ok=True)
    path = folder / "amazon-massive-dataset-1.0.tar.gz"
    with tarfile.open(path, "w:gz", **options) as opened:
        for name, records in {"1.0/LICENSE": b"CC BY 4.0", **members}.items():
            content = records if isinstance(records, bytes) else json_lines(records)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return path


def json_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(
        "utf-8"
    )


def write_tsv(path, rows, header="text\tlabel"):
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")


def read_plain(path):
    """All rows of a .tsv file, the header included, by Python's own csv."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def refusal(result):
    """The one sentence that a run ended with."""
    status, _, err = result
    assert status == 2 and "Traceback" not in err
    lines = [
        line
        for line in err.splitlines()
        if line and not line.startswith("warning: ") and "B/s]" not in line
    ]
    assert len(lines) == 1 and lines[0].startswith("data.py: error: "), err
    return lines[0]


# --- XNLI --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, train_columns",
    [
        (XNLI_COLUMNS, ("premise", "hypo", "label")),
        (XNLI_COLUMNS[::-1], ("label", "premise", "hypo")),
    ],
)
def test_xnli_folder_holds_the_rows_by_hand(tmp_path, script, columns, train_columns):
    archives = write_zips(tmp_path / "archives", xnli_members(columns, train_columns))
    status, out, err = script(
        "data",
        "xnli",
        "--archives",
        archives,
        "--out",
        tmp_path / "d" / "xnli",
        "--languages",
        "en",
        "zh",
        "de",
        "zh",
        "--train-languages",
        "en",
        "de",
    )
    assert status == 0
    folder = tmp_path / "d" / "xnli"
    assert (folder / "labels.txt").read_bytes() == b"entailment\nneutral\ncontradiction\n"
    written = {path.name: read_plain(path) for path in folder.glob("*.tsv")}
    header = [["text_a", "text_b", "label"]]
    train = [
        [a, b.replace("\r", " "), label.replace("contradictory", "contradiction")]
        for a, b, label in TRAIN
    ]
    expected = {
        "train.en.tsv": header + train,
        "train.de.tsv": header + [[a.replace("lead", "Blei"), b, label] for a, b, label in train],
    }
    for split, language in itertools.product(("dev", "test"), ("en", "zh", "de")):
        expected[f"{split}.{language}.tsv"] = header + [
            [*pair, label] for pair, label in zip(PAIRS[language], PAIR_LABELS)
        ]
    assert written == expected
    assert {path.name for path in folder.iterdir()} == {*expected, "labels.txt", "sources.json"}
    sources = json.loads((folder / "sources.json").read_text())
    assert sources["dev.zh.tsv"] == {
        "archive": "XNLI-1.0.zip",
        "member": DEV,
        "rows": 3,
        "sha256": hashlib.sha256((folder / "dev.zh.tsv").read_bytes()).hexdigest(),
    }
    assert sources["train.de.tsv"]["member"] == TRAIN_DE and sources.keys() == expected.keys()
    assert f"XNLI-MT-1.0.zip:{TRAIN_EN} has 4 rows where the published train set has 392,702" in err
    assert (
        f"XNLI-1.0.zip:{TEST} has 3 rows where the published test set has 5,010" in err
        and err.count("warning") == 4
    )

    rows = data.read_split(folder, "dev", "de", data.read_labels(folder))  # and read back
    assert list(zip(rows.text_a, rows.text_b)) == PAIRS["de"] and rows.labels == [1, 2, 0]


def second_row(change):
    """Change the third line of a member: the second row."""
    return lambda content: b"\n".join(
        change(line) if i == 2 else line for i, line in enumerate(content.split(b"\n"))
    )


BAD_XNLI = {  # name: (member, change of its bytes, what the message says)
    "columns": (
        TEST,
        second_row(lambda line: line.replace(b"\tTrue", b"")),
        f"XNLI-1.0.zip:{TEST}, line 3: 18 columns, expected 19 (language, gold_label, ",
    ),
    "train columns": (
        TRAIN_DE,
        second_row(lambda line: line + b"\t?"),
        f"XNLI-MT-1.0.zip:{TRAIN_DE}, line 3: 4 columns, expected 3 (premise, hypo, label)",
    ),
    "label": (
        DEV,
        second_row(lambda line: line.replace(b"neutral", b"maybe")),
        f"{DEV}, line 3: unknown label 'maybe', expected one of entailment, neutral, contradiction",
    ),
    "train label": (
        TRAIN_EN,
        (b"neutral", b"contra"),
        f"{TRAIN_EN}, line 4: unknown label 'contra', expected one of ent",
    ),
    "not UTF-8": (TEST, (b"He said", b"He\xffsaid"), f"{TEST}, line 3: not UTF-8 (byte 0xff at "),
    "empty": (TEST, lambda content: b"", f"XNLI-1.0.zip:{TEST} is empty"),
    "header only": (
        DEV,
        lambda content: content.split(b"\n")[0],
        f"{DEV} has no rows for the language 'en'",
    ),
    "train header only": (
        TRAIN_EN,
        lambda content: content.split(b"\n")[0],
        f"{TRAIN_EN} has no rows for the language 'en'",
    ),
    "column gone": (
        DEV,
        (b"pairID", b"pair"),
        f"{DEV}, line 1: no column 'pairID' in ['language', ",
    ),
    "another pair": (
        DEV,
        lambda content: b"\n".join(
            line.replace(b"\t8\t", b"\t9\t") if line[:2] == b"de" else line
            for line in content.split(b"\n")
        ),
        f"{DEV}: de is not row-parallel with en: other ids or labels",
    ),
    "a row short": (
        TEST,
        lambda content: content[: content.rindex(b"de\t")] + content[content.rindex(b"ar\t") :],
        f"{TEST}: de is not row-parallel with en: other ids or labels",
    ),
    "a long line": (
        TRAIN_EN,
        (b" lead", b"x" * (1 << 20)),
        f"{TRAIN_EN}, line 3: longer than 1,048,576 bytes",
    ),
}


@pytest.mark.parametrize("case", BAD_XNLI)
def test_xnli_refuses_bad_rows(tmp_path, script, case):
    member, change, message = BAD_XNLI[case]
    archives = xnli_members()
    edit(archives, member, change)
    result = script(
        "data",
        "xnli",
        "--archives",
        write_zips(tmp_path / "archives", archives),
        "--out",
        tmp_path / "xnli",
        "--languages",
        "en",
        "de",
        "--train-languages",
        "en",
        "de",
    )
    assert message in refusal(result)
    assert not (tmp_path / "xnli").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--languages", "en", "sw"], f"XNLI-1.0.zip:{DEV} has no rows for the language 'sw'"),
        (
            ["--languages", "en", "--train-languages", "fr"],
            "XNLI-MT-1.0.zip has no member XNLI-MT-1.0/multinli/multinli.train.fr.tsv",
        ),
    ],
)
def test_xnli_names_a_language_that_is_not_there(tmp_path, script, arguments, message):
    archives = write_zips(tmp_path / "archives", xnli_members())
    assert message in refusal(
        script("data", "xnli", "--archives", archives, "--out", tmp_path / "xnli", *arguments)
    )
    assert not (tmp_path / "xnli").exists()


@pytest.mark.parametrize("name", ["XNLI-1.0.zip", "XNLI-MT-1.0.zip"])
@pytest.mark.parametrize("damage", ["missing", "member", "cut", "byte", "not a zip"])
def test_xnli_refuses_a_damaged_archive(tmp_path, script, name, damage):
    archives = xnli_members()
    last = list(archives[name])[-1]
    if damage == "member":
        archives[name]["else.tsv"] = archives[name].pop(last)
    folder = write_zips(tmp_path / "archives", archives, zipfile.ZIP_STORED)
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage != "member":
        path.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "not a zip": b"<html>moved</html>",
                "byte": content.replace(b"He said", b"he said").replace(b"Blei", b"blei"),
            }[damage]
        )
    message = {
        "missing": f"{path} does not exist (--archives); it can be had from https://dl.fbaipublicfiles.com/XNLI/{name}",
        "member": f"{path} has no member {last}",
        "byte": f"{path} is damaged or cut short (Bad CRC-32",
        "cut": f"{path} is damaged or cut short (File is not a zip file): delete it and fetch it again",
        "not a zip": f"{path} is damaged or cut short",
    }[damage]
    assert message in refusal(
        script(
            "data",
            "xnli",
            "--archives",
            folder,
            "--out",
            tmp_path / "xnli",
            "--languages",
            "en",
            "de",
            "--train-languages",
            "en",
            "de",
        )
    )
    assert not (tmp_path / "xnli").exists()


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    """Any one wrong byte, or a cut anywhere: the same rows or a UserError, never other rows or another exception."""
    folder = write_zips(tmp_path / "archives", xnli_members())
    massive = write_massive(folder, massive_members())
    readers = {
        folder / "XNLI-1.0.zip": lambda: read_xnli(folder),
        folder / "XNLI-MT-1.0.zip": lambda: read_xnli(folder),
        massive: lambda: archives.read_massive(massive, ["en", "de"], ["en"], 0, False, 0),
    }
    pick, refused = random.Random(5), 0
    for path, read in readers.items():
        good, expected = path.read_bytes(), read()
        for trial in range(80):
            at = pick.choice(
                [pick.randrange(len(good)), pick.randrange(50), len(good) - 1 - pick.randrange(120)]
            )
            bad = (
                good[:at]
                if trial % 4 == 0
                else good[:at] + bytes([good[at] ^ 1 << pick.randrange(8)]) + good[at + 1 :]
            )
            path.write_bytes(bad)
            try:
                assert read() == expected, (path.name, at)
            except UserError as error:
                assert "\n" not in str(error) and path.name in str(error)
                refused += 1
        path.write_bytes(good)
    assert refused > 100


def read_xnli(folder):
    return archives.read_xnli(
        folder / "XNLI-1.0.zip", folder / "XNLI-MT-1.0.zip", {"en": None, "de": None}, {"en": None}
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["xnli", "--languages", "en", "xx"], "--languages: invalid choice: 'xx' (choose from "),
        (
            ["xnli", "--train-languages", "english"],
            "--train-languages: invalid choice: 'english' (choose from ",
        ),
        (
            ["massive", "--languages", "de_de"],
            "--languages: 'de_de', expected a code as de or zh-CN",
        ),
        (["massive", "--intents", "1"], "--intents 1: expected 0 (all) or 2 and more"),
        (["massive", "--intents", "-1"], "--intents: -1, expected 0 or more"),
        (["massive", "--balance", "--seed", "-1"], "--seed: -1, expected 0 or more"),
    ],
)
def test_wrong_flags(tmp_path, script, arguments, message):
    status, _, err = script("data", *arguments, "--out", tmp_path / "set", "--archives", tmp_path)
    assert status == 2 and message in err and not (tmp_path / "set").exists()


# --- writing into a folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "labels.txt").write_text("no\nyes\n"), "(other labels)"),
        (
            lambda folder: (folder / "test.fr.tsv").write_text("text\tlabel\nx\tno\n"),
            "(test.fr.tsv)",
        ),
        (
            lambda folder: ((folder / "labels.txt").unlink(), (folder / "test.fr.tsv").touch()),
            "(test.fr.tsv)",
        ),
    ],
)
def test_another_data_set_is_not_written_over(tmp_path, script, change, message):
    archives = write_zips(tmp_path / "archives", xnli_members())
    command = ["xnli", "--archives", archives, "--out", tmp_path / "xnli", "--languages", "en"]
    assert script("data", *command)[0] == 0
    assert script("data", *command)[0] == 0  # the same again is welcome
    change(tmp_path / "xnli")
    before = {path: path.read_bytes() for path in (tmp_path / "xnli").iterdir()}
    sentence = refusal(script("data", *command))
    assert (
        f"{tmp_path / 'xnli'} holds another data set {message}: give another --out, or delete it"
        in sentence
    )
    assert {path: path.read_bytes() for path in (tmp_path / "xnli").iterdir()} == before


def test_a_full_disk_leaves_whole_files_and_can_be_gone_on_from(tmp_path, script, monkeypatch):
    archives = write_zips(tmp_path / "archives", xnli_members())
    command = ["xnli", "--archives", archives, "--out", tmp_path / "xnli", "--languages", "en"]
    assert script("data", *command[:4], tmp_path / "whole", *command[5:])[0] == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    real, opened = folders.write_atomic, []

    def write_atomic(path):
        opened.append(path)
        if len(opened) == 3:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(folders, "write_atomic", write_atomic)
    assert "No space left on device" in refusal(script("data", *command))
    left = {path.name: path.read_bytes() for path in (tmp_path / "xnli").iterdir()}
    assert len(left) == 2 and left.items() < whole.items()
    monkeypatch.undo()
    data.main([str(argument) for argument in command])
    assert {path.name: path.read_bytes() for path in (tmp_path / "xnli").iterdir()} == whole


# --- MASSIVE -----------------------------------------------------------------------------------------------------


def massive_rows(locale, split, intents):
    return [["text", "label"]] + [
        [record["utt"], record["intent"]]
        for record in massive_records(locale)
        if record["partition"] == split and record["intent"] in intents
    ]


@pytest.mark.parametrize(
    "flags, intents",
    [
        (
            [],
            ["alarm", "joke", "play", "weather"],
        ),  # news and joke tie: the first by name, though the second in the file
        (["--intents", 2], ["alarm", "play"]),
        (["--intents", 0], ["alarm", "cook", "joke", "news", "play", "weather"]),
    ],
)
def test_massive_keeps_the_most_frequent_intents(tmp_path, script, flags, intents):
    counts = Counter(
        record["intent"] for record in massive_records("en-US") if record["partition"] == "train"
    )
    assert list(counts).index("news") < list(counts).index("joke")
    assert set(intents) <= set(counts) and min(counts[i] for i in intents) >= max(
        [count for intent, count in counts.items() if intent not in intents], default=0
    )
    write_massive(tmp_path, massive_members())
    status, _, err = script(
        "data",
        "massive",
        "--archives",
        tmp_path,
        "--out",
        tmp_path / "set",
        *flags,
        "--languages",
        "en",
        "zh",
        "--train-languages",
        "de",
    )
    assert status == 0
    assert (tmp_path / "set" / "labels.txt").read_text().split() == intents
    locales = {"en": "en-US", "de": "de-DE", "zh": "zh-CN"}  # not zh-TW, though it comes first
    written = {path.name: read_plain(path) for path in (tmp_path / "set").glob("*.tsv")}
    assert written == {
        f"{split}.{language}.tsv": massive_rows(locales[language], split, intents)
        for split, language in [
            ("train", "de"),
            ("dev", "en"),
            ("test", "en"),
            ("dev", "zh"),
            ("test", "zh"),
        ]
    }
    sources = json.loads((tmp_path / "set" / "sources.json").read_text())
    assert sources["dev.zh.tsv"]["member"] == "1.0/data/zh-CN.jsonl"
    assert (
        "dataset-1.0.tar.gz, partition train has 28 rows where the published train set has 11,514"
        in err
    )
    assert len(err.splitlines()) == 3  # the archive's rows are counted, once a partition


@pytest.mark.parametrize(
    "languages, more, locales, train",
    [
        ("zh-CN zh-TW pt-PT", [], {"zh-CN": "zh-CN", "zh-TW": "zh-TW", "pt-PT": "pt-PT"}, "en"),
        (
            "en-US zh_TW zh zh-CN pt",
            [],
            {"en-US": "en-US", "zh_TW": "zh-TW", "zh": "zh-CN", "zh-CN": "zh-CN", "pt": "pt-PT"},
            "en-US",
        ),
        ("de", ["--train-languages", "zh-TW"], {"de": "de-DE"}, "zh-TW"),
    ],
)
def test_massive_takes_the_archives_own_codes(tmp_path, script, languages, more, locales, train):
    write_massive(tmp_path, massive_members())
    assert (
        script(
            "data",
            "massive",
            "--archives",
            tmp_path,
            "--out",
            tmp_path / "set",
            "--languages",
            *languages.split(),
            *more,
        )[0]
        == 0
    )
    intents = ["alarm", "joke", "play", "weather"]  # of English train, whatever is asked for
    expected = {
        f"{split}.{code}.tsv": massive_rows(locale, split, intents)
        for split in ("dev", "test")
        for code, locale in locales.items()
    }
    expected[f"train.{train}.tsv"] = massive_rows(
        {"en": "en-US"}.get(train, train), "train", intents
    )
    assert {path.name: read_plain(path) for path in (tmp_path / "set").glob("*.tsv")} == expected
    assert set(data.split_languages(tmp_path / "set", "dev")) == set(locales)
    assert data.train_language(tmp_path / "set") == train


@pytest.mark.parametrize("command", ["xnli", "massive"])
def test_a_mistake_of_ours_is_not_called_a_damaged_archive(tmp_path, script, monkeypatch, command):
    write_zips(tmp_path, xnli_members())
    write_massive(tmp_path, massive_members())

    def broken(text):
        raise ZeroDivisionError("a bug in a fork")

    monkeypatch.setattr(archives, "clean", broken)
    with pytest.raises(ZeroDivisionError, match="a bug in a fork"):
        data.main(
            [
                command,
                "--archives",
                str(tmp_path),
                "--out",
                str(tmp_path / "set"),
                "--languages",
                "en",
            ]
        )


def test_balance_repeats_train_rows_only_and_is_seeded(tmp_path, script):
    write_massive(tmp_path, massive_members())
    folders = {name: tmp_path / name for name in ("plain", "seed 0", "seed 0 again", "seed 1")}
    for name, folder in folders.items():
        flags = [] if name == "plain" else ["--balance", "--seed", name.split()[1]]
        assert (
            script(
                "data",
                "massive",
                "--archives",
                tmp_path,
                "--out",
                folder,
                "--languages",
                "en",
                "--intents",
                0,
                *flags,
            )[0]
            == 0
        )
    rows = {name: read_plain(folder / "train.en.tsv")[1:] for name, folder in folders.items()}
    assert set(Counter(label for _, label in rows["seed 0"]).values()) == {9}
    assert {text for text, _ in rows["seed 0"]} == {text for text, _ in rows["plain"]}
    copies = Counter(map(tuple, rows["seed 0"]))
    for label in {label for _, label in copies}:  # no row is repeated twice more than another
        mine = [count for (_, other), count in copies.items() if other == label]
        assert max(mine) - min(mine) <= 1
    assert rows["seed 0"] == rows["seed 0 again"] != rows["seed 1"]
    for split in ("dev", "test"):
        assert read_plain(folders["seed 0"] / f"{split}.en.tsv") == read_plain(
            folders["plain"] / f"{split}.en.tsv"
        )


def record(**changes):
    return (
        json.dumps({"id": "1", "partition": "train", "intent": "play", "utt": "x", **changes})
        + "\n"
    ).encode()


BAD_LINES = {
    "cut": b'{"id": "1", "partition"\n',
    "blank": b"\n",
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "no utt": b'{"id": "1", "partition": "train", "intent": "play"}\n',
    "partition": record(partition="valid"),
    "intent": record(intent=3),
    "text": record(utt=None),
    "half a pair": record(utt="\ud83d"),
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_massive_refuses_a_bad_line(tmp_path, script, case):
    members = massive_members()
    lines = json_lines(members["1.0/data/de-DE.jsonl"]).splitlines(keepends=True)
    members["1.0/data/de-DE.jsonl"] = b"".join(lines[:2] + [BAD_LINES[case]] + lines[3:])
    write_massive(tmp_path, members)
    sentence = refusal(
        script(
            "data",
            "massive",
            "--archives",
            tmp_path,
            "--out",
            tmp_path / "set",
            "--languages",
            "en",
            "de",
        )
    )
    assert (
        "amazon-massive-dataset-1.0.tar.gz:1.0/data/de-DE.jsonl, line 3: expected a JSON object with id, partition "
        "(train, dev or test), intent and utt"
    ) in sentence
    assert not (tmp_path / "set").exists()


def drop(members, name):
    del members[name]


def swap(members, name):
    rows = members[name]
    i, j = [i for i, row in enumerate(rows) if row["partition"] == "dev"][1:3]
    rows[i], rows[j] = rows[j], rows[i]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda members: drop(members, "1.0/data/de-DE.jsonl"),
            "has no member 1.0/data/de-*.jsonl",
        ),
        (
            lambda members: drop(members, "1.0/data/en-US.jsonl"),
            "has no member 1.0/data/en-*.jsonl",
        ),
        (
            lambda members: drop(members, "1.0/data/zh-CN.jsonl"),
            "has no member 1.0/data/zh-CN.jsonl",
        ),
        (
            lambda members: swap(members, "1.0/data/de-DE.jsonl"),
            ", partition dev: de is not row-parallel with en: other ids or labels",
        ),
        (
            lambda members: members.update({"1.0/data/de-DE.jsonl": b""}),
            "partition train has no rows for the language 'de'",
        ),
        (
            lambda members: members.update({"1.0/data/de-DE.jsonl": b"\xff\n"}),
            "de-DE.jsonl, line 1: not UTF-8 (byte 0xff at 0)",
        ),
        (
            lambda members: [
                row.update(intent="play") for rows in members.values() for row in rows
            ],
            "1.0/data/en-US.jsonl: 1 intents in the train partition, expected two or more",
        ),
    ],
)
def test_massive_refuses_what_does_not_fit_together(tmp_path, script, change, message):
    members = massive_members()
    change(members)
    path = write_massive(tmp_path, members)
    sentence = refusal(
        script(
            "data",
            "massive",
            "--archives",
            tmp_path,
            "--out",
            tmp_path / "set",
            "--languages",
            "de",
            "zh",
        )
    )
    assert str(path) in sentence and message in sentence
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda content: content[: len(content) // 2],
            "is damaged or cut short (Compressed file ended",
        ),
        (lambda content: content[:-9], "is damaged or cut short (Compressed file ended"),
        (
            lambda content: content.replace(b'de-DE \\"7', b'de-DE \\"8', 1),
            "is damaged or cut short (CRC check failed",
        ),
        (
            lambda content: b"<html>moved</html>",
            "is damaged or cut short (file could not be opened successfully): delete it",
        ),
        (
            lambda content: b"",
            "is damaged or cut short (file could not be opened successfully): delete it",
        ),
    ],
)
def test_massive_refuses_a_damaged_archive(tmp_path, script, damage, message):
    path = write_massive(
        tmp_path, massive_members(), compresslevel=0
    )  # stored, so that one byte is one letter
    content = damage(path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    sentence = refusal(
        script(
            "data",
            "massive",
            "--archives",
            tmp_path,
            "--out",
            tmp_path / "set",
            "--languages",
            "en",
            "de",
        )
    )
    assert f"{path} {message}" in sentence
    assert not (tmp_path / "set").exists()


# --- the folder format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"text\tlabel\n", "holds a header and no rows"),
        (b"text\tlabel\nx\tno\nx\n", ", line 3: 1 columns, expected 2 (text, label)"),
        (b"text\tlabel\nx\ty\tno\n", ", line 2: 3 columns, expected 2 (text, label)"),
        (
            b"text\tlabel\nx\tno \n",
            ", line 2: unknown label 'no ', expected one of no, yes; 'no ' is not 'no'",
        ),
        (b"text\tlabel\nx\tno\n\xe4\tno\n", ", line 3: not UTF-8 (byte 0xe4 at 0)"),
        (b"t\xff\tlabel\n", ", line 1: not UTF-8 (byte 0xff at 1)"),
        (
            b"a sentence\tno\n",
            ", line 1: the header is ['a sentence', 'no'], expected text, or text_a and text_b, and label",
        ),
        (
            b"text\ttext_a\ttext_b\nx\ty\tz\n",
            ", line 1: the header is ['text', 'text_a', 'text_b'], expected text",
        ),
        (
            b"label\ttext\ttext\nno\tx\ty\n",
            ", line 1: the header is ['label', 'text', 'text'], expected text",
        ),
        (b"text_a\tlabel\nno\tx\n", ", line 1: the header is ['text_a', 'label'], expected text"),
        (b"label\nno\n", ", line 1: the header is ['label'], expected text"),
        (
            b"text\tlabel\nx\tno\n" + b"y" * (1 << 20) + b"\tno\n",
            ", line 3: longer than 1,048,576 bytes",
        ),
    ],
)
def test_read_table_names_the_place(tmp_path, content, message):
    path = tmp_path / "dev.en.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.read_table(path, ["no", "yes"], unknown=True)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'\xef\xbb\xbftext\tlabel\r\n"x\tyes\r\n y \tno', data.Rows(['"x', " y "], None, [1, 0])),
        (b"text\n\na\rb\xc2\x85\n", data.Rows(["", "a\rb\x85"], None, None)),
        (b"text_a\ttext_b\tlabel\nx\t\tno\n", data.Rows(["x"], [""], [0])),
        (b"id\tlabel\ttext_b\t\ttext_a\n7\tyes\tb\t?\ta\n", data.Rows(["a"], ["b"], [1])),
    ],
)
def test_read_table_takes_marks_crlf_any_text_and_columns_in_any_order(tmp_path, content, expected):
    (tmp_path / "x.tsv").write_bytes(content)
    rows, columns = data.read_table(tmp_path / "x.tsv", ["no", "yes"])
    assert rows == expected
    lines = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    assert [list(row) for row in zip(*([name, *cells] for name, cells in columns.items()))] == [
        line.split("\t") for line in lines
    ]
    data.write_table(tmp_path / "y.tsv", columns)
    assert (
        (tmp_path / "y.tsv")
        .read_text(encoding="utf-8")
        .splitlines(keepends=True)[-1]
        .endswith("\n")
    )
    assert data.read_table(tmp_path / "y.tsv", ["no", "yes"]) == (rows, columns)


def test_an_empty_label_is_unknown_only_where_that_is_allowed(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text("text\tlabel\nx\tyes\ny\t\nz\tno\n")
    assert data.read_table(path, ["no", "yes"], unknown=True)[0].labels == [1, -1, 0]
    with pytest.raises(
        UserError, match=r"in.tsv, line 3: unknown label '', expected one of no, yes$"
    ):
        data.read_table(path, ["no", "yes"])


@pytest.mark.parametrize("content", [b"no\nyes\nno\n", b"no\n", b"", b"no\n\n"])
def test_read_labels_wants_different_labels(tmp_path, content):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(
        UserError, match=r"labels.txt: expected two or more different labels, one a line, got \["
    ):
        data.read_labels(tmp_path)


def test_read_labels_and_split_name_what_is_missing(tmp_path, data_folder):
    with pytest.raises(UserError, match="is not a data set folder: it has no labels.txt"):
        data.read_labels(tmp_path)
    with pytest.raises(UserError, match=r"dev.fr.tsv does not exist; dev is there in: en de zh$"):
        data.read_split(data_folder, "dev", "fr", ["a", "b"])
    with pytest.raises(
        UserError, match=r"dev.en.tsv does not exist; dev is there in: no language$"
    ):
        data.read_split(tmp_path, "dev", "en", ["a", "b"])
    with pytest.raises(UserError, match=r"missing.tsv does not exist"):
        data.read_table(tmp_path / "missing.tsv")
    (tmp_path / "dev.en.tsv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"dev.en.tsv, line 1: no label column"):
        data.read_split(tmp_path, "dev", "en", ["a", "b"])


@pytest.mark.parametrize(
    "labels, label, message",
    [
        (
            ["tr\u00e8s", "mal"],
            "tre\u0300s",
            r"unknown label 'tre\u0300s', expected one of tr\u00e8s, mal; 'tre\\u0300s' is not 'tr\\xe8s'$",
        ),
        (["no ", "yes"], "no", "unknown label 'no', expected one of no , yes; 'no' is not 'no '$"),
        (
            ["no", "yes"],
            "no\u00a0",
            r"unknown label 'no\\xa0', expected one of no, yes; 'no\\xa0' is not 'no'$",
        ),
        (["no", "yes"], "No", "expected one of no, yes; 'No' is not 'no'$"),
        (["no", "yes"], "\u200bno", r"unknown label '\\u200bno', expected one of no, yes$"),
        (
            list("abcdefghi"),
            "x" * 99,
            f"unknown label '{'x' * 60}', expected one of a, b, c, d, e, f, g, h, \\.\\.\\.$",
        ),
    ],
)
def test_labels_that_print_alike_are_shown_as_code_points(labels, label, message):
    with pytest.raises(UserError, match="^dev.en.tsv, line 2: .*" + message):
        archives.label_index(label, labels, "dev.en.tsv, line 2")


CODES = ["de", "en", "pt-BR", "sr-Latn", "zh_Hant", "zh"]


@pytest.fixture
def coded(tmp_path):
    """A data set folder with codes as people have them."""
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    for code in CODES:
        for split in ("train", "dev"):
            write_tsv(tmp_path / f"{split}.{code}.tsv", [(code, "no"), (split, "yes")])
    return tmp_path


def test_language_codes_are_read_as_people_have_them(coded, script):
    assert data.split_languages(coded, "dev") == ["en", "de", "pt-BR", "sr-Latn", "zh", "zh_Hant"]
    assert data.split_languages(coded, "dev", first="zh_Hant")[:2] == ["zh_Hant", "de"]
    assert data.split_languages(coded, "test") == data.split_languages(coded / "none", "dev") == []
    sets = data.read_sets(coded, [("dev", code) for code in CODES], ["no", "yes"])
    assert {code: rows.text_a for (_, code), rows in sets.items()} == {
        code: [code, "dev"] for code in CODES
    }
    assert data.fingerprint(coded, sets) == {
        f"dev.{code}.tsv": hashlib.sha256((coded / f"dev.{code}.tsv").read_bytes()).hexdigest()
        for code in CODES
    }
    status, out, _ = script("data", "check", coded)
    assert (
        status == 0
        and {f"{split}.{code}" for code in CODES for split in ("train", "dev")} == cells(out).keys()
    )


def test_files_that_look_like_a_split_are_named_in_a_warning(coded, capsys):
    strange = [
        "dev.sr.Latn.tsv",
        "dev.tsv",
        "test.DE.TSV",
        "validation.de.tsv",
        "valid.de.tsv",
        "Train.de.tsv",
        "dev.d e.tsv",
    ]
    for name in [*strange, "notes.tsv", "development.tsv", ".dev.de.tsv.x.tmp", "dev.de.tsv.bak"]:
        (coded / name).touch()
    for _ in range(2):  # said once
        assert data.split_languages(coded, "dev") == [
            "en",
            "de",
            "pt-BR",
            "sr-Latn",
            "zh",
            "zh_Hant",
        ]
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(warnings) == sorted(
        f"warning: {coded / name} is not read: a split's file is named train, dev or test, a language code without a dot "
        "and .tsv, as dev.pt-BR.tsv"
        for name in strange
    )


def test_train_language_is_a_role(coded):
    assert data.train_language(coded) == "en" and data.train_language(coded, "sr-Latn") == "sr-Latn"
    (coded / "train.en.tsv").unlink()
    with pytest.raises(
        UserError,
        match="has train files in de pt-BR sr-Latn zh zh_Hant: say which with --train-language$",
    ):
        data.train_language(coded)
    with pytest.raises(
        UserError, match="train.en.tsv does not exist; train is there in: de pt-BR sr-Latn zh zh_H"
    ):
        data.train_language(coded, "en")
    for code in CODES[2:] + ["de"]:
        assert data.train_language(coded, code) == code
        if code != "zh_Hant":
            (coded / f"train.{code}.tsv").unlink()
    assert data.train_language(coded) == "zh_Hant"
    (coded / "train.zh_Hant.tsv").unlink()
    with pytest.raises(
        UserError, match=r"train.en.tsv does not exist; train is there in: no language$"
    ):
        data.train_language(coded)


def test_columns_that_are_not_read_are_named_once(tmp_path, capsys):
    write_tsv(
        tmp_path / "dev.en.tsv", [("7", "no", "b", "face", "a")], "id\tlabel\ttext_b\tgenre\ttext_a"
    )
    for _ in range(2):
        assert data.read_split(tmp_path, "dev", "en", ["no", "yes"]) == data.Rows(["a"], ["b"], [0])
    assert (
        capsys.readouterr().err
        == f"note: {tmp_path / 'dev.en.tsv'}: columns that are not read: id genre\n"
    )


def test_pairs_and_single_texts_do_not_mix(coded):
    labels, keys = ["no", "yes"], [("train", "en"), ("dev", "de")]
    assert list(data.read_sets(coded, keys, labels, pairs=False)) == keys
    with pytest.raises(
        UserError,
        match=r"train.en.tsv holds single texts \(text\), expected pairs \(text_a, text_b",
    ):
        data.read_sets(coded, keys, labels, pairs=True)
    write_tsv(coded / "dev.de.tsv", [("a", "b", "no")], "text_a\ttext_b\tlabel")
    with pytest.raises(
        UserError,
        match=r"dev.de.tsv holds pairs \(text_a, text_b\), expected single texts \(text\)",
    ):
        data.read_sets(coded, keys, labels)
    assert data.read_sets(coded, keys[1:], labels, pairs=True)["dev", "de"].text_b == ["b"]


@pytest.mark.parametrize("count", [1, 5, 7, 12])
def test_take_spreads_evenly_and_takes_the_same_rows_in_every_language(count):
    numbers = list(range(13))
    english = data.Rows([f"en {i}" for i in numbers], [f"b {i}" for i in numbers], numbers)
    german = data.Rows([f"de {i}" for i in numbers], None, None)
    taken = data.take(english, count).labels
    assert len(taken) == count and taken[0] == 0
    gaps = np.diff(taken + [13])  # the stretch that each taken row stands for
    assert gaps.min() >= 13 // count and gaps.max() <= -(-13 // count)
    assert data.take(english, count) == data.Rows(
        [f"en {i}" for i in taken], [f"b {i}" for i in taken], taken
    )
    assert data.take(german, count) == data.Rows([f"de {i}" for i in taken], None, None)
    assert data.take(english, None) == data.take(english, 13) == data.take(english, 99) == english


# --- the download ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server: `body` is sent (short of it by `cut` bytes), or `failure`; `asked` counts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            if server.failure:
                return self.send_error(server.failure)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body[: len(server.body) - server.cut])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.cut, server.failure, server.asked = b"", 0, None, 0
        server.url = f"http://127.0.0.1:{server.server_port}/set/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_massive_downloads_once_beside_the_data_set(tmp_path, server, script, monkeypatch):
    path = write_massive(tmp_path / "made", massive_members())
    server.body = path.read_bytes()
    monkeypatch.setattr(archives, "MASSIVE_URL", server.url + path.name)
    for _ in range(2):
        assert (
            script("data", "massive", "--out", tmp_path / "data" / "massive", "--languages", "en")[
                0
            ]
            == 0
        )
    assert (
        server.asked == 1
        and (tmp_path / "data" / "archives" / path.name).read_bytes() == server.body
    )
    assert [file.name for file in (tmp_path / "data" / "archives").iterdir()] == [path.name]
    assert read_plain(tmp_path / "data" / "massive" / "test.en.tsv")[1:]


@pytest.mark.parametrize(
    "cut, failure, message", [(0, 404, "HTTP Error 404: Not Found"), (7, None, "7 bytes")]
)
def test_a_download_that_fails_leaves_nothing(
    tmp_path, server, script, monkeypatch, cut, failure, message
):
    server.body, server.cut, server.failure = bytes(300_001), cut, failure
    monkeypatch.setattr(archives, "XNLI_URL", server.url + "XNLI-1.0.zip")
    sentence = refusal(script("data", "xnli", "--out", tmp_path / "data" / "xnli"))
    assert (
        f"{server.url}XNLI-1.0.zip: " in sentence
        and message in sentence
        and "--archives" in sentence
    )
    assert not list((tmp_path / "data").rglob("*.*"))


def test_no_server_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/set.zip: .*refused.*--archives$"):
        archives.find_archive("http://127.0.0.1:1/set.zip", None, tmp_path / "set")


# --- check -------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path):
    """5 train rows (one twice, two again in a third), 3 dev and 2 test rows, some of them in train."""
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    write_tsv(
        tmp_path / "train.en.tsv",
        [
            ("the refund", "no"),
            ("money", "yes"),
            ("the refund", "no"),
            ("the refund", "no"),
            ("agent", "no"),
        ],
    )
    write_tsv(tmp_path / "dev.en.tsv", [("money", "yes"), ("parcel late", "no"), ("agent", "no")])
    write_tsv(
        tmp_path / "dev.de.tsv",
        [("geld 猫 猫", "yes"), ("paket mensch berater das jetzt", "no"), ("mein", "no")],
    )
    write_tsv(tmp_path / "test.en.tsv", [("cancel", "yes"), ("order", "yes")])
    return tmp_path


def cells(out):
    """The check's lines by file, in columns: rows, smallest, largest, twice, in train (train: none), then the model's."""
    rows = [
        line.strip("| ").replace("|", " ").split()
        for line in out.splitlines()
        if line.startswith("| ")
    ]
    return {name: cells for name, *cells in rows[1:]}


def test_check_counts_rows_balance_repeats_and_overlap(odd_folder, script):
    status, out, _ = script("data", "check", odd_folder)
    assert (
        status == 0 and out.startswith(f"{odd_folder}: 2 labels: no yes\n") and "warning" not in out
    )
    assert cells(out) == {
        "train.en": ["5", "5", "20.0%", "80.0%", "2"],
        "dev.en": ["3", "3", "33.3%", "66.7%", "0", "2"],
        "dev.de": ["3", "3", "33.3%", "66.7%", "0", "0"],
        "test.en": ["2", "2", "0.0%", "100.0%", "0", "0"],
    }


def test_groups_come_from_the_column_else_from_first_texts(tmp_path, script):
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    write_tsv(
        tmp_path / "dev.en.tsv",
        [(t, "g" + t[0], "no") for t in ("b1", "a2", "b3", "c4")],
        "text\tgroup\tlabel",
    )
    rows = data.read_split(tmp_path, "dev", "en", ["no", "yes"])
    assert rows.groups == ["gb", "ga", "gb", "gc"]
    assert data.group_numbers(rows).tolist() == [0, 1, 0, 2]
    assert data.take(rows, 2).groups == ["gb", "gb"]
    assert data.group_numbers(rows._replace(text_b=["x"] * 4)).tolist() == [0, 1, 0, 2]
    assert data.group_numbers(data.Rows(list("baab"), list("wxyz"))).tolist() == [0, 1, 1, 0]
    assert data.group_numbers(data.Rows(list("baab"))).tolist() == [0, 1, 2, 3]
    assert data.group_numbers(rows).dtype == np.int64
    status, out, err = script("data", "check", tmp_path)
    assert status == 0 and err == "" and cells(out)["dev.en"][:2] == ["4", "3"]


def test_check_counts_unknown_tokens_and_cut_rows(odd_folder, script, model_folder):
    status, out, _ = script("data", "check", odd_folder, "--model", model_folder, "--max-length", 6)
    assert status == 0
    # dev.de with [CLS] and [SEP]: 5 tokens of which 2 are unknown, 7 (one over the limit), 3
    assert cells(out)["dev.de"][-3:] == ["5.0", f"{2 / 15:.2%}", "33.3%"]
    assert cells(out)["dev.en"][-3:] == [f"{(3 + 4 + 3) / 3:.1f}", "0.00%", "0.0%"]
    assert "cut: longer than 6 tokens" in out


@pytest.mark.parametrize(
    "rows", [[("geld", "yes"), ("mein", "yes"), ("x", "no")], [("geld", "yes"), ("mein", "no")]]
)
def test_check_notes_files_that_are_no_translations(odd_folder, script, rows):
    write_tsv(odd_folder / "dev.de.tsv", rows)
    status, out, _ = script("data", "check", odd_folder)
    assert status == 0 and "note: dev.de.tsv is not row-parallel with dev.en.tsv" in out


def test_check_counts_pairs_as_pairs(tmp_path, script):
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    header = "text_a\ttext_b\tlabel"
    write_tsv(
        tmp_path / "train.en.tsv", [("a", "b", "no"), ("a", "c", "no"), ("a", "b", "yes")], header
    )
    write_tsv(tmp_path / "test.en.tsv", [("a", "c", "no"), ("b", "a", "yes")], header)
    status, out, _ = script("data", "check", tmp_path)
    assert status == 0
    assert cells(out) == {
        "train.en": ["3", "1", "33.3%", "66.7%", "1"],
        "test.en": ["2", "2", "50.0%", "50.0%", "0", "1"],
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: (folder / "labels.txt").write_text("no\nno\n"),
            "labels.txt: expected two or more different labels",
        ),
        (
            lambda folder: (folder / "dev.en.tsv").write_text("text\tlabel\n"),
            "dev.en.tsv holds a header and no rows",
        ),
        (
            lambda folder: [path.unlink() for path in folder.glob("*.tsv")],
            "has no train, dev or test file",
        ),
        (lambda folder: (folder / "labels.txt").unlink(), "is not a data set folder"),
    ],
)
def test_check_refuses_a_broken_folder(odd_folder, script, change, message):
    change(odd_folder)
    assert message in refusal(script("data", "check", odd_folder))


# --- tokens and batches ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def with_template(model_folder, folder, single, pair, vocabulary=None):
    """Save the toy tokenizer with another post-processor (none for None) to `folder`."""
    name = Path(shutil.copytree(model_folder, folder)) / "tokenizer.json"
    content = json.loads(name.read_text())
    content["post_processor"] = single and json.loads(
        processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        ).__getstate__()
    )
    content["model"]["vocab"] = vocabulary or content["model"]["vocab"]
    name.write_text(json.dumps(content))
    return folder


FEW = {
    "[PAD]": 0,
    "[UNK]": 1,
    "[CLS]": 2,
    "[SEP]": 3,
    "[MASK]": 4,
    "z": 5,
}  # a and b are [UNK], a special token, too


@pytest.mark.parametrize(
    "single, pair, vocabulary, gives",
    [
        (None, None, None, "['a', 'b'] for ['a', 'b']"),
        (None, None, FEW, "['[UNK]', '[UNK]'] for ['a', 'b']"),
        ("[CLS] $A", "[CLS] $A $B:1", None, "['[CLS]', 'a', 'b'] for ['a', 'b']"),
        (
            "$A [SEP]",
            "$A [SEP] $B:1 [SEP]:1",
            None,
            "['a', '[SEP]', 'b', '[SEP]'] for ['a', 'b']",
        ),  # as T5
        (
            "[CLS] $A [SEP]",
            "[CLS] $A $B:1 [SEP]:1",
            None,
            "['[CLS]', 'a', 'b', '[SEP]'] for ['a', 'b']",
        ),
        (
            "[CLS] $A [SEP]",
            "[CLS] $A [SEP] $B:1",
            None,
            "['[CLS]', 'a', '[SEP]', 'b'] for ['a', 'b']",
        ),
        (
            "[CLS] $A [SEP]",
            "[CLS] $A $B:1 [SEP]:1",
            FEW,
            "['[CLS]', '[SEP]'] for ['', '']",
        ),  # only the empty texts tell
    ],
)
def test_tokenizers_that_do_not_mark_texts_are_refused(
    model_folder, tmp_path, single, pair, vocabulary, gives
):
    with pytest.raises(
        UserError, match="does not put a special token before a text, between two and after"
    ) as error:
        data.load_tokenizer(
            with_template(model_folder, tmp_path / "model", single, pair, vocabulary)
        )
    assert f"(it gives {gives})" in str(error.value) and "post_processor" in str(error.value)


def test_tokenizers_with_two_separators_are_taken(model_folder, tmp_path):
    folder = with_template(
        model_folder, tmp_path / "m", "[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]"
    )  # as XLM-R
    encoded = data.encode(
        data.load_tokenizer(folder), data.Rows(["", "a", ""], ["", "", "b"], None)
    )
    assert encoded.lengths.tolist() == [4, 5, 5]


def test_a_tokenizer_that_cannot_be_had_is_named(model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        ("./nowhere", "nowhere: no such folder"),
        ("nowhere", "no tokenizer can be loaded from 'nowhere': "),
        (tmp_path / "empty", f"no tokenizer can be loaded from '{tmp_path / 'empty'}': "),
    ):
        with pytest.raises(UserError, match=message):
            data.load_tokenizer(name)


def some_rows(pairs):
    pick = np.random.default_rng(2)
    words = "money refund geld 钱 退款 猫 x. the".split()
    texts = [
        [" ".join(pick.choice(words, pick.integers(0, 9))) for _ in range(11)] for _ in range(2)
    ]
    return data.Rows(
        texts[0], texts[1] if pairs else None, [int(i) for i in pick.integers(3, size=11)]
    )


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("chunk", [4, 8192])
def test_encode_and_collate_equal_the_tokenizer(tokenizer, pairs, chunk):
    rows = some_rows(pairs)
    encoded = data.encode(tokenizer, rows, max_length=10, chunk=chunk)
    each = []  # in lists of one: a bare empty second text would be taken for no second text
    for a, b in zip(rows.text_a, rows.text_b or [None] * 11):
        tokens = tokenizer(
            [a], None if b is None else [b], truncation="longest_first", max_length=10
        )
        each.append({name: values[0] for name, values in tokens.items()})
    assert (
        max(len(row["input_ids"]) for row in each)
        == 10
        > min(len(row["input_ids"]) for row in each)
    )
    assert encoded.lengths.tolist() == [len(row["input_ids"]) for row in each]
    assert encoded.labels.tolist() == rows.labels
    for i, row in enumerate(each):
        assert encoded.ids[encoded.starts[i] : encoded.starts[i + 1]].tolist() == row["input_ids"]
    for chosen in ([3, 0, 7, 10, 1], [int(np.argmin(encoded.lengths))], range(11)):
        batch = data.collate(encoded, np.array(chosen), tokenizer.pad_token_id)
        padded = tokenizer.pad([each[i] for i in chosen], pad_to_multiple_of=8, return_tensors="np")
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[name].dtype == np.int64 and batch[name].tolist() == padded[name].tolist()
        assert batch["labels"].tolist() == [rows.labels[i] for i in chosen]


def test_encode_without_labels_and_with_many_unknown_tokens(tokenizer, capsys):
    encoded = data.encode(tokenizer, data.Rows(["猫", "money the"], None, None))
    assert encoded.labels.tolist() == [-1, -1]
    assert (
        capsys.readouterr().err == "warning: 14% of the tokens are unknown to the tokenizer\n"
    )  # 1 of 3 + 4
    data.encode(tokenizer, data.Rows(["money the"], None, [0]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "length, limit, width",
    [(3, None, 8), (8, 64, 8), (9, 64, 16), (61, 63, 63), (63, 63, 63), (7, 7, 7)],
)
def test_collate_rounds_up_to_eight_or_the_limit(length, limit, width):
    encoded = data.Encoded(
        np.arange(length + 2, dtype=np.int32),
        np.array([0, 2, length + 2]),
        np.array([2, length]),
        np.array([0, 1]),
    )
    batch = data.collate(encoded, np.array([0, 1]), pad_id=99, limit=limit)
    assert batch["input_ids"].shape == (2, width)
    assert (
        (batch["input_ids"] == 99).sum()
        == 2 * width - length - 2
        == (batch["attention_mask"] == 0).sum()
    )


@pytest.mark.parametrize("rows, size", [(131, 13), (130, 13), (5, 13), (1, 1)])
def test_batches_hold_every_row_once_and_follow_seed_and_epoch(rows, size):
    lengths = np.random.default_rng(4).integers(3, 60, size=rows)

    def plain(batches):
        return [batch.tolist() for batch in batches]

    first = plain(data.train_batches(lengths, size, seed=1, epoch=0))
    for batches in (first, plain(data.sorted_batches(lengths, size))):
        assert sorted(sum(batches, [])) == list(range(rows))
    assert (
        sorted(map(len, first))[1:] == [size] * (rows // size - (rows % size == 0))
        and max(map(len, first)) <= size
    )
    widths = [-(-max(lengths[batch]) // 8) * 8 for batch in batches]
    assert all(
        len(batch) == max(1, size * 24 // width) for batch, width in zip(batches[:-1], widths)
    )  # 24 tokens a row
    assert plain(data.train_batches(lengths, size, seed=1, epoch=0)) == first
    if rows > size:
        others = [
            plain(data.train_batches(lengths, size, seed, epoch))
            for seed, epoch in ((1, 1), (2, 0), (0, 1))
        ]
        assert all(a != b for a, b in itertools.combinations([first, *others], 2))
        longest = [max(lengths[batch]) for batch in first]
        assert longest != sorted(longest) and longest != sorted(
            longest, reverse=True
        )  # batches come in random order


def test_batches_mix_lengths_no_more_than_they_must():
    """A batch holds rows of one rounded length, but where the rows of that length run out."""
    lengths = np.random.default_rng(4).integers(3, 60, size=500)
    buckets = [
        set(-(-lengths[batch] // 8)) for batch in data.train_batches(lengths, 13, seed=0, epoch=0)
    ]
    assert sum(len(bucket) - 1 for bucket in buckets) <= len(set(-(-lengths // 8))) - 1
    widths = np.concatenate([lengths[batch] for batch in data.sorted_batches(lengths, 13)])
    assert widths.tolist() == sorted(lengths, reverse=True)
    batches = data.sorted_batches(lengths, 13, window=200)
    assert [sorted(set(row // 200 for row in batch)) for batch in batches] == sorted(
        [row // 200] for row, *_ in batches
    )
    assert sorted(np.concatenate(batches)) == list(range(500)) and lengths[batches[0]].min() > 50


# --- the real archives -------------------------------------------------------------------------------------------

LANGUAGES = "en zh es de ar ur fr".split()
needs_archives = pytest.mark.skipif(
    not (SHARED / "XNLI-1.0.zip").is_file(), reason="the real archives are not in shared/data"
)


@pytest.fixture(scope="module")
def real_xnli(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "xnli"
    data.main(
        [
            "xnli",
            "--archives",
            str(SHARED),
            "--out",
            str(out),
            "--languages",
            *LANGUAGES,
            "--train-languages",
            "en",
            "de",
            "es",
            "fr",
            "zh",
        ]
    )
    return out


@needs_archives
def test_real_xnli(real_xnli):
    rows = {path.name: read_plain(path)[1:] for path in real_xnli.glob("*.tsv")}
    counts = {
        "train.en.tsv": 52_110,
        **{f"train.{language}.tsv": 9_000 for language in ("de", "es", "fr", "zh")},
    }
    for language in LANGUAGES:
        counts |= {f"dev.{language}.tsv": 2_490, f"test.{language}.tsv": 5_010}
    assert {name: len(found) for name, found in rows.items()} == counts
    with zipfile.ZipFile(SHARED / "XNLI-1.0.zip") as opened:
        lines = io.TextIOWrapper(opened.open(DEV), encoding="utf-8", newline="")
        source = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for language in LANGUAGES:
        assert rows[f"dev.{language}.tsv"] == [
            [row["sentence1"], row["sentence2"], row["gold_label"]]
            for row in source
            if row["language"] == language
        ]
        assert Counter(row[-1] for row in rows[f"test.{language}.tsv"]) == dict.fromkeys(
            archives.XNLI_LABELS, 1_670
        )
    assert {row[-1] for row in rows["train.en.tsv"]} == set(archives.XNLI_LABELS)


@needs_archives
def test_real_massive(tmp_path, script):
    status, _, err = script(
        "data",
        "massive",
        "--archives",
        SHARED,
        "--out",
        tmp_path / "all",
        "--languages",
        *LANGUAGES,
        "--intents",
        0,
    )
    assert status == 0 and err == ""
    counts = {path.name: len(read_plain(path)) - 1 for path in (tmp_path / "all").glob("*.tsv")}
    expected = {
        f"{split}.{language}.tsv": rows
        for split, rows in (("dev", 2_033), ("test", 2_974))
        for language in LANGUAGES
    }
    assert counts == {"train.en.tsv": 11_514, **expected}
    assert len((tmp_path / "all" / "labels.txt").read_text().split()) == 60

    assert (
        script(
            "data",
            "massive",
            "--archives",
            SHARED,
            "--out",
            tmp_path / "four",
            "--languages",
            "en",
            "ur",
            "--balance",
        )[0]
        == 0
    )
    with tarfile.open(SHARED / "amazon-massive-dataset-1.0.tar.gz") as opened:
        records = [json.loads(line) for line in opened.extractfile("1.0/data/en-US.jsonl")]
    intents = Counter(row["intent"] for row in records if row["partition"] == "train").most_common(
        4
    )
    train = Counter(label for _, label in read_plain(tmp_path / "four" / "train.en.tsv")[1:])
    assert train == {intent: intents[0][1] for intent, _ in intents}
    test = Counter(row["intent"] for row in records if row["partition"] == "test")
    for language in ("en", "ur"):
        rows = read_plain(tmp_path / "four" / f"test.{language}.tsv")[1:]
        assert Counter(label for _, label in rows) == {
            intent: test[intent] for intent, _ in intents
        }


@needs_archives
def test_padding_stays_under_a_tenth_on_multinli(real_xnli):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "bert-base-multilingual-uncased")
    rows = data.take(data.read_split(real_xnli, "train", "en", archives.XNLI_LABELS), 20_000)
    encoded = data.encode(tokenizer, rows)
    tokens = 0
    for batch in data.train_batches(encoded.lengths, 32, seed=0, epoch=1):
        width = data.collate(encoded, batch, tokenizer.pad_token_id, limit=128)["input_ids"].shape[
            1
        ]
        assert width % 8 == 0
        tokens += width * len(batch)
    assert 0 < 1 - len(encoded.ids) / tokens < 0.1
