"""The sample data: reproducible, row-parallel, split by meaning; half a pair tells no label."""

import hashlib
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent.parent / "sample"
LANGUAGES = ["en", "de", "es", "fr", "zh", "ar", "ur"]
NAMES = ["intents", "intents14", "nli", "parallel"]
ROWS = {
    "intents": (2400, 300, 600),
    "intents14": (4004, 420, 840),
    "nli": (6000, 300, 600),
    "parallel": (8000, 0, 0),
}

sys.path.insert(0, str(SAMPLE))  # as when the script is run

import make_data  # noqa: E402


def read(path):
    """A .tsv file -> its rows as lists of fields, without the header and the column of groups."""
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert lines[-1] == "" and "\r" not in "".join(lines)
    header = lines[0].removesuffix("\tgroup")
    assert header in ("text\tlabel", "text_a\ttext_b\tlabel")
    rows = [line.split("\t") for line in lines[1:-1]]
    for row in rows:
        assert len(row) == lines[0].count("\t") + 1
        assert all(field.strip() == field != "" for field in row)
    return [row[: header.count("\t") + 1] for row in rows]


def normal(text):
    return "".join(character for character in text.lower() if character.isalnum())


def sentences(rows):
    return {normal(text) for row in rows for text in row[:-1]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample")
    make_data.main(["--out", str(out), "--seed", "0"])
    return out


@pytest.fixture(scope="module")
def data(made):
    """{(set, split, language): rows}"""
    return {
        (name, *path.name.split(".")[:2]): read(path)
        for name in NAMES
        for path in sorted((made / name).glob("*.tsv"))
    }


@pytest.mark.parametrize("name", ["intents", "intents14", "nli"])
def test_the_committed_files_are_what_the_script_makes(made, name):
    committed = {
        path.name: path.read_bytes() for path in (SAMPLE / name).iterdir() if path.is_file()
    }
    fresh = {path.name: path.read_bytes() for path in (made / name).iterdir()}
    assert sorted(committed) == sorted(fresh)
    assert [file for file in fresh if committed[file] != fresh[file]] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_rows_labels_and_sources(made, data, name):
    labels = (made / name / "labels.txt").read_text(encoding="utf-8").splitlines()
    count = {"intents": 4, "intents14": 14, "nli": 3, "parallel": 17}[name]
    assert len(labels) == len(set(labels)) == count
    sources = json.loads((made / name / "sources.json").read_text(encoding="utf-8"))
    splits = ["train"] if name == "parallel" else ["dev", "test"]
    pairs = {("train", "en"), *itertools.product(splits, LANGUAGES)}
    assert set(sources) == {f"{split}.{language}.tsv" for split, language in pairs}
    for split, language in pairs:
        rows, entry = data[name, split, language], sources[f"{split}.{language}.tsv"]
        content = (made / name / f"{split}.{language}.tsv").read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["rows"] == len(rows) == ROWS[name][["train", "dev", "test"].index(split)]
        assert {row[-1] for row in rows} == set(labels)
        english = data[name, split, "en"]
        assert [row[-1] for row in rows] == [row[-1] for row in english], "not row-parallel"


def test_groups_are_frames_and_blocks_that_share_their_sentences(made, data):
    for (name, split, language), rows in data.items():
        lines = (made / name / f"{split}.{language}.tsv").read_text(encoding="utf-8").split("\n")
        groups = [line.split("\t")[-1] for line in lines[1:-1]]
        if name == "nli":  # twelve pairs of four and four sentences
            sentences = {(text, group) for row, group in zip(rows, groups) for text in row[:2]}
            assert set(Counter(groups).values()) == {12} and len(sentences) == len(rows) * 2 / 3
        elif name != "parallel":
            assert [group.split(".")[0] for group in groups] == [row[-1] for row in rows]
            assert len(set(groups)) == {"intents": 15, "intents14": 45}[name]


def test_class_shares(data):
    assert Counter(row[-1] for row in data["intents", "train", "en"]) == {
        "refund": 1200,
        "agent": 600,
        "delivery": 360,
        "cancel": 240,
    }
    for name, split, language in data:
        if split != "train":
            assert len(set(Counter(row[-1] for row in data[name, split, language]).values())) == 1


def test_digits_are_the_same_in_every_language(data):
    for (name, split, language), rows in data.items():
        for row, english in zip(rows, data[name, split, "en"]):
            digits = [
                sorted(re.findall(r"\d+", " ".join(fields[:-1]))) for fields in (row, english)
            ]
            assert digits[0] == digits[1], (name, split, language, row, english)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["intents", "intents14", "nli"])
def test_no_sentence_is_in_two_splits(data, name, language):
    train = sentences(data.get((name, "train", language), [])) | sentences(
        data["parallel", "train", language]
    )
    dev, test = sentences(data[name, "dev", language]), sentences(data[name, "test", language])
    assert not dev & test and not train & dev and not train & test
    for split in ("dev", "test"):
        rows = [tuple(normal(text) for text in row[:-1]) for row in data[name, split, language]]
        assert len(set(rows)) == len(rows), "duplicates"


SLOTS = (
    "product contract device colour city weekday month person duration channel account plan method"
)


def english_values():
    """What a reader of the English text can recognise, off the lexicon: {slot: {surface, ...}}."""
    surfaces, slot = {}, None
    for line in (SAMPLE / "lexicon" / "en.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("=="):
            slot = line.removeprefix("== slot ")
        elif slot in SLOTS.split() and ":" in line:
            word = re.sub(r"^[mf] ", "", line.split(": ", 1)[1]).lower()
            surfaces.setdefault(slot, []).append(word)
    return surfaces


def combination(text, patterns):
    """The slot values in an English sentence: {(slot, surface), ...}."""
    found = {
        (slot, match)
        for slot, pattern in patterns.items()
        for match in pattern.findall(text.lower())
    }
    return frozenset(found | {("number", number) for number in re.findall(r"\d+", text)})


def test_held_out_combinations_are_in_no_training_text(data):
    patterns = {
        slot: re.compile(r"\b(" + "|".join(sorted(words, key=len, reverse=True)) + r")\b")
        for slot, words in english_values().items()
    }
    names = {"intents", "intents14"}
    known, tested = set(), Counter()
    for (name, split, language), rows in data.items():
        if split == "train" and language == "en" and name in names | {"parallel"}:
            known |= {(row[1], combination(row[0], patterns)) for row in rows}
    for name in sorted(names):
        for text, label in data[name, "dev", "en"] + data[name, "test", "en"]:
            slots = combination(text, patterns)
            if len(slots) >= 2:
                tested[name] += 1
                assert (label, slots) not in known, text
    assert tested["intents"] > 500 and tested["intents14"] > 1000

    # nli: what is said about a thing (its product, contract or device, and one value) in training
    def facts(text):
        slots = combination(text, patterns)
        things = [pair for pair in slots if pair[0] in ("product", "contract", "device")]
        assert len(things) == 1, text
        # "a month" (the price) and "the online shop" are part of phrasings here, not values
        return {
            (things[0], pair)
            for pair in slots
            if pair[0] in ("colour", "weekday", "city", "person", "month", "number")
        }

    topics = {"order", "contract", "repair"}
    train = [row[:2] for row in data["nli", "train", "en"]]
    train += [row[:1] for row in data["parallel", "train", "en"] if row[1] in topics]
    known = {fact for texts in train for text in texts for fact in facts(text)}
    dev, test = (
        {fact for row in data["nli", split, "en"] for text in row[:2] for fact in facts(text)}
        for split in ("dev", "test")
    )
    assert len(test) > 100 and not test & known and not dev & known and not dev & test


def test_each_half_of_a_pair_has_every_label_equally_often(data):
    """So that no classifier of one half alone can be better than chance on these rows."""
    for split, half in itertools.product(("train", "dev", "test"), (0, 1)):
        labels = {}
        for row in data["nli", split, "en"]:
            labels.setdefault(normal(row[half]), []).append(row[-1])
        for text, counts in labels.items():
            counts = Counter(counts)
            assert len(counts) == 3 and len(set(counts.values())) == 1, text


def test_word_overlap_does_not_give_the_label(data):
    """Hypotheses share words with premises whatever the label; no two cuts tell them apart."""

    def overlap(row):
        a, b = (set(re.findall(r"\w+", text.lower())) for text in row[:2])
        return len(a & b) / len(b)

    rows = [(overlap(row), row[2]) for row in data["nli", "test", "en"]]
    means = {
        label: sum(score for score, other in rows if other == label) * 3 / len(rows)
        for _, label in rows
    }
    assert means["neutral"] > 0.25 and means["contradiction"] > 0.4, means
    labels, cuts = sorted(means, key=means.get), sorted({score for score, _ in rows} | {2.0})
    best = max(
        sum(label == labels[(score >= low) + (score >= high)] for score, label in rows) / len(rows)
        for low in cuts
        for high in cuts
        if low <= high
    )
    print(f"overlap only: {best:.3f}", means)
    assert best < 0.70


@pytest.mark.parametrize(
    "language, name",
    [
        ("en", "LATIN"),
        ("de", "LATIN"),
        ("es", "LATIN"),
        ("fr", "LATIN"),
        ("zh", "CJK"),
        ("ar", "ARABIC"),
        ("ur", "ARABIC"),
    ],
)
def test_every_language_is_in_its_own_script(data, language, name):
    for (_, _, other), rows in data.items():
        if other == language:
            text = " ".join(field for row in rows for field in row[:-1])
            letters = [character for character in text if character.isalpha()]
            share = sum(
                unicodedata.name(character).startswith(name) for character in letters
            ) / len(letters)
            assert share > 0.95
            if language == "zh":
                lines = "\n".join(field for row in rows for field in row[:-1])
                assert not re.search(r"[\u4e00-\u9fff] +[\u4e00-\u9fff]", lines)
            if language == "ur":
                assert set("ےہںگچپٹڈڑ") <= set(text) and not set("يكة") & set(text)
            if language == "ar":
                assert not set("ےہںگچپٹڈڑکی") & set(text)


def test_no_template_is_left_in_the_text(data):
    for key, rows in data.items():
        for row in rows:
            for text in row[:-1]:
                assert not re.search(r"[{}\[\]|@_]|  | [.,]|[.,!?،؟۔。，？！]{2}| -|None", text), (
                    key,
                    text,
                )


def test_a_lexicon_with_a_hole_is_named():
    english = make_data.read_lexicon(SAMPLE / "lexicon" / "en.txt")
    german = make_data.read_lexicon(SAMPLE / "lexicon" / "de.txt")
    del german["slot product"]["lamp"], german["say cancel.order"]
    german["say refund.order"].append("wo ist mein Geld?")
    with pytest.raises(ValueError) as error:
        make_data.check_lexicon(german, english, "de")
    message = str(error.value)
    assert "lexicon/de.txt" in message and "'slot product' has no key 'lamp'" in message
    assert (
        "no section 'say cancel.order'" in message
        and "without {order}: wo ist mein Geld?" in message
    )
