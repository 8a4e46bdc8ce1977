"""What the sample data can say, and how a lexicon turns a meaning into a sentence. Imported by
../make_data.py.

The format of LANG.txt: `== section` opens a section, `#` a comment; one entry or phrasing a line.
    == forms         `m: the=der {} ; acc=den {}`: the forms that a class of nouns has; {} is the
      noun
    == slot NAME     `key: [class] word [; form=text ...]`; the keys are the same in every language
    == say FRAME     ways to say an intent's frame      == fact TOPIC.ATTRIBUTE [yes|no]   ways to
      state a fact;
                     a line with `& ` is the short form for the second half of a sentence
    == habit         `probability old>new ; old>new`: a spelling habit, applied to the finished
      text; _ is a space
In a phrasing: {slot}, {slot.form}, {colour.@product} (the form named after the product's class),
{slot?a|b} (the word that agrees with the slot's gender, in the order of `genders`), [a|b] (any of
these).
"""

import re

LANGUAGES = ["en", "de", "es", "fr", "zh", "ar", "ur"]
FRAMES = {  # intent.frame: the slots that make up its meaning
    "refund.product": "product duration",
    "refund.amount": "amount weekday",
    "refund.order": "order",
    "refund.cancelled": "product month",
    "agent.about": "about product",
    "agent.call": "product weekday",
    "agent.person": "person contract",
    "cancel.product": "product reason",
    "cancel.contract": "contract month",
    "cancel.why": "contract creason",
    "cancel.order": "order",
    "delivery.product": "product duration",
    "delivery.city": "product city",
    "delivery.order": "order",
    "delivery.day": "product weekday",
    "address.city": "product city",
    "address.move": "city month",
    "address.order": "order city",
    "invoice.amount": "contract amount",
    "invoice.month": "contract month",
    "invoice.product": "product channel",
    "fault.device": "device issue",
    "fault.since": "device weekday",
    "fault.city": "city weekday",
    "login.forgot": "account channel",
    "login.code": "channel duration",
    "login.locked": "account weekday",
    "hours.city": "city weekday",
    "hours.late": "city hour",
    "hours.phone": "weekday hour",
    "plan.switch": "plan month",
    "plan.data": "gb month",
    "plan.price": "plan amount",
    "complaint.product": "product defect",
    "complaint.staff": "person city",
    "complaint.courier": "product weekday",
    "warranty.device": "device duration",
    "warranty.city": "device city",
    "warranty.bought": "product month",
    "stock.colour": "product colour",
    "stock.city": "product city",
    "stock.month": "product month",
    "payment.method": "method product",
    "payment.amount": "amount weekday",
    "payment.order": "order method",
}
# topic: what it is about, and its attributes with the slot of their value (yes/no where none)
FACTS = {
    "order": (
        "product",
        dict(
            colour="colour",
            day="weekday",
            city="city",
            gift="person",
            invoice="weekday",
            paid=None,
            arrived=None,
        ),
    ),
    "contract": (
        "contract",
        dict(
            price="amount",
            until="month",
            signed="month",
            holder="person",
            cancelled=None,
            confirmed=None,
        ),
    ),
    "repair": (
        "device",
        dict(
            visit="weekday",
            called="weekday",
            tech="person",
            cost="amount",
            bought="month",
            works=None,
            part=None,
        ),
    ),
}
NUMBERS = {  # slots written in digits in every language
    "amount": [15, 18, 25, 29, 35, 39, 45, 49, 59, 75, 89, 99],
    "hour": [5, 6, 7, 8],
    "gb": [5, 10, 15, 20, 30, 50, 80, 100],
    "order": range(20000, 80000),
}
MARKS = ".!?。！？؟۔"


def read_lexicon(path):
    """One language's file -> {section: [line, ...]}, slot sections as {key: {form: text}}; form ""
    is the bare word."""
    lexicon, section = {}, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if line.startswith("=="):
            section = " ".join(line.split()[1:])
            if section in lexicon:
                raise ValueError(f"{path}, line {number}: the section '{section}' is there twice")
            lexicon[section] = []
        elif line and not line.startswith("#"):
            if section is None:
                raise ValueError(
                    f"{path}, line {number}: expected a line '== section' before '{line}'"
                )
            lexicon[section].append(line)

    def pairs(text):
        return dict(part.strip().split("=", 1) for part in text.split(" ; ") if "=" in part)

    forms = {
        key.strip(): pairs(rest) for key, rest in (line.split(":", 1) for line in lexicon["forms"])
    }
    for name in [name for name in lexicon if name.startswith("slot ")]:
        entries = {}
        for key, rest in (line.split(":", 1) for line in lexicon[name]):
            word, kind = rest.split(" ; ")[0].strip(), ""
            if word.split(" ")[0] in forms:
                kind, _, word = word.partition(" ")
            derived = {form: text.replace("{}", word) for form, text in forms.get(kind, {}).items()}
            entries[key.strip()] = {"": word, "class": kind, **derived, **pairs(rest)}
        lexicon[name] = entries
    lexicon["language"] = [
        tuple(part.strip() for part in line.split(":", 1)) for line in lexicon["language"]
    ]
    lexicon["join"] = [text for key, text in lexicon["language"] if key == "join"]
    lexicon["language"] = dict(lexicon["language"])
    habits = [line.split(" ", 1) for line in lexicon["habit"]]
    lexicon["habit"] = [
        (
            float(probability),
            [part.strip().replace("_", " ").split(">") for part in rest.split(";")],
        )
        for probability, rest in habits
    ]
    return lexicon


def check_lexicon(lexicon, reference, language):
    """ValueError naming the section, key or slot that a language lacks, held against the first
    language."""
    problems = [f"no section '{name}'" for name in reference if name not in lexicon]
    problems += [
        f"unknown section '{name}': {LANGUAGES[0]}.txt has none"
        for name in lexicon
        if name not in reference
    ]
    for name in [name for name in reference if name in lexicon]:
        if name.startswith("slot "):
            problems += [
                f"'{name}' has no key '{key}'"
                for key in reference[name]
                if key not in lexicon[name]
            ]
            problems += [
                f"'{name}' has an unknown key '{key}'"
                for key in lexicon[name]
                if key not in reference[name]
            ]
        if name.startswith("fact ") and not any(line.startswith("& ") for line in lexicon[name]):
            problems.append(f"'{name}' has no line that starts with '& '")
    needed = {f"say {frame}": slots.split() for frame, slots in FRAMES.items()}
    for topic, (entity, attributes) in FACTS.items():
        for attribute, slot in attributes.items():
            for polarity in [""] if slot else [" yes", " no"]:
                needed[f"fact {topic}.{attribute}{polarity}"] = [entity] + ([slot] if slot else [])
    for name, slots in needed.items():
        for line in lexicon.get(name, []):
            used = set(re.findall(r"\{(\w+)", line)) | ({"product"} if "{about" in line else set())
            missing = [
                slot
                for slot in slots
                if slot not in used and not (line.startswith("& ") and slot == slots[0])
            ]
            problems += [f"'{name}' has a phrasing without {{{slot}}}: {line}" for slot in missing]
    if problems:
        raise ValueError(f"lexicon/{language}.txt: " + "\n  ".join(sorted(problems)))


def fill(template, meaning, lexicon, rng):
    """A phrasing and a meaning {slot: value} -> a sentence."""
    genders = lexicon["language"].get("genders", "").split()

    def word(match):
        slot, operator, rest = match.groups()
        for name in [slot] + ([rest[1:]] if rest.startswith("@") else []):
            if name not in meaning:
                raise ValueError(f"the slot '{name}' is not part of the meaning here: {template}")
        if slot in NUMBERS:
            return str(meaning[slot])
        entry = lexicon[f"slot {slot}"][meaning[slot]]
        if operator == "?":
            agreeing = dict(zip(genders, rest.split("|")))
            if entry["class"][:1] not in agreeing:
                raise ValueError(
                    f"no word for the gender of '{meaning[slot]}' ('slot {slot}'): {template}"
                )
            return agreeing[entry["class"][0]]
        if rest.startswith("@"):
            rest = lexicon[f"slot {rest[1:]}"][meaning[rest[1:]]]["class"][:1]
        if rest not in entry:
            raise ValueError(
                f"'slot {slot}' has no form '{rest}' for '{meaning[slot]}', needed by: {template}"
            )
        return entry[rest]

    text = template
    while "{" in text or "[" in text:  # a slot's text may hold slots itself
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match.group(1).split("|")), text)
        before, text = text, re.sub(r"\{(\w+)([.?]?)([^{}]*)\}", word, text)
        if text == before:
            raise ValueError(f"a bracket does not close, or holds no slot: {template}")
    return re.sub(" +", " ", re.sub(" +([.,،])", r"\1", text)).strip()


def capital(text):
    return re.sub(r"^([¿¡]?)(.)", lambda match: match.group(1) + match.group(2).upper(), text)


def spell(text, lexicon, rng):
    """A seeded touch of how people type: lower case, no final mark, the language's own habits."""
    for probability, replacements in lexicon["habit"]:
        if rng.random() < probability:
            for old, new in replacements:
                text = text.replace(old, new)
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip(MARKS).rstrip()
    return re.sub(" +", " ", text).strip()


def values(slot, lexicon):
    return NUMBERS.get(slot) or list(lexicon[f"slot {slot}"])


def message(frame, meaning, lexicon, rng):
    """An intent's frame and meaning -> what a customer writes, perhaps with a greeting and a
    closing word."""
    glue = "" if lexicon["language"]["name"] == "Chinese" else " "
    body = fill(rng.choice(lexicon[f"say {frame}"]), meaning, lexicon, rng)
    asks = body[-1] in "?？؟"
    openings = [
        line.lstrip("? ") for line in lexicon["opening"] if asks or not line.startswith("?")
    ]
    opening = rng.choice(openings) if rng.random() < 0.35 else ""
    if not opening or opening[-1] in MARKS:
        body = capital(body)
    closing = glue + rng.choice(lexicon["closing"]) if rng.random() < 0.25 else ""
    return spell(opening + (glue if opening else "") + body + closing, lexicon, rng)


def statement(topic, facts, lexicon, rng):
    """[(attribute, meaning), ...] -> a sentence that states them, the second one in its short form;
    not yet `spell`ed."""
    parts = []
    for attribute, meaning in facts:
        name = f"fact {topic}.{attribute}" + (f" {meaning['is']}" if "is" in meaning else "")
        lines = [
            line.lstrip("& ") for line in lexicon[name] if line.startswith("& ") == bool(parts)
        ]
        parts.append(fill(rng.choice(lines), meaning, lexicon, rng))
    join = "{a}" if len(parts) == 1 else rng.choice(lexicon["join"])
    return (
        capital(join.replace("{a}", parts[0]).replace("{b}", parts[-1]))
        + lexicon["language"]["stop"]
    )
