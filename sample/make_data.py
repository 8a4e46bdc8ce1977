"""Writes the sample data: short customer messages in seven languages, from hand-written lexicons.

    python sample/make_data.py --out sample --seed 0

Reads   sample/lexicon/LANG.txt, one a language; to add one, copy a file and list it in LANGUAGES.
Writes  OUT/intents/    4 intents, train.en (imbalanced), dev and test in all languages
        OUT/intents14/  the same with 14 intents, roughly balanced
        OUT/nli/        sentence pairs: entailment, neutral, contradiction
        OUT/parallel/   train.LANG in all languages, to pretrain a small multilingual BERT on
Each folder has labels.txt, {train,dev,test}.LANG.tsv and sources.json. The column `group` has what
rows have in common: an intent's frame; for pairs, the block of twelve that share their sentences.
Row i means the same in every language; which phrasing, greeting and spelling a language uses is its
own draw. Same seed, same bytes, on every machine.

A row starts as a meaning: a frame such as cancel.product and a value for each of its slots.
Meanings, not sentences, are dealt out to train, dev and test (`split_of`, `deal`), so that a
combination held out is held out in every language. The lexicons' format, and what there is to say,
are explained in sample/lexicon/phrases.py.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

from lexicon.phrases import (
    FACTS,
    FRAMES,
    LANGUAGES,
    check_lexicon,
    message,
    read_lexicon,
    spell,
    statement,
    values,
)

INTENTS14 = list(dict.fromkeys(frame.split(".")[0] for frame in FRAMES))
SPLITS = {"train": 0.60, "dev": 0.14, "test": 0.26}  # shares of the meanings


def split_of(intent, meaning, seed):
    """The split of a combination of slot values, for all frames of an intent and all languages."""
    draw = random.Random(f"{seed} {intent} {sorted(meaning.items())}").random()
    return (
        "train"
        if draw < SPLITS["train"]
        else "dev"
        if draw < SPLITS["train"] + SPLITS["dev"]
        else "test"
    )


def deal(topic, lexicon, seed):
    """{(split, entity): {attribute: [value, ...]}}: the facts that each split may state."""
    entity_slot, attributes = FACTS[topic]
    entities, facts = values(entity_slot, lexicon), {}
    for kind in dict.fromkeys(slot or attribute for attribute, slot in attributes.items()):
        # attributes with one kind of value share their deal: no (entity, value) is in two splits
        names = [attribute for attribute, slot in attributes.items() if (slot or attribute) == kind]
        yes_no = attributes[names[0]] is None
        for group in [entities] if yes_no else [[entity] for entity in entities]:
            pool = list(entities if yes_no else values(kind, lexicon))
            random.Random(f"{seed} deal {topic} {kind} {group[0]}").shuffle(pool)
            dev, test = max(2, round(len(pool) * 0.14)), max(2, round(len(pool) * 0.26))
            for split, part in [
                ("dev", pool[:dev]),
                ("test", pool[dev : dev + test]),
                ("train", pool[dev + test :]),
            ]:
                for entity in part if yes_no else group:
                    for name in names:
                        facts.setdefault((split, entity), {})[name] = (
                            ["yes", "no"] if yes_no else part
                        )
    return facts


def normal(text):
    """What counts as the same sentence: letters and digits only, in lower case."""
    return "".join(character for character in text.lower() if character.isalnum())


def draw_meaning(frame, split, lexicon, rng, seed):
    """Random values for a frame's slots, out of the combinations that belong to the split."""
    while True:
        meaning = {slot: rng.choice(values(slot, lexicon)) for slot in FRAMES[frame].split()}
        if split_of(frame.split(".")[0], meaning, seed) == split:
            return {**meaning, "me": rng.choice("mf")}


def draw_facts(topic, split, dealt, rng):
    """-> (entity, {attribute: [value, ...]}) of a random entity with at least two attributes."""
    entities = [
        entity
        for part, entity in dealt[topic]
        if part == split and len(dealt[topic][part, entity]) > 1
    ]
    entity = rng.choice(entities)
    return entity, dealt[topic][split, entity]


def fact(topic, entity, attribute, value, me):
    """-> (attribute, meaning), as `statement` takes it."""
    entity_slot, attributes = FACTS[topic]
    return attribute, {entity_slot: entity, attributes[attribute] or "is": value, "me": me}


def intent_rows(name, split, counts, languages, lexicons, seed):
    """{label: count} -> [({language: text}, label, frame), ...], shuffled.

    No two rows say the same in any language.
    """
    rng, rows, seen = random.Random(f"{seed} {name} {split}"), [], set()
    for label, count in counts.items():
        frames = [frame for frame in FRAMES if frame.split(".")[0] == label]
        wanted = len(rows) + count
        while len(rows) < wanted:
            frame = rng.choice(frames)
            meaning = draw_meaning(frame, split, lexicons[LANGUAGES[0]], rng, seed)
            texts = {
                language: message(
                    frame, meaning, lexicons[language], random.Random(f"{rng.random()} {language}")
                )
                for language in languages
            }
            keys = {(language, normal(text)) for language, text in texts.items()}
            if not keys & seen:
                seen |= keys
                rows.append((texts, label, frame))
    rng.shuffle(rows)
    return rows


def statement_rows(count, lexicons, dealt, seed):
    """Rows that state one or two facts of the train split; the label is the topic."""
    rng, rows, seen = random.Random(f"{seed} statements"), [], set()
    while len(rows) < count:
        topic, me = rng.choice(list(FACTS)), rng.choice("mf")
        entity, known = draw_facts(topic, "train", dealt, rng)
        names = rng.sample(list(known), rng.choice([1, 1, 2]))
        facts = [
            fact(topic, entity, attribute, rng.choice(known[attribute]), me) for attribute in names
        ]
        draw = rng.random()
        texts = {}
        for language, lexicon in lexicons.items():
            draws = random.Random(f"{draw} {language}")
            texts[language] = spell(statement(topic, facts, lexicon, draws), lexicon, draws)
        if normal(texts[LANGUAGES[0]]) not in seen:
            seen.add(normal(texts[LANGUAGES[0]]))
            rows.append((texts, topic))
    return rows


def nli_rows(split, count, languages, lexicons, dealt, seed):
    """Pairs in blocks of 12: four facts of one thing (two values each of attributes A and B).

    Each is a premise once with each label and a hypothesis once with each label, so that neither
    sentence alone says anything about the label.

        premise      A=1    A=2    B=1    B=2
        hypothesis   A=1    A=2    B=1    B=2    entailment
                     B=1    B=2    A=1    A=2    neutral
                     A=2    A=1    B=2    B=1    contradiction
    """
    partners = {"entailment": [0, 1, 2, 3], "neutral": [2, 3, 0, 1], "contradiction": [1, 0, 3, 2]}
    rng, rows, seen = random.Random(f"{seed} nli {split}"), [], set()
    while len(rows) < count:
        topic, me = rng.choice(list(FACTS)), rng.choice("mf")
        entity, known = draw_facts(topic, split, dealt, rng)
        slots = FACTS[topic][1]
        first, second, *others = rng.sample(list(known), len(known))
        twins = [other for other in others if slots[other] and slots[other] == slots[first]]
        if (
            twins and rng.random() < 0.5
        ):  # two attributes of the same kind with the same values: the words overlap
            others[others.index(twins[0])], second = second, twins[0]
        facts = [(first, value) for value in rng.sample(known[first], 2)]
        facts += [
            (second, value)
            for value in (
                [value for _, value in facts]
                if slots[first] and slots[first] == slots[second]
                else rng.sample(known[second], 2)
            )
        ]
        hypotheses = [[fact(topic, entity, *one, me)] for one in facts]
        premises = [list(hypothesis) for hypothesis in hypotheses]
        for premise in premises:  # half of the premises state one thing more, before or after
            if others and rng.random() < 0.5:
                other = rng.choice(others)
                premise.insert(
                    rng.choice([0, 1]), fact(topic, entity, other, rng.choice(known[other]), me)
                )
        block = {}
        for language in languages:
            draws, lexicon = random.Random(f"{rng.random()} {language}"), lexicons[language]
            while True:
                texts_a, texts_b = (
                    [statement(topic, facts, lexicon, draws) for facts in side]
                    for side in (premises, hypotheses)
                )
                if all(a != b for a, b in zip(texts_a, texts_b)):  # entailed, but in other words
                    break
            texts_a, texts_b = (
                [spell(text, lexicon, draws) for text in side] for side in (texts_a, texts_b)
            )
            block[language] = [
                (texts_a[i], texts_b[other[i]]) for other in partners.values() for i in range(4)
            ]
        keys = {
            (language, normal(a), normal(b)) for language in languages for a, b in block[language]
        }
        if len(keys) == 12 * len(languages) and not keys & seen:
            seen |= keys
            labels = [label for label in partners for _ in range(4)]
            name = f"block {len(rows) // 12}"
            for i, label in enumerate(labels):
                texts = {language: "\t".join(pairs[i]) for language, pairs in block.items()}
                rows.append((texts, label, name))
    rng.shuffle(rows)
    return rows


def write_set(folder, labels, splits, seed):
    """{split: rows of (texts, label) or (texts, label, group)} -> a data set folder.

    Each file is written beside its place and moved there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, sources = {"labels.txt": "".join(label + "\n" for label in labels)}, {}
    for split, rows in splits.items():
        for language in rows[0][0]:
            header = ["text_a", "text_b"] if "\t" in rows[0][0][language] else ["text"]
            header += ["label", "group"][: len(rows[0]) - 1]
            lines = [header] + [[texts[language], *cells] for texts, *cells in rows]
            files[f"{split}.{language}.tsv"] = "".join("\t".join(line) + "\n" for line in lines)
            sources[f"{split}.{language}.tsv"] = {
                "source": "sample/make_data.py",
                "seed": seed,
                "rows": len(rows),
            }
    for name, entry in sources.items():
        entry["sha256"] = hashlib.sha256(files[name].encode("utf-8")).hexdigest()
    files["sources.json"] = json.dumps(sources, indent=1, sort_keys=True) + "\n"
    for name, text in files.items():
        (folder / f".{name}.part").write_bytes(text.encode("utf-8"))
        (folder / f".{name}.part").replace(folder / name)
    print(
        f"{folder}: {len(labels)} labels; rows:",
        ", ".join(f"{split} {len(rows)}" for split, rows in splits.items()),
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder to write to (default: sample/)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the split and of all draws (default: 0)"
    )
    return parser.parse_args(argv)


def make(out, seed):
    folder = Path(__file__).parent / "lexicon"
    lexicons = {language: read_lexicon(folder / f"{language}.txt") for language in LANGUAGES}
    for language, lexicon in lexicons.items():
        check_lexicon(lexicon, lexicons[LANGUAGES[0]], language)
    dealt = {topic: deal(topic, lexicons[LANGUAGES[0]], seed) for topic in FACTS}
    english = LANGUAGES[:1]  # training sets are in English only: the task is zero-shot

    def rows(name, split, counts, languages):
        return intent_rows(name, split, counts, languages, lexicons, seed)

    four = {"refund": 1200, "agent": 600, "cancel": 240, "delivery": 360}
    write_set(
        out / "intents",
        list(four),
        {
            "train": rows("intents", "train", four, english),
            "dev": rows("intents", "dev", dict.fromkeys(four, 75), LANGUAGES),
            "test": rows("intents", "test", dict.fromkeys(four, 150), LANGUAGES),
        },
        seed,
    )
    write_set(
        out / "intents14",
        INTENTS14,
        {
            "train": rows("intents14", "train", dict.fromkeys(INTENTS14, 286), english),
            "dev": rows("intents14", "dev", dict.fromkeys(INTENTS14, 30), LANGUAGES),
            "test": rows("intents14", "test", dict.fromkeys(INTENTS14, 60), LANGUAGES),
        },
        seed,
    )
    write_set(
        out / "nli",
        ["entailment", "neutral", "contradiction"],
        {
            "train": nli_rows("train", 6000, english, lexicons, dealt, seed),
            "dev": nli_rows("dev", 300, LANGUAGES, lexicons, dealt, seed),
            "test": nli_rows("test", 600, LANGUAGES, lexicons, dealt, seed),
        },
        seed,
    )
    parallel = rows("parallel", "train", dict.fromkeys(INTENTS14, 350), LANGUAGES)
    parallel = [row[:2] for row in parallel]
    parallel += statement_rows(8000 - len(parallel), lexicons, dealt, seed)
    random.Random(f"{seed} parallel").shuffle(parallel)
    write_set(out / "parallel", INTENTS14 + list(FACTS), {"train": parallel}, seed)


def main(argv=None):
    args = parse_args(argv)
    try:
        make(args.out, args.seed)
    except (OSError, ValueError) as error:
        print(f"make_data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
