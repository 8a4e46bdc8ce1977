"""data.py and lib/archives.py against hand-made archives, counts, csv and the tokenizer itself."""

import csv
import hashlib
import http.server
import io
import itertools
import json
import os
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from lib import archives
from lib.messages import UserError

XNLI_COLUMNS = ["language", "gold_label", "pairID", "sentence1", "sentence2", "genre"]
DEV, TEST = "XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv"
TRAIN_EN, TRAIN_DE = (f"XNLI-MT-1.0/multinli/multinli.train.{code}.tsv" for code in ("en", "de"))
PAIRS = {  # language: (premise, hypothesis) of three pairs, with what a careless reader trips over
    "ar": [('قال "نعم', "لا"), ("ب\u200fج", "د"), ("ه", "و")],
    "en": [('He said "so', 'A " is text'), ("  two  spaces ", "no\u00a0break"), ('""', '"quoted"')],
    "de": [('Er sagte „so"', "'ein"), ("Zeilen\u2028", "und\x85\x0b\x0c"), ("\\N", "NULL")],
    "zh": [("全角\u3000空格", "\ufeff不是开头"), ('他说"', "是"), ("中", "文")],
}
PAIR_LABELS = ["neutral", "contradiction", "entailment"]
TRAIN = [
    ('lone " quote', "a\rreturn", "contradictory"),
    (" lead", "trail ", "entailment"),
    ("Grüße 你好", "🙂", "neutral"),
]


# --- what the tests make --------------------------------------------------------------------------


def table(rows, newline="\n", bom=""):
    return (bom + "".join("\t".join(row) + newline for row in rows)).encode("utf-8")


def xnli_table(order, **form):
    """All languages' pairs, one pair after the other."""
    rows = [XNLI_COLUMNS]
    for i, language in itertools.product(range(3), order):
        rows.append([language, PAIR_LABELS[i], str(7 * i + 1), *PAIRS[language][i], ""])
    return table(rows, **form)


def write_xnli(folder):
    folder.mkdir()
    train = table([("premise", "hypo", "label"), *TRAIN], bom="\ufeff")
    with zipfile.ZipFile(folder / "XNLI-1.0.zip", "w") as archive:
        archive.writestr(DEV, xnli_table(PAIRS, newline="\r\n"))
        archive.writestr(TEST, xnli_table(list(PAIRS)[::-1]))
    with zipfile.ZipFile(folder / "XNLI-MT-1.0.zip", "w") as archive:
        archive.writestr(TRAIN_EN, train)
        archive.writestr(TRAIN_DE, train.replace(b"lead", b"Blei"))


def massive_records(language):
    """id, partition, intent, utt: intents in a known number, the partitions interleaved."""
    counts = {"play": 9, "alarm": 7, "weather": 5, "news": 3, "joke": 3, "cook": 1}
    rows = [("train", intent) for intent, count in counts.items() for _ in range(count)]
    rows += [(split, intent) for split in ("dev", "test") for intent in ["play", *counts]]
    random.Random(4).shuffle(rows)
    records = []
    for i, (split, intent) in enumerate(rows):
        records.append({"partition": split, "intent": intent, "utt": f'{language} "{i}', "id": i})
    return records


def write_massive(folder, **options):
    folder.mkdir(exist_ok=True)
    path = folder / "amazon-massive-dataset-1.0.tar.gz"
    with tarfile.open(path, "w:gz", **options) as archive:
        for locale in ("en-US", "de-DE", "zh-TW", "zh-CN", "pt-PT"):
            lines = [json.dumps(record) + "\n" for record in massive_records(locale)]
            info = tarfile.TarInfo(f"1.0/data/{locale}.jsonl")
            info.size = len("".join(lines))
            archive.addfile(info, io.BytesIO("".join(lines).encode()))
    return path


def write_tsv(path, rows, header="text\tlabel"):
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")


def read_plain(path):
    """All rows of a .tsv file, the header included, by Python's own csv."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def convert(tmp_path, script):
    """convert("xnli", flags) -> the folder that it made, or the sentence that it ended with."""

    def run(command, flags="", archives=("--archives", tmp_path / "archives"), out="set"):
        status, _, err = script("data", command, *archives, "--out", tmp_path / out, *flags.split())
        return tmp_path / out if status == 0 else refusal(status, err)

    return run


def refusal(status, err):
    """The one sentence that a run ended with."""
    assert status == 2 and "Traceback" not in err
    lines = [line for line in err.splitlines() if line and "B/s]" not in line]
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("data.py: error: "), err
    return lines[0]


# --- XNLI -----------------------------------------------------------------------------------------


def test_xnli_folder_holds_the_rows_by_hand(tmp_path, convert):
    write_xnli(tmp_path / "archives")
    folder = convert("xnli", "--languages en zh de zh --train-languages en de")
    assert (folder / "labels.txt").read_bytes() == b"entailment\nneutral\ncontradiction\n"
    header = [["text_a", "text_b", "label"]]
    train = [[a, b.replace("\r", " "), label] for a, b, label in TRAIN]
    train[0][2] = "contradiction"
    expected = {
        "train.en.tsv": header + train,
        "train.de.tsv": header + [[a.replace("lead", "Blei"), *cells] for a, *cells in train],
    }
    for split, language in itertools.product(("dev", "test"), ("en", "zh", "de")):
        rows = [[*pair, label] for pair, label in zip(PAIRS[language], PAIR_LABELS)]
        expected[f"{split}.{language}.tsv"] = header + rows
    assert {path.name: read_plain(path) for path in folder.glob("*.tsv")} == expected
    assert {path.name for path in folder.iterdir()} == {*expected, "labels.txt", "sources.json"}
    sources = json.loads((folder / "sources.json").read_text())
    digest = hashlib.sha256((folder / "dev.zh.tsv").read_bytes()).hexdigest()
    source = {"archive": "XNLI-1.0.zip", "member": DEV, "rows": 3, "sha256": digest}
    assert sources.keys() == expected.keys() and sources["dev.zh.tsv"] == source
    rows = data.read_split(folder, "dev", "de", data.read_labels(folder))  # and read back
    assert list(zip(rows.text_a, rows.text_b)) == PAIRS["de"] and rows.labels == [1, 2, 0]


def test_what_an_archive_lacks_is_named(tmp_path, convert):
    write_xnli(tmp_path / "archives")
    write_massive(tmp_path / "archives")
    for command, flags, message in [
        ("xnli", "en sw", f"XNLI-1.0.zip:{DEV} has no rows for the language 'sw'"),
        ("xnli", "en --train-languages fr", f"no member {TRAIN_EN.replace('.en.', '.fr.')}"),
        ("massive", "fr", "dataset-1.0.tar.gz has no member 1.0/data/fr-*.jsonl"),
        ("massive", "en --intents 1", "train has the labels ['play'], expected two or more"),
    ]:
        assert message in convert(command, f"--languages {flags}")
    (tmp_path / "archives" / "XNLI-1.0.zip").unlink()
    assert "it can be had from https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip" in convert("xnli")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["XNLI-1.0.zip", "amazon-massive-dataset-1.0.tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "byte", "no archive"])
def test_a_damaged_archive_is_one_sentence(tmp_path, convert, name, damage):
    write_xnli(tmp_path / "archives")
    write_massive(tmp_path / "archives", compresslevel=0)  # stored: one byte is one letter
    path = tmp_path / "archives" / name
    good = path.read_bytes()
    bad = {
        "cut": good[: len(good) // 2],
        "byte": good.replace(b"He said", b"he said").replace(b'de-DE \\"7', b'de-DE \\"8'),
        "no archive": b"<html>moved</html>",
    }[damage]
    assert bad != good
    path.write_bytes(bad)
    sentence = convert("xnli" if "XNLI" in name else "massive", "--languages en de")
    assert f"{path} is damaged or cut short (" in sentence
    assert sentence.endswith("): delete it and fetch it again") and not (tmp_path / "set").exists()


def test_another_data_set_is_not_written_over(tmp_path, convert):
    write_xnli(tmp_path / "archives")
    folder = convert("xnli", "--languages en")
    assert convert("xnli", "--languages en de") == folder  # the same and more is welcome
    before = contents(folder)
    message = f"{folder} holds another data set (dev.de.tsv): give another --out, or delete it"
    assert message in convert("xnli", "--languages en") and contents(folder) == before


# --- MASSIVE --------------------------------------------------------------------------------------


def massive_rows(locale, split, intents=("alarm", "joke", "play", "weather")):
    rows = [["text", "label"]]
    for record in massive_records(locale):
        if record["partition"] == split and record["intent"] in intents:
            rows.append([record["utt"], record["intent"]])
    return rows


@pytest.mark.parametrize(
    "flags, intents",
    [
        ("", "alarm joke play weather"),  # news and joke tie: the first by name
        ("--intents 2", "alarm play"),
        ("--intents 0", "alarm cook joke news play weather"),
    ],
)
def test_massive_keeps_the_most_frequent_intents(tmp_path, convert, flags, intents):
    intents = intents.split()
    write_massive(tmp_path / "archives")
    folder = convert("massive", f"{flags} --languages en zh --train-languages de")
    assert (folder / "labels.txt").read_text().split() == intents
    expected = {"train.de.tsv": massive_rows("de-DE", "train", intents)}
    for split in ("dev", "test"):
        expected[f"{split}.en.tsv"] = massive_rows("en-US", split, intents)
        expected[f"{split}.zh.tsv"] = massive_rows("zh-CN", split, intents)  # not zh-TW
    assert {path.name: read_plain(path) for path in folder.glob("*.tsv")} == expected
    sources = json.loads((folder / "sources.json").read_text())
    assert sources["dev.zh.tsv"]["member"] == "1.0/data/zh-CN.jsonl"


@pytest.mark.parametrize(
    "flags, locales, train",
    [
        ("zh-CN zh-TW pt-PT", "zh-CN zh-TW pt-PT", "en"),
        ("en-US zh_TW zh zh-CN pt", "en-US zh-TW zh-CN zh-CN pt-PT", "en-US"),
        ("de --train-languages zh-TW", "de-DE", "zh-TW"),
    ],
)
def test_massive_takes_the_archives_own_codes(tmp_path, convert, flags, locales, train):
    write_massive(tmp_path / "archives")
    folder = convert("massive", f"--languages {flags}")
    codes = dict(zip(flags.split(), locales.split()))
    source = {"en": "en-US"}.get(train, train)
    expected = {f"train.{train}.tsv": massive_rows(source, "train")}
    for split, (code, locale) in itertools.product(("dev", "test"), codes.items()):
        expected[f"{split}.{code}.tsv"] = massive_rows(locale, split)
    assert {path.name: read_plain(path) for path in folder.glob("*.tsv")} == expected
    assert set(data.split_languages(folder, "dev")) == set(codes)
    assert data.train_language(folder) == train


def test_balance_repeats_train_rows_only_and_is_seeded(tmp_path, convert):
    write_massive(tmp_path / "archives")
    rows = {}
    for name, flags in (
        ("plain", ""),
        ("a", "--balance"),
        ("b", "--balance"),
        ("c", "--balance --seed 1"),
    ):
        folder = convert("massive", f"--languages en --intents 0 {flags}", out=name)
        rows[name] = read_plain(folder / "train.en.tsv")[1:]
        assert read_plain(folder / "test.en.tsv") == read_plain(tmp_path / "plain" / "test.en.tsv")
    copies = Counter(map(tuple, rows["a"]))
    assert {text for text, _ in rows["a"]} == {text for text, _ in rows["plain"]}
    for label in {label for _, label in copies}:  # no row is repeated twice more than another
        counts = [count for (_, other), count in copies.items() if other == label]
        assert sum(counts) == 9 and max(counts) - min(counts) <= 1
    assert rows["a"] == rows["b"] != rows["c"]


# --- the download ---------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server: sends `body` short of `cut` bytes, or `failure`; `asked` counts."""

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
        server.path = f"http://127.0.0.1:{server.server_port}/amazon-massive-dataset-1.0.tar.gz"
        monkeypatch.setattr(data, "MASSIVE_URL", server.path)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_kept_beside_the_data_set_whole_or_not_at_all(tmp_path, server, convert):
    server.body = write_massive(tmp_path / "made").read_bytes()
    for cut, failure, message in (0, 404, "HTTP Error 404: Not Found"), (7, None, "7 bytes"):
        server.cut, server.failure = cut, failure
        sentence = convert("massive", archives=(), out="data/massive")
        assert server.path in sentence and message in sentence and "--archives" in sentence
        assert not list((tmp_path / "data").rglob("*.*"))
    server.cut = server.asked = 0
    for _ in range(2):
        folder = convert("massive", "--languages en", archives=(), out="data/massive")
    (path,) = (tmp_path / "data" / "archives").iterdir()
    assert server.asked == 1 and path.read_bytes() == server.body
    assert read_plain(folder / "test.en.tsv") == massive_rows("en-US", "test")


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, expected, lines",
    [
        (
            "x.tsv",
            b'\xef\xbb\xbfa\tb\r\n"x\tyes\r\n y \t',
            {"a": ['"x', " y "], "b": ["yes", ""]},
            [2, 3],
        ),
        ("x.tsv", b"a\tb\n\t\n1\t2\n\n\r\n", {"a": ["", "1"], "b": ["", "2"]}, [2, 3]),
        ("x.txt", b"a\n\nx\ry\xc2\x85\n\n", {"a": ["", "x\ry\x85", ""]}, [2, 3, 4]),
        (
            "x.csv",
            b'a,b\n"1,\n2",3\n\n"x ""y""",\n',
            {"a": ["1,\n2", 'x "y"'], "b": ["3", ""]},
            [2, 5],
        ),
        ("x.csv", b"\xef\xbb\xbfa;b\r\n1,5;2\r\n;\r\n", {"a": ["1,5"], "b": ["2"]}, [2]),
        ("x.CSV", b'"a\tb"\tc\n1\t2\n', {"a\tb": ["1"], "c": ["2"]}, [2]),
        ("x.csv", b"text\nno, comma\n", None, "line 2: 2 columns, expected 1 (text)"),
        (
            "x.jsonl",
            b'{"a": "1\\n", "b": 2}\n\n{"c": null, "a": "\xc3\xbc"}\n',
            {"a": ["1\n", "ü"], "b": ["2", ""], "c": ["", ""]},
            [1, 3],
        ),
        ("x.tsv", b"a\tb\nx\t\n\ny\tno\n", None, "line 3: 1 columns, expected 2 (a, b)"),
        ("x.tsv", b"a\tb\nx\ty\tno\n", None, "line 2: 3 columns, expected 2 (a, b)"),
        (
            "x.tsv",
            b"a\tb\nx\tno\n\xe4\tno\n",
            None,
            "line 3: not UTF-8 (byte 0xe4): save it as UTF-8",
        ),
        ("x.csv", b"a,b\n1,2\n3,\xff\n", None, "line 3: not UTF-8 (byte 0xff)"),
        ("x.csv", b'a,b\n1,2\n3,"4\n5,6\n', None, "line 3: unexpected end of data"),
        ("x.tsv", b"a\tb\ta\n", None, "line 1: two columns have one name: a, b, a"),
        ("x.tsv", b"a\tb\n", None, "holds no rows"),
        ("x.csv", b"", None, "holds no rows"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', None, "line 2: not a JSON object ("),
        ("x.jsonl", b'{"a": \n', None, "line 1: not a JSON object (Expecting value"),
        ("x.jsonl", b'{"a": "\\ud83d"}\n', None, "line 1: not a JSON object ('utf-8' codec"),
        ("x.xlsx", b"PK", None, "save it as CSV (in Excel: Save As, CSV UTF-8)"),
    ],
)
def test_tables_of_every_form(tmp_path, name, content, expected, lines):
    (tmp_path / name).write_bytes(content)
    if expected:
        columns, numbers = archives.read_columns(tmp_path / name)
        assert columns == expected and list(numbers) == lines
    else:
        with pytest.raises(UserError) as error:
            archives.read_columns(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and lines in str(error.value)


def test_what_is_written_is_read_again_by_others_and_by_us(tmp_path):
    columns = {"te,xt": ['a "b"', "x;\ny", "ü"], "label": ["", "1", "2"]}
    for form in ("csv", "jsonl", "tsv"):
        archives.write_columns(tmp_path / f"x.{form}", columns)
    for form in ("csv", "jsonl"):
        assert archives.read_columns(tmp_path / f"x.{form}")[0] == columns
    assert (tmp_path / "x.csv").read_bytes()[:3] == b"\xef\xbb\xbf"  # for spreadsheets
    with open(tmp_path / "x.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values()) for row in rows] == [list(row) for row in zip(*columns.values())]
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert read_plain(tmp_path / "x.tsv")[1:] == [['a "b"', ""], ["x; y", "1"], ["ü", "2"]]


def test_pipes_and_standard_input_and_output(tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"text\nhello\n")
    os.close(writer)
    assert archives.read_columns(f"/dev/fd/{reader}")[0] == {"text": ["hello"]}
    os.close(reader)
    for form, content in (None, "a\tb\n1\t2\n"), ("csv", "a,b\n1,2\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        columns, _ = archives.read_columns("-", form)
        assert columns == {"a": ["1"], "b": ["2"]}
        archives.write_columns("-", columns, form)
        assert capsys.readouterr().out == content
    with pytest.raises(UserError, match="missing.tsv does not exist$"):
        archives.read_columns(tmp_path / "missing.tsv")


@pytest.mark.parametrize(
    "labels, label, message",
    [
        (["tr\u00e8s", "mal"], "tre\u0300s", r"très, mal; 'tre\\u0300s' is not 'tr\\xe8s'$"),
        (["no ", "yes"], "no", "one of no , yes; 'no' is not 'no '$"),
        (["no", "yes"], "no\u00a0", r"'no\\xa0', .* no, yes; 'no\\xa0' is not 'no'$"),
        (["no", "yes"], "No", "'No' is not 'no'$"),
        (["no", "yes"], "", "'', expected one of no, yes$"),
        (list("abcdefghi"), "x" * 99, f"'{'x' * 60}', expected one of a, .*, g, h, \\.\\.\\.$"),
    ],
)
def test_labels_that_print_alike_are_shown_as_code_points(labels, label, message):
    with pytest.raises(UserError, match="^dev.en.tsv, line 2: unknown label .*?" + message):
        archives.label_index(label, labels, "dev.en.tsv, line 2")
    assert archives.label_index(labels[1], labels, "") == 1


# --- the folder format ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"no\nyes\nno\n", b"no\n", b"", b"no\n\n", b"no\n\nyes\n"])
def test_read_labels_wants_different_labels(tmp_path, content):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(
        UserError, match=r"labels.txt: expected two or more different labels, .* \["
    ):
        data.read_labels(tmp_path)
    (tmp_path / "labels.txt").write_bytes(b"no\r\nyes\r\n\r\n\n")  # empty lines at the end
    assert data.read_labels(tmp_path) == ["no", "yes"]


CODES = ["de", "en", "pt-BR", "sr-Latn", "zh_Hant", "zh"]


@pytest.fixture
def coded(tmp_path):
    """A data set folder with codes as people have them."""
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    for code, split in itertools.product(CODES, ("train", "dev")):
        write_tsv(tmp_path / f"{split}.{code}.tsv", [(code, "no"), (split, "yes")])
    return tmp_path


def test_read_split_names_what_is_wrong(coded):
    def message(split, language="en"):
        with pytest.raises(UserError) as error:
            data.read_split(coded, split, language, ["no", "yes"])
        return str(error.value)

    assert message("dev", "fr").endswith(
        "dev.fr.tsv does not exist; dev is there in: en de pt-BR sr-Latn zh zh_Hant"
    )
    assert message("test").endswith("test.en.tsv does not exist; test is there in: no language")
    for content, end in [
        ("text\nx\n", "line 1: no column 'label'; there are: 'text'"),
        ("a sentence\tno\nx\ty\n", "line 1: no column 'text'; there are: 'a sentence', 'no'"),
        ("text_a\tlabel\nx\tno\n", "line 1: no column 'text_b'; there are: 'text_a', 'label'"),
        ("text\tlabel\nx\tno\ny\t\n", "line 3: unknown label '', expected one of no, yes"),
    ]:
        (coded / "test.en.tsv").write_text(content)
        assert message("test") == f"{coded / 'test.en.tsv'}, {end}"
    with pytest.raises(UserError, match="is not a data set folder: it has no labels.txt"):
        data.read_labels(coded / "none")


def test_columns_in_any_order_and_those_not_read(tmp_path, capsys):
    header = "id\tlabel\ttext_b\tgenre\tgroup\ttext_a"
    write_tsv(tmp_path / "dev.en.tsv", [("7", "no", "b", "face", "g", "a")], header)
    for _ in range(2):  # said once
        rows = data.read_split(tmp_path, "dev", "en", ["no", "yes"])
        assert rows == data.Rows(["a"], ["b"], [0], ["g"])
    note = f"note: {tmp_path / 'dev.en.tsv'}: columns that are not read: id genre\n"
    assert capsys.readouterr().err == note


def test_language_codes_are_read_as_people_have_them(coded, script):
    assert data.split_languages(coded, "dev") == ["en", "de", "pt-BR", "sr-Latn", "zh", "zh_Hant"]
    assert data.split_languages(coded, "dev", first="zh_Hant")[:2] == ["zh_Hant", "de"]
    assert data.split_languages(coded, "test") == data.split_languages(coded / "none", "dev") == []
    sets = data.read_sets(coded, [("dev", code) for code in CODES], ["no", "yes"])
    for (_, code), rows in sets.items():
        assert rows.text_a == [code, "dev"]
    digest = hashlib.sha256((coded / "dev.pt-BR.tsv").read_bytes()).hexdigest()
    assert data.fingerprint(coded, [("dev", "pt-BR")]) == {"dev.pt-BR.tsv": digest}
    files = {f"{split}.{code}" for code in CODES for split in ("train", "dev")}
    assert cells(script("data", "check", coded)[1]).keys() == files


def test_files_that_look_like_a_split_are_named_in_a_warning(coded, capsys):
    strange = ["dev.sr.Latn.tsv", "dev.tsv", "test.DE.TSV", "valid.de.tsv", "dev.d e.tsv"]
    for name in [*strange, "notes.tsv", "development.tsv", ".dev.de.tsv.x.tmp", "dev.de.tsv.bak"]:
        (coded / name).touch()
    for _ in range(2):  # said once
        assert set(data.split_languages(coded, "dev")) == set(CODES)
    warnings = capsys.readouterr().err.splitlines()
    named = [line.partition(" is not read: a split's file is named ")[0] for line in warnings]
    assert sorted(named) == sorted(f"warning: {coded / name}" for name in strange)


def test_train_language_is_a_role(coded):
    assert data.train_language(coded) == "en" and data.train_language(coded, "sr-Latn") == "sr-Latn"
    (coded / "train.en.tsv").unlink()
    with pytest.raises(
        UserError, match="in de pt-BR .* zh zh_Hant: say which with --train-language$"
    ):
        data.train_language(coded)
    with pytest.raises(
        UserError, match="train.en.tsv does not exist; train is there in: de pt-BR "
    ):
        data.train_language(coded, "en")
    for code in ("de", "pt-BR", "sr-Latn", "zh"):
        (coded / f"train.{code}.tsv").unlink()
    assert data.train_language(coded) == "zh_Hant"
    (coded / "train.zh_Hant.tsv").unlink()
    with pytest.raises(UserError, match="train.en.tsv does not exist; train .* no language$"):
        data.train_language(coded)


def test_pairs_and_single_texts_do_not_mix(coded):
    labels, keys = ["no", "yes"], [("train", "en"), ("dev", "de")]
    assert list(data.read_sets(coded, keys, labels, pairs=False)) == keys
    message = r"train.en.tsv holds single texts \(text\), expected pairs \(text_a, text_b"
    with pytest.raises(UserError, match=message):
        data.read_sets(coded, keys, labels, pairs=True)
    write_tsv(coded / "dev.de.tsv", [("a", "b", "no")], "text_a\ttext_b\tlabel")
    with pytest.raises(UserError, match=r"dev.de.tsv holds pairs \(.*\), expected single texts"):
        data.read_sets(coded, keys, labels)
    assert data.read_sets(coded, keys[1:], labels, pairs=True)["dev", "de"].text_b == ["b"]


@pytest.mark.parametrize("count", [1, 5, 7, 12])
def test_take_spreads_evenly_and_takes_the_same_rows_in_every_language(count):
    numbers = list(range(13))
    english = data.Rows([f"en {i}" for i in numbers], None, numbers, [f"g {i}" for i in numbers])
    taken = data.take(english, count).labels
    assert len(taken) == count and taken[0] == 0
    gaps = np.diff(taken + [13])  # the stretch that each taken row stands for
    assert gaps.min() >= 13 // count and gaps.max() <= -(-13 // count)
    groups = [f"g {i}" for i in taken]
    assert data.take(english, count) == data.Rows([f"en {i}" for i in taken], None, taken, groups)
    assert data.take(data.Rows(numbers), count) == data.Rows(taken)
    assert data.take(english, None) == data.take(english, 13) == data.take(english, 99) == english


def test_groups_come_from_the_column_else_from_first_texts(tmp_path, script):
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    texts = [("b1", "gb", "no"), ("a2", "ga", "no"), ("b3", "gb", "no"), ("c4", "gc", "no")]
    write_tsv(tmp_path / "dev.en.tsv", texts, "text\tgroup\tlabel")
    rows = data.read_split(tmp_path, "dev", "en", ["no", "yes"])
    for other in (rows, rows._replace(text_b=["x"] * 4)):
        assert data.group_numbers(other).tolist() == [0, 1, 0, 2]
    assert data.group_numbers(data.Rows(list("baab"), list("wxyz"))).tolist() == [0, 1, 1, 0]
    assert data.group_numbers(data.Rows(list("baab"))).tolist() == [0, 1, 2, 3]
    assert data.group_numbers(rows).dtype == np.int64
    status, out, err = script("data", "check", tmp_path)
    assert status == 0 and err == "" and cells(out)["dev.en"][:2] == ["4", "3"]


# --- a user's own tables --------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, script):
    """own(flags, a=rows) writes a.csv and runs data.py own -> (status, stdout, stderr)."""

    def run(flags, columns="id body queue", out="set", **tables):
        for name, rows in tables.items():
            with open(tmp_path / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([columns.split(), *rows])
        flags = flags.replace("=", f"={tmp_path}/").split()
        names = ["--text", "body", "--label", "queue"]
        return script("data", "own", "--out", tmp_path / out, *names, *flags)

    return run


TICKETS = [(i, f"text {i // 2}", "abac"[i % 4] if i < 12 else "b") for i in range(30)]


def test_own_makes_a_folder_with_labels_by_falling_count(tmp_path, own):
    dev = [(1, "an\tein\r\nzwei", "a "), (2, "zwei", ""), (3, " ", "b"), (4, "drei", "c")]
    flags = "--train en=en.csv --dev de=de.csv en=en.csv --test fr=de.csv"
    status, out, err = own(flags, en=TICKETS, de=dev)
    folder = tmp_path / "set"
    assert status == 0 and cells(out)["dev.de"][0] == "2"
    counts = Counter(label for *_, label in TICKETS)
    assert counts == {"b": 21, "a": 6, "c": 3}
    assert (folder / "labels.txt").read_text() == "b\na\nc\n"
    train = read_plain(folder / "train.en.tsv")
    assert train == [["text", "label"], *([text, label] for _, text, label in TICKETS)]
    assert train == read_plain(folder / "dev.en.tsv")
    assert read_plain(folder / "dev.de.tsv")[1:] == [["an ein  zwei", "a"], ["drei", "c"]]
    source = json.loads((folder / "sources.json").read_text())["dev.de.tsv"]
    digest = hashlib.sha256((folder / "dev.de.tsv").read_bytes()).hexdigest()
    columns = {"text": "body", "label": "queue"}
    files = [str(tmp_path / "de.csv")]
    assert source == {"files": files, "columns": columns, "rows": 2, "sha256": digest}
    assert "de.csv, line 4: no body or no queue; rows left out for that: 2\n" in err
    assert (
        "en.csv, line 3: 'b', in line 2 'a', for the same text; such rows, which are kept: 6" in err
    )


def test_labels_with_one_count_stand_by_name_and_files_of_a_language_are_joined(tmp_path, own):
    rows = [(1, "x", "zeta"), (2, "y", "alpha")]
    flags = "--train en=a.csv en=b.csv --hold-out 0"
    assert own(flags, a=rows, b=[(3, "z", "mu"), (4, "w", "mu")])[0] == 0
    assert (tmp_path / "set" / "labels.txt").read_text() == "mu\nalpha\nzeta\n"
    assert [row[0] for row in read_plain(tmp_path / "set" / "train.en.tsv")[1:]] == list("xyzw")
    assert not (tmp_path / "set" / "dev.en.tsv").exists()


@pytest.mark.parametrize("group", ["body", "thread"])
def test_hold_out_takes_whole_groups_of_each_class(tmp_path, own, group):
    columns, rows = "id body queue thread", []
    for i in range(120):  # threads of three, each of one class: 20 of a, 12 of b, 7 of c, 1 of d
        label = "a" * 20 + "b" * 12 + "c" * 7 + "d"
        text = f"text {i}" if group == "thread" else f"text {i // 3}"  # or the same text thrice
        rows.append((i, text, label[i // 3], f"t{i // 3}"))
    random.Random(1).shuffle(rows)
    for out, seed in ("one", 0), ("two", 0), ("three", 5):
        flags = f"--train en=x.csv de=x.csv --dev de=x.csv --group {group} --hold-out 0.2"
        assert own(f"{flags} --seed {seed}", columns, out, x=rows)[0] == 0
        assert len(read_plain(tmp_path / out / "train.de.tsv")) == 121  # de has its dev
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    train, dev = (
        read_plain(tmp_path / "one" / f"{split}.en.tsv")[1:] for split in ("train", "dev")
    )
    assert dev != read_plain(tmp_path / "three" / "dev.en.tsv")[1:]
    assert sorted(row[0] for row in train + dev) == sorted(row[1] for row in rows)
    assert not {row[2] for row in train} & {row[2] for row in dev}
    groups = Counter(label for _, label in {(row[2], row[1]) for row in dev})
    assert groups == {"a": 4, "b": 2, "c": 1}  # a fifth of 20, 12 and 7; the only one of d stays


@pytest.mark.parametrize(
    "flags, rows, message",
    [
        (
            "--train en=a.csv --dev de=b.csv",
            [(1, "x", "z")],
            "b.csv, line 2: unknown label 'z', expected one of a, b, c",
        ),
        (
            "--train en=a.csv --label who",
            [],
            "a.csv, line 1: no column 'who'; there are: 'id', 'body', 'queue'",
        ),
        (
            "--train en=a.csv --group who",
            [],
            "a.csv, line 1: no column 'who'; there are: 'id', 'body', 'queue'",
        ),
        (
            "--train en=a.csv --test de=b.csv",
            [(1, "", "b"), (2, "x", "")],
            "b.csv: no row has body and queue",
        ),
        (
            "--train en=b.csv",
            [(1, "x", "b"), (2, "y", "b")],
            "train has the labels ['b'], expected two or more",
        ),
        ("--train en=c.csv", [], "c.csv does not exist"),
        ("--train en=c.xlsx", [], "c.xlsx: a spreadsheet's own format is not read: save it as CSV"),
    ],
)
def test_own_refuses_in_a_sentence_and_writes_nothing(tmp_path, own, flags, rows, message):
    status, _, err = own(flags, a=TICKETS, b=rows or TICKETS)
    assert message in refusal(status, err) and not (tmp_path / "set").exists()


def test_own_takes_the_tickets_of_the_sample(tmp_path, script):
    sample = Path(__file__).parent.parent / "sample"
    flags = f"--train en={sample}/tickets_en.csv --dev de={sample}/tickets_de.csv --text body"
    flags = f"own --out {tmp_path / 'set'} --label queue {flags}".split()
    status, out, err = script("data", *flags)
    assert status == 0 and "rows left out for that: 5" in err
    assert [cells(out)[name][0] for name in ("train.en", "dev.en", "dev.de")] == ["29", "4", "12"]
    assert set(data.read_labels(tmp_path / "set")) == set(data.read_labels(sample / "intents"))


# --- check ----------------------------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path):
    """5 train rows (one there thrice), 3 dev and 2 test rows, some of them in train."""
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    train = [("the refund", "no"), ("money", "yes"), ("the refund", "no"), ("the refund", "no")]
    write_tsv(tmp_path / "train.en.tsv", [*train, ("agent", "no")])
    write_tsv(tmp_path / "dev.en.tsv", [("money", "yes"), ("parcel late", "no"), ("agent", "no")])
    german = [("geld 猫 猫", "yes"), ("paket mensch berater das jetzt", "no"), ("mein", "no")]
    write_tsv(tmp_path / "dev.de.tsv", german)
    write_tsv(tmp_path / "test.en.tsv", [("cancel", "yes"), ("order", "yes")])
    return tmp_path


def cells(out):
    """The check's lines by file: rows, groups, smallest, largest, twice, in train; the model's."""
    rows = [
        line.strip("| ").replace("|", " ").split() for line in out.splitlines() if line[:2] == "| "
    ]
    return {name: cells for name, *cells in rows[1:]}


def test_check_counts_rows_balance_repeats_and_overlap(odd_folder, script):
    status, out, _ = script("data", "check", odd_folder)
    assert status == 0 and out.startswith(f"{odd_folder}: 2 labels: no yes\n") and "note" not in out
    assert cells(out) == {
        "train.en": ["5", "5", "20.0%", "80.0%", "2"],
        "dev.en": ["3", "3", "33.3%", "66.7%", "0", "2"],
        "dev.de": ["3", "3", "33.3%", "66.7%", "0", "0"],
        "test.en": ["2", "2", "0.0%", "100.0%", "0", "0"],
    }


def test_check_counts_unknown_tokens_and_cut_rows(odd_folder, script, model_folder):
    status, out, _ = script("data", "check", odd_folder, "--model", model_folder, "--max-length", 6)
    assert status == 0
    # dev.de with [CLS] and [SEP]: 5 tokens of which 2 are unknown, 7 (one over the limit), 3
    assert cells(out)["dev.de"][-3:] == ["5.0", f"{2 / 15:.2%}", "33.3%"]
    assert cells(out)["dev.en"][-3:] == [f"{(3 + 4 + 3) / 3:.1f}", "0.00%", "0.0%"]
    assert "cut: longer than 6 tokens" in out


@pytest.mark.parametrize("rows", [["yes", "yes", "no"], ["yes", "no"]])
def test_check_notes_files_that_are_no_translations(odd_folder, script, rows):
    write_tsv(odd_folder / "dev.de.tsv", [("geld", label) for label in rows])
    status, out, _ = script("data", "check", odd_folder)
    assert status == 0 and "note: dev.de is not row-parallel with dev.en" in out


def test_check_counts_pairs_as_pairs(tmp_path, script):
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    train = [("a", "b", "no"), ("a", "c", "no"), ("a", "b", "yes")]
    write_tsv(tmp_path / "train.en.tsv", train, "text_a\ttext_b\tlabel")
    write_tsv(tmp_path / "test.en.tsv", [*train[1:2], ("b", "a", "yes")], "text_a\ttext_b\tlabel")
    assert cells(script("data", "check", tmp_path)[1]) == {
        "train.en": ["3", "1", "33.3%", "66.7%", "1"],
        "test.en": ["2", "2", "50.0%", "50.0%", "0", "1"],
    }
    for path in tmp_path.glob("*.tsv"):
        path.unlink()
    status, _, err = script("data", "check", tmp_path)
    assert "has no train, dev or test file" in refusal(status, err)


# --- tokens and batches ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def with_tokenizer(model_folder, folder, change):
    """A copy of the toy model, its tokenizer.json (a dict) changed."""
    path = Path(shutil.copytree(model_folder, folder)) / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "single, pair, counts",
    [
        ("$A", "$A $B:1", "0 special tokens around a text and 0"),
        ("[CLS] $A", "[CLS] $A $B:1", "1 special tokens around a text and 1"),
        ("$A [SEP]", "$A [SEP] $B:1 [SEP]:1", "1 special tokens around a text and 2"),  # as T5
        ("[CLS] $A [SEP]", "[CLS] $A $B:1 [SEP]:1", "2 special tokens around a text and 2"),
    ],
)
def test_tokenizers_that_do_not_mark_texts_are_refused(
    model_folder, tmp_path, single, pair, counts
):
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=marks)
    post = {"post_processor": json.loads(template.__getstate__())}
    folder = with_tokenizer(model_folder, tmp_path / "model", lambda content: content.update(post))
    with pytest.raises(UserError, match=f"{counts} around two, .* post_processor that does so"):
        data.load_tokenizer(folder)


def test_a_cased_vocabulary_read_lower_cased_is_a_warning(model_folder, tmp_path, capsys):
    def capitals(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["Money"] = vocabulary.pop("money")

    data.load_tokenizer(with_tokenizer(model_folder, tmp_path / "cased", capitals))
    warning = capsys.readouterr().err
    assert "puts texts into lower case, but its vocabulary has 1 words with a capital" in warning
    assert 'as Money: for a cased model, put {"do_lower_case": false}' in warning

    def capitals_kept(content):
        capitals(content)
        content["normalizer"]["lowercase"] = False

    data.load_tokenizer(with_tokenizer(model_folder, tmp_path / "kept", capitals_kept))
    data.load_tokenizer(model_folder)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_cannot_be_had_is_named(model_folder, tmp_path):
    names = ("empty", "pointer", "sbert/0_Transformer", "models--acme--tiny/refs", "bare")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 638468\n"
    (tmp_path / "pointer" / "tokenizer.json").write_text(pointer)
    for name in ("pointer", "sbert/0_Transformer", "bare"):
        shutil.copy(Path(model_folder) / "config.json", tmp_path / name)
    for name, message in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path / "empty", ": it has no config.json$"),
        (tmp_path / "pointer", "tokenizer.json is a pointer of Git LFS: run `git lfs pull`"),
        (tmp_path / "sbert", r"it has no config.json; did you mean .*0_Transformer\?"),
        (tmp_path / "models--acme--tiny", "the hub's cache .* give the folder snapshots/COMMIT"),
        (tmp_path / "bare", r"it has no vocabulary \(tokenizer.json or vocab.txt\)"),
        (tmp_path / "bare" / "config.json", "it is a file, give the folder that holds it"),
    ):
        with pytest.raises(UserError, match=message) as error:
            data.load_tokenizer(name)
        assert str(name) in str(error.value) and "sentencepiece" not in str(error.value)


def unigram_tokenizer():
    """As XLM-R's: its special tokens are word pieces, too."""
    pieces = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [("▁", -2.0)] + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/49"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=marks
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("kind", ["word pieces", "unigram"])
def test_a_texts_own_special_tokens_are_text(tokenizer, kind):
    texts = ["the [SEP] my [PAD] now", "x [CLS][SEP]", "no [sep] here"]
    if kind == "unigram":
        tokenizer, texts = unigram_tokenizer(), ["the <s>49</s> x", "<pad>", "a </s></s>"]
    rows = data.Rows(texts, texts[::-1])
    before = tokenizer.backend_tokenizer.to_str()
    encoded = data.encode(tokenizer, rows, max_length=99)
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    expected = tokenizer.num_special_tokens_to_add(pair=True)
    for start, end in itertools.pairwise(encoded.starts):
        assert sum(int(token) in marks for token in encoded.ids[start:end]) == expected
    pieces = "".join(tokenizer.convert_ids_to_tokens(encoded.ids[: encoded.starts[1]]))
    assert ("49" if kind == "unigram" else "s##e##p") in pieces
    assert tokenizer.backend_tokenizer.to_str() == before


def some_rows(pairs):
    pick = np.random.default_rng(2)
    words = ["money", "refund", "geld", "钱", "退款", "猫", "x.", "the"]
    texts = []
    for _ in range(22):
        texts.append(" ".join(pick.choice(words, pick.integers(0, 9))))
    labels = [int(i) for i in pick.integers(3, size=11)]
    return data.Rows(texts[:11], texts[11:] if pairs else None, labels)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("chunk", [4, 8192])
def test_encode_and_collate_equal_the_tokenizer(tokenizer, pairs, chunk):
    rows = some_rows(pairs)
    encoded = data.encode(tokenizer, rows, max_length=10, chunk=chunk)
    each = []  # in lists of one: a bare empty second text would be taken for no second text
    for a, b in zip(rows.text_a, rows.text_b or [None] * 11):
        second = None if b is None else [b]
        tokens = tokenizer([a], second, truncation="longest_first", max_length=10)
        each.append({name: values[0] for name, values in tokens.items()})
    lengths = [len(row["input_ids"]) for row in each]
    assert max(lengths) == 10 > min(lengths) and encoded.lengths.tolist() == lengths
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
    encoded = data.encode(tokenizer, data.Rows(["猫", "money the"]))
    assert encoded.labels.tolist() == [-1, -1]
    warning = "warning: 14% of the tokens are unknown to the tokenizer\n"  # 1 of 3 + 4
    assert capsys.readouterr().err == warning
    data.encode(tokenizer, data.Rows(["money the"], None, [0]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "length, limit, width",
    [(3, None, 8), (8, 64, 8), (9, 64, 16), (61, 63, 63), (63, 63, 63), (7, 7, 7), (9, 7, 9)],
)
def test_collate_rounds_up_to_eight_or_the_limit(length, limit, width):
    ids, starts = np.arange(length + 2, dtype=np.int32), np.array([0, 2, length + 2])
    encoded = data.Encoded(ids, starts, np.array([2, length]), np.array([0, 1]))
    batch = data.collate(encoded, np.array([0, 1]), pad_id=99, limit=limit)
    assert batch["input_ids"].shape == (2, width)
    padding = 2 * width - length - 2
    assert (batch["input_ids"] == 99).sum() == padding == (batch["attention_mask"] == 0).sum()


@pytest.mark.parametrize("rows, size", [(131, 13), (130, 13), (5, 13), (1, 1)])
def test_batches_hold_every_row_once_and_follow_seed_and_epoch(rows, size):
    lengths = np.random.default_rng(4).integers(3, 60, size=rows)

    def train(seed, epoch):
        return [batch.tolist() for batch in data.train_batches(lengths, size, seed, epoch)]

    first, batches = train(1, 0), data.sorted_batches(lengths, size)
    for each in (first, batches):
        assert sorted(np.concatenate(each)) == list(range(rows))
    short = rows % size or min(size, rows)
    assert sorted(map(len, first)) == [short] + [size] * (len(first) - 1)
    for batch in batches[:-1]:  # 24 tokens a row
        assert len(batch) == max(1, size * 24 // (-(-max(lengths[batch]) // 8) * 8))
    assert train(1, 0) == first
    if rows > size:
        others = [first, train(1, 1), train(2, 0), train(0, 1)]
        assert all(a != b for a, b in itertools.combinations(others, 2))
        longest = [max(lengths[batch]) for batch in first]
        assert longest not in (sorted(longest), sorted(longest)[::-1])  # batches in random order


def test_batches_mix_lengths_no_more_than_they_must():
    """A batch holds rows of one rounded length, but where the rows of that length run out."""
    lengths = np.random.default_rng(4).integers(3, 60, size=500)
    mixed = 0
    for batch in data.train_batches(lengths, 13, seed=0, epoch=0):
        mixed += len(set(-(-lengths[batch] // 8))) - 1
    assert mixed <= len(set(-(-lengths // 8))) - 1
    widths = np.concatenate([lengths[batch] for batch in data.sorted_batches(lengths, 13)])
    assert widths.tolist() == sorted(lengths, reverse=True)
    batches = data.sorted_batches(lengths, 13, window=200)
    windows = [sorted(set(batch // 200)) for batch in batches]
    assert windows == sorted(windows) and {len(window) for window in windows} == {1}
    assert sorted(np.concatenate(batches)) == list(range(500)) and lengths[batches[0]].min() > 50


# --- the real archives ----------------------------------------------------------------------------

LANGUAGES = ["en", "zh", "es", "de", "ar", "ur", "fr"]
needs_archives = pytest.mark.skipif(
    not (SHARED / "XNLI-1.0.zip").is_file(), reason="the real archives are not in shared/data"
)


@needs_archives
def test_real_xnli(convert):
    flags = f"--languages {' '.join(LANGUAGES)} --train-languages en de"
    folder = convert("xnli", flags, ("--archives", SHARED))
    rows = {path.name: read_plain(path)[1:] for path in folder.glob("*.tsv")}
    counts = {"train.en.tsv": 52_110, "train.de.tsv": 9_000}
    for language in LANGUAGES:
        counts |= {f"dev.{language}.tsv": 2_490, f"test.{language}.tsv": 5_010}
    assert {name: len(lines) for name, lines in rows.items()} == counts
    with zipfile.ZipFile(SHARED / "XNLI-1.0.zip") as archive:
        lines = io.TextIOWrapper(archive.open(DEV), encoding="utf-8", newline="")
        source = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    expected = {language: [] for language in LANGUAGES}
    for row in source:
        cells = [row["sentence1"], row["sentence2"], row["gold_label"]]
        expected.get(row["language"], []).append(cells)
    for language in LANGUAGES:
        assert rows[f"dev.{language}.tsv"] == expected[language]


@needs_archives
def test_real_massive(convert):
    shared = ("--archives", SHARED)
    every = convert("massive", f"--languages {' '.join(LANGUAGES)} --intents 0", shared, "all")
    expected = {"train.en.tsv": 11_514}
    for language in LANGUAGES:
        expected |= {f"dev.{language}.tsv": 2_033, f"test.{language}.tsv": 2_974}
    assert {path.name: len(read_plain(path)) - 1 for path in every.glob("*.tsv")} == expected
    assert len((every / "labels.txt").read_text().split()) == 60
    with tarfile.open(SHARED / "amazon-massive-dataset-1.0.tar.gz") as archive:
        records = [json.loads(line) for line in archive.extractfile("1.0/data/ur-PK.jsonl")]
    test = [[row["utt"], row["intent"]] for row in records if row["partition"] == "test"]
    assert read_plain(every / "test.ur.tsv")[1:] == test
