"""The sample data: reproducible, row-parallel, split by meaning; half a pair tells no label."""

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
ROWS = {
    "intents": {"train": 2400, "dev": 300, "test": 600},
    "intents14": {"train": 4004, "dev": 420, "test": 840},
    "nli": {"train": 6000, "dev": 300, "test": 600},
    "parallel": {"train": 8000},
}

sys.path.insert(0, str(SAMPLE))  # as when the script is run

import make_data  # noqa: E402

from lib.folders import sha256  # noqa: E402


def read(path):
    """A .tsv file -> its rows up to the label, and the last field of each: its group."""
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    header, *rows = [line.split("\t") for line in lines]
    for row in rows:
        assert len(row) == len(header) and all(field.strip() == field != "" for field in row)
    return [row[: header.index("label") + 1] for row in rows], [row[-1] for row in rows]


@pytest.fixture(scope="module")
def tables(made):
    """{(set, split, language): (rows, groups)}"""
    found = {}
    for name in ROWS:
        for path in sorted((made / name).glob("*.tsv")):
            split, language, _ = path.name.split(".")
            found[name, split, language] = read(path)
    return found


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
def data(tables):
    """{(set, split, language): rows}"""
    return {key: rows for key, (rows, _) in tables.items()}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["intents", "intents14", "nli"])
def test_the_committed_files_are_what_the_script_makes(made, name):
    committed, fresh = files(SAMPLE / name), files(made / name)
    assert committed.keys() == fresh.keys()
    assert [file for file in fresh if committed[file] != fresh[file]] == []


@pytest.mark.parametrize("name, counts", ROWS.items())
def test_files_rows_labels_and_sources(made, data, name, counts):
    labels = (made / name / "labels.txt").read_text(encoding="utf-8").splitlines()
    count = {"intents": 4, "intents14": 14, "nli": 3, "parallel": 17}[name]
    assert len(labels) == len(set(labels)) == count
    sources = json.loads((made / name / "sources.json").read_text(encoding="utf-8"))
    splits = ["train"] if name == "parallel" else ["dev", "test"]
    pairs = {("train", "en"), *itertools.product(splits, LANGUAGES)}
    assert set(sources) == {f"{split}.{language}.tsv" for split, language in pairs}
    for split, language in pairs:
        rows, entry = data[name, split, language], sources[f"{split}.{language}.tsv"]
        assert entry["rows"] == len(rows) == counts[split]
        assert entry["sha256"] == sha256(made / name / f"{split}.{language}.tsv")
        of_rows, english = (
            [row[-1] for row in data[name, split, code]] for code in (language, "en")
        )
        assert of_rows == english and set(of_rows) == set(labels)  # row-parallel
        if split != "train":
            assert len(set(Counter(of_rows).values())) == 1
    if name == "intents":
        shares = {"refund": 1200, "agent": 600, "delivery": 360, "cancel": 240}
        assert Counter(row[-1] for row in data["intents", "train", "en"]) == shares


def test_groups_are_frames_and_blocks_that_share_their_sentences(tables):
    for (name, _, _), (rows, groups) in tables.items():
        if name == "nli":  # twelve pairs of four and four sentences
            sentences = {(text, group) for row, group in zip(rows, groups) for text in row[:2]}
            assert set(Counter(groups).values()) == {12} and len(sentences) == len(rows) * 2 / 3
        elif name != "parallel":
            assert [group.split(".")[0] for group in groups] == [row[-1] for row in rows]
            assert len(set(groups)) == {"intents": 15, "intents14": 45}[name]


def test_digits_are_the_same_in_every_language(data):
    def digits(row):
        return sorted(re.findall(r"\d+", " ".join(row[:-1])))

    for (name, split, _), rows in data.items():
        for row, english in zip(rows, data[name, split, "en"]):
            assert digits(row) == digits(english), (name, split, row)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["intents", "intents14", "nli"])
def test_no_sentence_is_in_two_splits(data, name, language):
    train = sentences(data["parallel", "train", language])
    if language == "en":
        train |= sentences(data[name, "train", "en"])
    dev, test = sentences(data[name, "dev", language]), sentences(data[name, "test", language])
    assert not dev & test and not train & dev and not train & test
    for split in ("dev", "test"):
        rows = [tuple(normal(text) for text in row[:-1]) for row in data[name, split, language]]
        assert len(set(rows)) == len(rows), "duplicates"


SLOTS = (
    "product contract device colour city weekday month person duration channel account plan method"
)


def english_values():
    """What a reader of the English text can recognise, off the lexicon: {slot: pattern}."""
    surfaces, slot = {}, None
    for line in (SAMPLE / "lexicon" / "en.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("=="):
            slot = line.removeprefix("== slot ")
        elif slot in SLOTS.split() and ":" in line:
            word = re.sub(r"^[mf] ", "", line.split(": ", 1)[1]).lower()
            surfaces.setdefault(slot, []).append(word)
    patterns = {"number": re.compile(r"\d+")}
    for slot, words in surfaces.items():
        words = "|".join(sorted(words, key=len, reverse=True))
        patterns[slot] = re.compile(rf"\b({words})\b")
    return patterns


def combination(text, patterns):
    """The slot values in an English sentence: {(slot, surface), ...}."""
    found = set()
    for slot, pattern in patterns.items():
        found.update((slot, match) for match in pattern.findall(text.lower()))
    return frozenset(found)


def test_held_out_combinations_are_in_no_training_text(data):
    patterns = english_values()
    known, tested = set(), Counter()
    for name in ("intents", "intents14", "parallel"):
        for text, label in data[name, "train", "en"]:
            known.add((label, combination(text, patterns)))
    for name in ("intents", "intents14"):
        for text, label in data[name, "dev", "en"] + data[name, "test", "en"]:
            slots = combination(text, patterns)
            if len(slots) >= 2:
                tested[name] += 1
                assert (label, slots) not in known, text
    assert tested["intents"] > 500 and tested["intents14"] > 1000


def test_held_out_facts_are_in_no_training_pair(data):
    """What is said about a thing: its product, contract or device, and one value."""
    patterns = english_values()
    # "a month" (the price) and "the online shop" are part of phrasings here, not values
    values = ("colour", "weekday", "city", "person", "month", "number")

    def facts(rows):
        found = set()
        for row in rows:
            for text in row[:-1]:
                slots = combination(text, patterns)
                (thing,) = (pair for pair in slots if pair[0] in ("product", "contract", "device"))
                found.update((thing, pair) for pair in slots if pair[0] in values)
        return found

    topics = {"order", "contract", "repair"}
    train = [row for row in data["parallel", "train", "en"] if row[1] in topics]
    known = facts(data["nli", "train", "en"] + train)
    dev, test = facts(data["nli", "dev", "en"]), facts(data["nli", "test", "en"])
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
    scores = {}
    for *texts, label in data["nli", "test", "en"]:
        a, b = (set(re.findall(r"\w+", text.lower())) for text in texts)
        scores.setdefault(label, []).append(len(a & b) / len(b))
    means = {label: sum(values) / len(values) for label, values in scores.items()}
    assert means["neutral"] > 0.25 and means["contradiction"] > 0.4, means
    lowest, middle, highest = sorted(means, key=means.get)
    cuts = sorted({score for values in scores.values() for score in values} | {2.0})
    for low, high in itertools.combinations_with_replacement(cuts, 2):
        right = sum(score < low for score in scores[lowest])
        right += sum(low <= score < high for score in scores[middle])
        right += sum(score >= high for score in scores[highest])
        assert right < 0.7 * len(data["nli", "test", "en"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_in_its_own_script(data, language):
    script = {"zh": "CJK", "ar": "ARABIC", "ur": "ARABIC"}.get(language, "LATIN")
    for (_, _, other), rows in data.items():
        if other != language:
            continue
        text = "\n".join(field for row in rows for field in row[:-1])
        letters = Counter(character for character in text if character.isalpha())
        own = 0
        for letter, count in letters.items():
            own += count * unicodedata.name(letter).startswith(script)
        assert own > 0.95 * letters.total()
        if language == "zh":
            assert not re.search(r"[\u4e00-\u9fff] +[\u4e00-\u9fff]", text)
        if language == "ur":
            assert set("ےہںگچپٹڈڑ") <= set(text) and not set("يكة") & set(text)
        if language == "ar":
            assert not set("ےہںگچپٹڈڑکی") & set(text)


def test_a_lexicon_with_a_hole_is_named():
    english = make_data.read_lexicon(SAMPLE / "lexicon" / "en.txt")
    german = make_data.read_lexicon(SAMPLE / "lexicon" / "de.txt")
    del german["slot product"]["lamp"], german["say cancel.order"]
    german["say refund.order"].append("wo ist mein Geld?")
    with pytest.raises(ValueError) as error:
        make_data.check_lexicon(german, english, "de")
    for words in (
        "lexicon/de.txt",
        "'slot product' has no key 'lamp'",
        "no section 'say cancel.order'",
        "without {order}: wo ist mein Geld?",
    ):
        assert words in str(error.value)
