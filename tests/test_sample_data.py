"""The sample data: reproducible, row-parallel, no sentence twice; half a pair tells no label."""

import re
import sys
import unicodedata
from collections import Counter

import pytest
from conftest import ROOT

SAMPLE = ROOT / "sample"
LANGUAGES = ["en", "de", "es", "fr", "zh", "ar", "ur"]
COUNTS = {  # rows of each split, labels
    "intents": ({"train": 2400, "dev": 300, "test": 600}, 4),
    "intents14": ({"train": 4004, "dev": 420, "test": 840}, 14),
    "nli": ({"train": 6000, "dev": 300, "test": 600}, 3),
    "parallel": ({"train": 8000}, 17),
}
COMMITTED = ["intents", "intents14", "nli"]

sys.path.insert(0, str(SAMPLE))  # as when the script is run

import make_data  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample")
    make_data.main(["--out", str(out), "--seed", "0"])
    return out


@pytest.fixture(scope="module")
def data(made):
    """{(set, split, language): rows}: the texts, the label, the group where there is one."""
    tables = {}
    for path in made.glob("*/*.tsv"):
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        header, *rows = [line.split("\t") for line in lines]
        for row in rows:
            assert len(row) == len(header) and all(field.strip() == field != "" for field in row)
        split, language, _ = path.name.split(".")
        tables[path.parent.name, split, language] = rows
    return tables


def texts(name, row):
    """A row's one text, or its two, letters and digits alone."""
    count = 2 if name == "nli" else 1
    return tuple(re.sub(r"[\W_]", "", text.lower()) for text in row[:count])


def labels(name, rows):
    return [row[2 if name == "nli" else 1] for row in rows]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_files_are_what_the_script_makes(made, name):
    committed, fresh = files(SAMPLE / name), files(made / name)
    assert committed.keys() == fresh.keys()
    assert [file for file in fresh if committed[file] != fresh[file]] == []


@pytest.mark.parametrize("name", COUNTS)
def test_rows_are_parallel_and_labels_balanced_but_in_one_training_set(made, data, name):
    counts, classes = COUNTS[name]
    names = (made / name / "labels.txt").read_text().splitlines()
    assert len(names) == classes
    for split, count in counts.items():
        english = labels(name, data[name, split, "en"])
        assert len(english) == count and set(english) == set(names)
        sizes = Counter(english)
        if (name, split) == ("intents", "train"):
            assert sizes == {"refund": 1200, "agent": 600, "delivery": 360, "cancel": 240}
        elif name != "parallel":
            assert len(set(sizes.values())) == 1
        there = [code for code in LANGUAGES if (name, split, code) in data]
        assert there == (["en"] if split == "train" and name != "parallel" else LANGUAGES)
        for language in there:
            assert labels(name, data[name, split, language]) == english


@pytest.mark.parametrize("name", COMMITTED)
def test_no_sentence_is_in_two_splits(data, name):
    for language in LANGUAGES:
        keys = [(name, "dev", language), (name, "test", language), ("parallel", "train", language)]
        if language == "en":
            keys.append((name, "train", "en"))
        seen = []
        for of, split, code in keys:
            rows = [texts(of, row) for row in data[of, split, code]]
            assert split == "train" or len(set(rows)) == len(rows), "duplicates"
            seen.append({text for row in rows for text in row})
        dev, test, *train = seen
        assert not dev & test and not (dev | test) & set().union(*train)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_each_half_of_a_pair_has_every_label_equally_often(data, split, half):
    """So that no classifier of one half alone can be better than chance on these rows."""
    blocks = {}
    for *pair, label, group in data["nli", split, "en"]:
        counts = blocks.setdefault(group, {}).setdefault(texts("nli", pair)[half], Counter())
        counts[label] += 1
    assert len(blocks) == COUNTS["nli"][0][split] / 12
    for block in blocks.values():
        assert len(block) == 4
        assert all(sorted(counts.values()) == [1, 1, 1] for counts in block.values())


NEVER = {"ar": "ےہںگچپٹڈڑکی", "ur": "يكة"}  # letters of the other one


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_in_its_own_script(data, language):
    script = {"zh": "CJK", "ar": "ARABIC", "ur": "ARABIC"}.get(language, "LATIN")
    fields = []
    for (name, _, code), rows in data.items():
        if code == language:
            for row in rows:
                fields += row[: 2 if name == "nli" else 1]
    text = "\n".join(fields)
    letters = Counter(filter(str.isalpha, text))
    own = [letters[letter] for letter in letters if unicodedata.name(letter).startswith(script)]
    assert sum(own) > 0.95 * letters.total()
    assert not set(NEVER.get(language, "")) & set(text)
    if language == "zh":
        assert not re.search(r"[\u4e00-\u9fff] +[\u4e00-\u9fff]", text)


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
