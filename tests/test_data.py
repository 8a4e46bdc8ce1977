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
from families import xlmr_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

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
INTENTS = ["alarm", "cook", "joke", "news", "play", "weather"]
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
        archive.writestr(TEST, xnli_table(list(PAIRS)[::-1]), zipfile.ZIP_DEFLATED)
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


def read_tables(folder):
    return {path.name: read_plain(path) for path in folder.glob("*.tsv")}


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
    lines = [line for line in err.splitlines() if line and "B/s]" not in line]
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("data.py: error: "), err
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
    assert read_tables(folder) == expected
    assert {path.name for path in folder.iterdir()} == {*expected, "labels.txt", "sources.json"}
    sources = json.loads((folder / "sources.json").read_text())
    source = {"archive": "XNLI-1.0.zip", "member": DEV, "rows": 3}
    source["sha256"] = hashlib.sha256((folder / "dev.zh.tsv").read_bytes()).hexdigest()
    assert sources.keys() == expected.keys() and sources["dev.zh.tsv"] == source


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
def test_a_damaged_archive_is_one_sentence(tmp_path, convert, name):
    write_xnli(tmp_path / "archives")
    write_massive(tmp_path / "archives", compresslevel=0)  # stored: one byte is one letter
    path = tmp_path / "archives" / name
    good = path.read_bytes()
    letter = good.replace(b"He said", b"he said").replace(b'de-DE \\"7', b'de-DE \\"8')
    locked = letter.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")  # zip's flag
    for bad in (good[: len(good) // 2], good[99:], letter, locked, b"<html>moved</html>"):
        assert bad != good
        path.write_bytes(bad)
        sentence = convert("xnli" if "XNLI" in name else "massive", "--languages en de")
        assert f"{path} is damaged or cut short (" in sentence
        assert sentence.endswith("): delete it and fetch it again")
    assert not (tmp_path / "set").exists()


def test_another_data_set_is_not_written_over(tmp_path, convert):
    write_xnli(tmp_path / "archives")
    folder = convert("xnli", "--languages en")
    assert convert("xnli", "--languages en de") == folder  # the same and more is welcome
    before = contents(folder)
    message = f"{folder} holds another data set (dev.de.tsv): give another --out, or delete it"
    assert message in convert("xnli", "--languages en") and contents(folder) == before


# --- MASSIVE --------------------------------------------------------------------------------------


def massive_rows(locale, split, intents):
    rows = [["text", "label"]]
    for record in massive_records(locale):
        if record["partition"] == split and record["intent"] in intents:
            rows.append([record["utt"], record["intent"]])
    return rows


@pytest.mark.parametrize(
    "flags, intents, languages, train",
    [
        (
            "--train-languages zh-TW",
            ["alarm", "joke", "play", "weather"],  # news and joke tie: the first by name
            {"zh": "zh-CN", "de": "de-DE"},
            ("zh-TW", "zh-TW"),
        ),
        (
            "--intents 2",
            ["alarm", "play"],
            {"en-US": "en-US", "zh_TW": "zh-TW", "zh-CN": "zh-CN", "pt": "pt-PT"},
            ("en-US", "en-US"),
        ),
        ("--intents 0", INTENTS, {"pt-PT": "pt-PT"}, ("en", "en-US")),
    ],
)
def test_massive_keeps_the_most_frequent_intents_under_any_code(
    tmp_path, convert, flags, intents, languages, train
):
    write_massive(tmp_path / "archives")
    folder = convert("massive", f"{flags} --languages {' '.join(languages)}")
    assert (folder / "labels.txt").read_text().split() == intents
    code, locale = train
    expected = {f"train.{code}.tsv": massive_rows(locale, "train", intents)}
    sources = json.loads((folder / "sources.json").read_text())
    for split, (code, locale) in itertools.product(("dev", "test"), languages.items()):
        expected[f"{split}.{code}.tsv"] = massive_rows(locale, split, intents)
        assert sources[f"{split}.{code}.tsv"]["member"] == f"1.0/data/{locale}.jsonl"
    assert read_tables(folder) == expected


def test_balance_repeats_train_rows_only_and_is_seeded(tmp_path, convert):
    write_massive(tmp_path / "archives")
    tables = []
    for flags in ("", "--balance", "--balance --seed 0", "--balance --seed 1"):
        folder = convert("massive", f"--languages en --intents 0 {flags}", out=str(len(tables)))
        assert read_plain(folder / "test.en.tsv") == massive_rows("en-US", "test", INTENTS)
        tables.append(read_plain(folder / "train.en.tsv")[1:])
    plain, balanced, same, other = tables
    assert balanced == same != other
    copies = Counter(map(tuple, balanced))
    assert copies.keys() == set(map(tuple, plain))
    for intent in INTENTS:  # no row is repeated twice more than another
        counts = [count for (_, label), count in copies.items() if label == intent]
        assert sum(counts) == 9 and max(counts) - min(counts) <= 1


# --- the download ---------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server: sends `body` short of `cut` bytes, or no such file; `asked` counts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            if not server.body:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body[: len(server.body) - server.cut])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = 0
        server.path = f"http://127.0.0.1:{server.server_port}/amazon-massive-dataset-1.0.tar.gz"
        monkeypatch.setattr(data, "MASSIVE_URL", server.path)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_kept_beside_the_data_set_whole_or_not_at_all(tmp_path, server, convert):
    def made():
        return convert("massive", "--languages en", archives=(), out="data/massive")

    body = write_massive(tmp_path / "made").read_bytes()
    for server.body, message in (b"", "HTTP Error 404: Not Found"), (body, "7 bytes"):
        server.cut = 7
        sentence = made()
        assert server.path in sentence and message in sentence and "--archives" in sentence
        assert not list((tmp_path / "data").rglob("*.*"))
    server.cut = server.asked = 0
    assert made() == made() and server.asked == 1
    (path,) = (tmp_path / "data" / "archives").iterdir()
    assert path.read_bytes() == body


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
        (
            "x.jsonl",
            b'{"a": "1\\n", "b": 2}\n\n{"c": null, "a": "\xc3\xbc"}\n',
            {"a": ["1\n", "ü"], "b": ["2", ""], "c": ["", ""]},
            [1, 3],
        ),
    ],
)
def test_tables_of_every_form(tmp_path, name, content, expected, lines):
    (tmp_path / name).write_bytes(content)
    columns, numbers = archives.read_columns(tmp_path / name)
    assert columns == expected and list(numbers) == lines


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.tsv", b"a\tb\nx\t\n\ny\tno\n", ", line 3: 1 columns, expected 2 (a, b)"),
        ("x.tsv", b"a\tb\nx\tno\n\xe4\tno\n", ", line 3: not UTF-8 (byte 0xe4): save it as UTF-8"),
        ("x.tsv", b"a\tb\ta\n", ", line 1: two columns have one name: a, b, a"),
        ("x.csv", b'a,b\n1,2\n3,"4\n5,6\n', ", line 3: unexpected end of data"),
        ("x.csv", b"", " holds no rows"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', ", line 2: not a JSON object ("),
        ("x.jsonl", b'{"a": "\\ud83d"}\n', ", line 1: not a JSON object ('utf-8' codec"),
        ("x.xlsx", b"PK", ": a spreadsheet's own format is not read: save it as CSV (in Excel"),
        ("x.json", b"[]", ": JSON is read and written as lines, an object each, in a .jsonl"),
    ],
)
def test_broken_tables_are_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        archives.read_columns(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}{message}")


def test_what_is_written_is_read_again_by_others_and_by_us(tmp_path):
    columns = {"te,xt": ['a "b"', "x;\ny", "ü"], "label": ["", "1", "2"]}
    for form in ("csv", "jsonl", "tsv"):
        archives.write_columns(tmp_path / f"x.{form}", columns)
    for form in ("csv", "jsonl"):
        assert archives.read_columns(tmp_path / f"x.{form}")[0] == columns
    assert (tmp_path / "x.csv").read_bytes()[:3] == b"\xef\xbb\xbf"  # for spreadsheets
    with open(tmp_path / "x.csv", encoding="utf-8-sig", newline="") as file:
        assert list(csv.reader(file)) == [list(columns), *map(list, zip(*columns.values()))]
    last = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()[2]
    assert "ü" in last and json.loads(last) == {"te,xt": "ü", "label": "2"}
    assert read_plain(tmp_path / "x.tsv")[1:] == [['a "b"', ""], ["x; y", "1"], ["ü", "2"]]


def test_pipes_and_standard_input_and_output(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"text\nhello\n")
    os.close(writer)
    assert archives.read_columns(f"/dev/fd/{reader}")[0] == {"text": ["hello"]}
    os.close(reader)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\tb\n1\t2\n")))
    columns, _ = archives.read_columns("-")
    assert columns == {"a": ["1"], "b": ["2"]}
    archives.write_columns("-", columns)
    assert capsys.readouterr().out == "a\tb\n1\t2\n"


@pytest.mark.parametrize(
    "labels, label, message",
    [
        (["tr\u00e8s", "mal"], "tre\u0300s", r"très, mal; 'tre\\u0300s' is not 'tr\\xe8s'$"),
        (["no ", "yes"], "n\uff4f", r"'nｏ', .* no , yes; 'n\\uff4f' is not 'no '$"),
        (["no", "yes"], "No", "'No' is not 'no'$"),
        (list("abcdefghi"), "x" * 99, f"'{'x' * 60}', expected one of a, .*, g, h, \\.\\.\\.$"),
    ],
)
def test_labels_that_print_alike_are_shown_as_code_points(labels, label, message):
    with pytest.raises(UserError, match="^dev.en.tsv, line 2: unknown label .*?" + message):
        archives.label_index(label, labels, "dev.en.tsv, line 2")


# --- the folder format ----------------------------------------------------------------------------


def test_read_labels_wants_different_labels(tmp_path):
    path = tmp_path / "labels.txt"
    words = r"labels.txt: expected two or more different labels, .* \["
    for content in (b"no\nyes\nno\n", b"no\n\n", b"no\n\nyes\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            data.read_labels(tmp_path)
    path.write_bytes(b"no\r\nyes\r\n\r\n\n")  # empty lines at the end
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

    there = "dev.fr.tsv does not exist; dev is there in: en de pt-BR sr-Latn zh zh_Hant"
    assert message("dev", "fr").endswith(there)
    for content, end in [
        ("text\nx\n", "line 1: no column 'label'; there are: 'text'"),
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


def test_language_codes_are_read_as_people_have_them(coded):
    assert data.split_languages(coded, "dev", first="zh_Hant")[:2] == ["zh_Hant", "de"]
    assert data.split_languages(coded, "test") == data.split_languages(coded / "none", "dev") == []
    sets = data.read_sets(coded, [("dev", code) for code in CODES], ["no", "yes"])
    for (_, code), rows in sets.items():
        assert rows.text_a == [code, "dev"]


def test_files_that_look_like_a_split_are_named_in_a_warning(coded, capsys):
    strange = ["dev.d e.tsv", "dev.sr.Latn.tsv", "dev.tsv", "test.DE.TSV", "valid.de.tsv"]
    for name in [*strange, "notes.tsv", "development.tsv", ".dev.de.tsv.x.tmp", "dev.de.tsv.bak"]:
        (coded / name).touch()
    for _ in range(2):  # said once
        assert set(data.split_languages(coded, "dev")) == set(CODES)
    warnings = sorted(capsys.readouterr().err.splitlines())
    for name, line in zip(strange, warnings, strict=True):
        assert line.startswith(f"warning: {coded / name} is not read: a split's file is named ")


def test_train_language_is_a_role(coded):
    def refused(message, *wanted):
        with pytest.raises(UserError, match=message):
            data.train_language(coded, *wanted)

    assert data.train_language(coded) == "en" and data.train_language(coded, "sr-Latn") == "sr-Latn"
    (coded / "train.en.tsv").unlink()
    refused("in de pt-BR .* zh zh_Hant: say which with --train-language$")
    refused("train.en.tsv does not exist; train is there in: de pt-BR ", "en")
    for code in ("de", "pt-BR", "sr-Latn", "zh"):
        (coded / f"train.{code}.tsv").unlink()
    assert data.train_language(coded) == "zh_Hant"
    (coded / "train.zh_Hant.tsv").unlink()
    refused("train.en.tsv does not exist; train .* no language$")


def test_pairs_and_single_texts_do_not_mix(coded):
    labels, keys = ["no", "yes"], [("train", "en"), ("dev", "de")]
    message = r"train.en.tsv holds single texts \(text\), expected pairs \(text_a, text_b"
    with pytest.raises(UserError, match=message):
        data.read_sets(coded, keys, labels, pairs=True)
    write_tsv(coded / "dev.de.tsv", [("a", "b", "no")], "text_a\ttext_b\tlabel")
    with pytest.raises(UserError, match=r"dev.de.tsv holds pairs \(.*\), expected single texts"):
        data.read_sets(coded, keys, labels)
    assert data.read_sets(coded, keys[1:], labels, pairs=True)["dev", "de"].text_b == ["b"]


def test_take_spreads_evenly_and_takes_the_same_rows_in_every_language():
    numbers = list(range(13))
    rows = data.Rows(numbers, None, numbers, numbers)
    for count, taken in (1, [0]), (5, [0, 2, 5, 7, 10]), (12, [*range(12)]):
        assert data.take(rows, count) == data.Rows(taken, None, taken, taken)
        assert data.take(data.Rows(numbers), count) == data.Rows(taken)
    assert data.take(rows, None) == data.take(rows, 99) == rows


def test_groups_come_from_the_column_else_from_first_texts():
    texts, seconds = list("baab"), list("wxyz")
    for rows, numbers in (
        (data.Rows(texts, None, None, list("ghgi")), [0, 1, 0, 2]),
        (data.Rows(texts, seconds, None, list("ghgi")), [0, 1, 0, 2]),
        (data.Rows(texts, seconds), [0, 1, 1, 0]),
        (data.Rows(texts), [0, 1, 2, 3]),
    ):
        assert data.group_numbers(rows).tolist() == numbers


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
    assert (folder / "labels.txt").read_text() == "b\na\nc\n"  # 21, 6 and 3 rows
    tables = read_tables(folder)
    train = [["text", "label"], *([text, label] for _, text, label in TICKETS)]
    assert tables["train.en.tsv"] == tables["dev.en.tsv"] == train
    assert tables["dev.de.tsv"][1:] == [["an ein  zwei", "a"], ["drei", "c"]]
    source = json.loads((folder / "sources.json").read_text())["dev.de.tsv"]
    assert source["files"] == [str(tmp_path / "de.csv")] and source["rows"] == 2
    assert source["columns"] == {"text": "body", "label": "queue"}
    assert "de.csv, line 4: no body or no queue; rows left out for that: 2\n" in err
    words = "en.csv, line 3: 'b', in line 2 'a', for the same text; such rows, which are kept: 6"
    assert words in err


def test_labels_with_one_count_stand_by_name_and_files_of_a_language_are_joined(tmp_path, own):
    rows = [(1, "x", "zeta"), (2, "y", "alpha")]
    flags = "--train en=a.csv en=b.csv --hold-out 0"
    assert own(flags, a=rows, b=[(3, "z", "mu"), (4, "w", "mu")])[0] == 0
    assert (tmp_path / "set" / "labels.txt").read_text() == "mu\nalpha\nzeta\n"
    assert [row[0] for row in read_plain(tmp_path / "set" / "train.en.tsv")[1:]] == list("xyzw")
    assert not (tmp_path / "set" / "dev.en.tsv").exists()


@pytest.mark.parametrize("flag", ["", "--group thread"])
def test_hold_out_takes_whole_groups_of_each_class(tmp_path, own, flag):
    rows, thread_of = [], {}
    for i in range(120):  # threads of three, each of one class: 20 of a, 12 of b, 7 of c, 1 of d
        thread, label = i // 3, ("a" * 20 + "b" * 12 + "c" * 7 + "d")[i // 3]
        text = f"text {i if flag else thread}"  # without threads the same text thrice
        rows.append((i, text, label, f"t{thread}"))
        thread_of[text] = thread
    random.Random(1).shuffle(rows)
    for out, seed in ("one", 0), ("two", 0), ("three", 5):
        flags = f"--train en=x.csv {flag} --hold-out 0.2 --seed {seed}"
        assert own(flags, "id body queue thread", out, x=rows)[0] == 0
    one, two, three = (contents(tmp_path / out) for out in ("one", "two", "three"))
    assert one == two and one["dev.en.tsv"] != three["dev.en.tsv"]
    tables = read_tables(tmp_path / "one")
    train, dev = tables["train.en.tsv"][1:], tables["dev.en.tsv"][1:]
    assert sorted(row[0] for row in train + dev) == sorted(row[1] for row in rows)
    groups = {(thread_of[row[0]], row[1]) for row in dev}
    assert not {thread_of[row[0]] for row in train} & {thread for thread, _ in groups}
    # a fifth of 20, 12 and 7; the only one of d stays
    assert Counter(label for _, label in groups) == {"a": 4, "b": 2, "c": 1}


def test_hold_out_counts_rows_where_groups_are_large():
    """Two threads of nine rows and two of one: a fifth of twenty is never a large one."""
    rows = [(str(i), thread, "x") for i, thread in enumerate("a" * 9 + "b" * 9 + "cd")]
    for seed in range(9):
        _, dev = archives.hold_out(rows, 1, 2, 0.2, seed)
        assert [row[1] for row in dev] == ["c", "d"]


@pytest.mark.parametrize(
    "flags, rows, message",
    [
        (
            "--train en=a.csv --dev de=b.csv",
            [(1, "x", "z")],
            "b.csv, line 2: unknown label 'z', expected one of a, b, c",
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
        ("--train en=c.csv", [], "c.csv does not exist"),
    ],
)
def test_own_refuses_in_a_sentence_and_writes_nothing(tmp_path, own, flags, rows, message):
    status, _, err = own(flags, a=TICKETS, b=rows)
    assert message in refusal(status, err) and not (tmp_path / "set").exists()


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
    lines = [line.replace("|", " ").split() for line in out.splitlines() if line[:2] == "| "]
    return {name: cells for name, *cells in lines[1:]}


def test_check_counts_rows_balance_repeats_and_overlap(odd_folder, script):
    status, out, _ = script("data", "check", odd_folder)
    assert status == 0 and out.startswith(f"{odd_folder}: 2 labels: no yes\n") and "note" not in out
    assert cells(out) == {
        "train.en": ["5", "5", "20.0%", "80.0%", "2"],
        "dev.en": ["3", "3", "33.3%", "66.7%", "0", "2"],
        "dev.de": ["3", "3", "33.3%", "66.7%", "0", "0"],
        "test.en": ["2", "2", "0.0%", "100.0%", "0", "0"],
    }
    write_tsv(odd_folder / "dev.de.tsv", [("geld", label) for label in ("yes", "yes", "no")])
    assert "note: dev.de is not row-parallel with dev.en" in script("data", "check", odd_folder)[1]


def test_check_counts_unknown_tokens_and_cut_rows(odd_folder, script, model_folder):
    status, out, _ = script("data", "check", odd_folder, "--model", model_folder, "--max-length", 6)
    assert status == 0
    # dev.de with [CLS] and [SEP]: 5 tokens of which 2 are unknown, 7 (one over the limit), 3
    assert cells(out)["dev.de"][-3:] == ["5.0", f"{2 / 15:.2%}", "33.3%"]
    assert cells(out)["dev.en"][-3:] == [f"{(3 + 4 + 3) / 3:.1f}", "0.00%", "0.0%"]
    assert "cut: longer than 6 tokens" in out


def test_check_counts_pairs_as_pairs(tmp_path, script):
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    status, _, err = script("data", "check", tmp_path)
    assert "has no train, dev or test file" in refusal(status, err)
    train = [("a", "b", "no"), ("a", "c", "no"), ("a", "b", "yes")]
    for name, rows in ("train", train), ("test", [train[1], ("b", "a", "yes")]):
        write_tsv(tmp_path / f"{name}.en.tsv", rows, "text_a\ttext_b\tlabel")
    assert cells(script("data", "check", tmp_path)[1]) == {
        "train.en": ["3", "1", "33.3%", "66.7%", "1"],
        "test.en": ["2", "2", "50.0%", "50.0%", "0", "1"],
    }


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
        ("$A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "1 special tokens around a text and 3"),
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
    for name, lowercase in ("cased", True), ("kept", False):

        def capitals(content):
            vocabulary = content["model"]["vocab"]
            vocabulary["Money"] = vocabulary.pop("money")
            content["normalizer"]["lowercase"] = lowercase  # noqa: B023

        data.load_tokenizer(with_tokenizer(model_folder, tmp_path / name, capitals))
    data.load_tokenizer(model_folder)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "puts texts into lower case, but its vocabulary has 1 words with a capital" in warning
    assert 'as Money: for a cased model, put {"do_lower_case": false}' in warning


def test_a_tokenizer_that_cannot_be_had_is_named(model_folder, tmp_path):
    """What load_encoder() says too is in test_encoders.py."""
    (tmp_path / "models--acme--tiny").mkdir()
    shutil.copy(Path(model_folder) / "config.json", tmp_path)
    for name, message in (
        ("models--acme--tiny", "the hub's cache .* give the folder snapshots/COMMIT"),
        ("", r"it has no vocabulary \(tokenizer.json or vocab.txt\)"),
        ("config.json", "it is a file, give the folder that holds it"),
    ):
        with pytest.raises(UserError, match=f"{tmp_path / name}.*{message}"):
            data.load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["word pieces", "unigram"])
def test_a_texts_own_special_tokens_are_text(tokenizer, kind, tmp_path):
    texts, kept = ["the [SEP] my [PAD] now", "x [CLS][SEP]", "no [sep] here"], "s##e##p"
    if kind == "unigram":  # XLM-R's special tokens are word pieces, too
        xlmr_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        texts, kept = ["the <s>geld</s> x", "<pad>", "a </s></s>"], "geld"
    before = tokenizer.backend_tokenizer.to_str()
    encoded = data.encode(tokenizer, data.Rows(texts, texts[::-1]), max_length=99)
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    expected = tokenizer.num_special_tokens_to_add(pair=True)
    for start, end in itertools.pairwise(encoded.starts):
        assert sum(int(token) in marks for token in encoded.ids[start:end]) == expected
    pieces = tokenizer.convert_ids_to_tokens(encoded.ids[: encoded.starts[1]])
    assert kept in "".join(pieces)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("pairs", [True, False])
def test_encode_and_collate_equal_the_tokenizer(tokenizer, pairs):
    pick = np.random.default_rng(2)
    words = ["money", "refund", "geld", "钱", "退款", "猫", "x.", "the"]
    texts = [" ".join(pick.choice(words, pick.integers(0, 9))) for _ in range(22)]
    labels = [int(i) for i in pick.integers(3, size=11)]
    rows = data.Rows(texts[:11], texts[11:] if pairs else None, labels)
    encoded = data.encode(tokenizer, rows, max_length=10, chunk=4)
    each = []  # in lists of one: a bare empty second text would be taken for no second text
    for a, b in zip(rows.text_a, rows.text_b or [None] * 11):
        second = None if b is None else [b]
        tokens = tokenizer([a], second, truncation="longest_first", max_length=10)
        each.append({name: values[0] for name, values in tokens.items()})
    lengths = [len(row["input_ids"]) for row in each]
    assert max(lengths) == 10 > min(lengths) and encoded.lengths.tolist() == lengths
    shortest = int(np.argmin(lengths))
    for chosen, limit, multiple in (
        ([3, 0, 7, 10, 1], 64, 8),
        (range(11), 10, None),  # no wider than the limit
        ([shortest], 10, 8),
    ):
        batch = data.collate(encoded, np.array(chosen), 99, limit)
        padded = tokenizer.pad(
            [each[i] for i in chosen], pad_to_multiple_of=multiple, return_tensors="np"
        )
        padded["input_ids"][padded["attention_mask"] == 0] = 99
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[name].dtype == np.int64 and batch[name].tolist() == padded[name].tolist()
        assert batch["labels"].tolist() == [labels[i] for i in chosen]


def test_encode_without_labels_and_with_many_unknown_tokens(tokenizer, capsys):
    encoded = data.encode(tokenizer, data.Rows(["猫", "money the"]))
    assert encoded.labels.tolist() == [-1, -1]
    warning = "warning: 14% of the tokens are unknown to the tokenizer\n"  # 1 of 3 + 4
    assert capsys.readouterr().err == warning
    data.encode(tokenizer, data.Rows(["money the"], None, [0]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rows", [131, 5])
def test_batches_hold_every_row_once_and_follow_seed_and_epoch(rows):
    lengths = np.random.default_rng(4).integers(3, 60, size=rows)
    first, *others = (
        [batch.tolist() for batch in data.train_batches(lengths, 13, seed, epoch)]
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0), (0, 1))
    )
    batches = data.sorted_batches(lengths, 13)
    for each in (first, batches):
        assert sorted(np.concatenate(each)) == list(range(rows))
    assert sorted(map(len, first)) == [rows % 13] + [13] * (len(first) - 1)
    for batch in batches[:-1]:  # 24 tokens a row
        assert len(batch) == max(1, 13 * 24 // (-(-max(lengths[batch]) // 8) * 8))
    assert others[0] == first
    if rows > 13:
        assert all(a != b for a, b in itertools.combinations(others, 2))
        widths = [max(lengths[batch]) // 8 for batch in first]
        assert widths != sorted(widths)  # batches in random order


def test_batches_mix_lengths_no_more_than_they_must():
    """A batch holds rows of one rounded length, but where the rows of that length run out."""
    lengths = np.random.default_rng(4).integers(3, 60, size=500)
    mixed = 0
    for batch in data.train_batches(lengths, 13, seed=0, epoch=0):
        mixed += len(set(-(-lengths[batch] // 8))) - 1
    assert mixed <= len(set(-(-lengths // 8))) - 1
    widths = lengths[np.concatenate(data.sorted_batches(lengths, 13))]
    assert widths.tolist() == sorted(lengths, reverse=True)
    batches = data.sorted_batches(lengths, 13, window=200)
    windows = [sorted(set(batch // 200)) for batch in batches]
    assert windows == sorted(windows) and {len(window) for window in windows} == {1}
    assert sorted(np.concatenate(batches)) == list(range(500)) and lengths[batches[0]].min() > 50


# --- the real archives ----------------------------------------------------------------------------

needs_archives = pytest.mark.skipif(
    not (SHARED / "XNLI-1.0.zip").is_file(), reason="the real archives are not in shared/data"
)


@needs_archives
def test_real_xnli(convert):
    folder = convert("xnli", "--languages ur --train-languages en de", ("--archives", SHARED))
    expected = []
    with zipfile.ZipFile(SHARED / "XNLI-1.0.zip") as archive:
        lines = io.TextIOWrapper(archive.open(DEV), encoding="utf-8", newline="")
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row["language"] == "ur":
                expected.append([row["sentence1"], row["sentence2"], row["gold_label"]])
    tables = read_tables(folder)
    assert tables["dev.ur.tsv"][1:] == expected
    counts = {name: len(rows) - 1 for name, rows in tables.items()}
    train = {"train.en.tsv": 52_110, "train.de.tsv": 9_000}
    assert counts == train | {"dev.ur.tsv": 2_490, "test.ur.tsv": 5_010}


@needs_archives
def test_real_massive(convert):
    folder = convert("massive", "--languages ur --intents 0", ("--archives", SHARED))
    with tarfile.open(SHARED / "amazon-massive-dataset-1.0.tar.gz") as archive:
        records = [json.loads(line) for line in archive.extractfile("1.0/data/ur-PK.jsonl")]
    tables = read_tables(folder)
    expected = [[row["utt"], row["intent"]] for row in records if row["partition"] == "test"]
    assert tables["test.ur.tsv"][1:] == expected
    counts = {name: len(rows) - 1 for name, rows in tables.items()}
    assert counts == {"train.en.tsv": 11_514, "dev.ur.tsv": 2_033, "test.ur.tsv": 2_974}
    assert len((folder / "labels.txt").read_text().split()) == 60
