"""Synthetic rows for every text task, made by rules, so that each runs where nothing can be downloaded.

All of it is about one made-up valley: who lives in which town, does which work, likes which food and keeps which
animal. A small language model that was trained on ``corpus`` knows the valley's words and facts. What a rule has made,
a rule can answer: `BEST` has the scores of a model that knows the rules. The rows are a function of nothing: they are
the same on every machine, and a hash decides which of them train (8 of 10), validate or test (1 of 10 each); of the few
``facts`` 4 of 10 train and 4 test. The sets ``zh_...`` are those of a valley where Chinese is spoken (`synthetic_zh`).
"""

import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data import synthetic_zh
from lightning_peft.data.draw import Draw, number_of

SCHEME = "made://"
ROWS = 2000
"""How many rows are drawn for a set, before doublets are left out."""

TOWNS = ["lund", "berg", "moss", "dale", "ford", "brook", "hill", "vale", "marsh", "wells", "holt", "crest"]
FOODS = ["rice", "soup", "bread", "fish", "cake", "plums", "cheese", "beans"]
ANIMALS = ["dog", "cat", "goat", "hen", "horse", "bee", "duck", "fox"]
WORKS = ["baker", "smith", "tailor", "miller", "painter", "doctor", "teacher", "farmer"]
COLOURS = ["red", "blue", "green", "white"]
GOOD = ["good", "fine", "lovely", "great", "tasty", "superb"]
BAD = ["bad", "poor", "awful", "dull", "stale", "nasty"]
PLACES = ["river", "road", "bridge", "mill", "church", "school"]
FIRST = ["an", "be", "cor", "do", "el", "fi", "gu", "ha", "il", "jo", "ke", "lu", "mi", "ne", "os"]
LAST = ["a", "mar", "lin", "rik", "tos", "va", "dan", "su"]
PEOPLE = [first + last for first in FIRST for last in LAST]
FAMILIES = ["berg", "dale", "ford", "hill", "holt", "wells", "stone", "wood"]
"""Family names; the first six are towns as well, so that only the words around them tell which is meant."""

BEST = {
    "chats": {"bleu": 1.0, "chrf": 1.0, "rougeL": 1.0, "exact_match": 1.0, "perplexity": 1.0},
    "choices": {"accuracy": 1.0},
    "corpus": {"perplexity": "exp of the sum of the column nats over the number of tokens"},
    "descriptions": {"bleu": 1.0, "chrf": 1.0, "rougeL": 1.0, "exact_match": 1.0, "perplexity": 1.0},
    "facts": {"p_at_1": 1.0},
    "matches": {"recall_at_1": 1.0},
    "opinions": {"accuracy": 1.0},
    "preferences": {"accuracy": 1.0},
    "questions": {"exact_match": 1.0, "f1": 1.0},
    "sentences": {"accuracy": 1.0},
    "tags": {"f1": 1.0},
    **synthetic_zh.BEST,
}
"""Set -> the scores of a model that knows the rules; ``facts`` can be known from ``corpus`` alone."""


def load(name: str) -> dict[str, Dataset]:
    """Return the splits of a set.

    Raises:
        TuningError: there is no set of that name.
    """
    if name not in _SETS:
        raise TuningError(f"{SCHEME}{name} is none of the sets that are made by rules{near(name, _SETS, most=9)}.")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    seen = set()
    for row in _SETS[name]():
        key = "\n".join(str(value) for column, value in row.items() if column != "nats")
        if key not in seen:
            seen.add(key)
            splits[_split(key, *_SHARES.get(name, (1, 1)))].append(row)
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


def names() -> list[str]:
    """Return the names of the sets."""
    return sorted(_SETS)


def person(name: str) -> dict[str, str]:
    """Return where somebody lives, what they do, like and keep; the same at any time."""
    draw = random.Random(f"valley {name}")
    lists = {"town": TOWNS, "work": WORKS, "food": FOODS, "animal": ANIMALS}
    return {fact: draw.choice(values) for fact, values in lists.items()}


_SHARES = {"facts": (4, 2), "zh_facts": (4, 2)}
"""Tenths of a set that test and validate, if not 1 and 1: twelve facts would be no measure."""


def _split(key: str, test: int, validation: int) -> str:
    number = number_of(key) % 10
    return "test" if number < test else "validation" if number < test + validation else "train"


FACTS: dict[str, str] = {
    "town": "{name} lives in {town} .",
    "work": "{name} works as a {work} .",
    "food": "{name} likes {food} .",
    "animal": "{name} keeps a {animal} .",
}
"""How the corpus tells a fact of somebody."""


def _corpus() -> list[dict[str, Any]]:
    """Texts of two or three sentences: facts of somebody in any order, or an opinion and what it comes to."""
    rows = []
    for seed in range(3 * ROWS):
        draw = Draw(seed)
        if draw.one([True, False]):
            name = draw.one(PEOPLE)
            text = " ".join(FACTS[fact].format(name=name, **person(name)) for fact in draw.several([*FACTS], 3))
        else:
            opinion, label = _opinion(draw)
            text = f"{opinion} all in all it was {label} ."
        rows.append({"text": text, "nats": draw.nats})
    return rows


def _opinion(draw: Draw) -> tuple[str, str]:
    good = draw.one([True, False])
    negated = draw.one([True, False])
    word = draw.one(GOOD if good != negated else BAD)
    food, town = draw.one(FOODS), draw.one(TOWNS)
    text = f"the {food} in {town} was {'not ' if negated else ''}{word} ."
    return text, "good" if good else "bad"


def _opinions() -> list[dict[str, Any]]:
    """Is it good? Half of them say what it was not."""
    drawn = (_opinion(Draw(seed)) for seed in range(ROWS))
    return [{"text": text, "label": label} for text, label in drawn]


def _sentences() -> list[dict[str, Any]]:
    """Two questions on one text: is it told, asked or ordered (``form``), and what is it about (``topic``)?"""
    forms = {"told": "{name} {likes} the {thing} .", "asked": "does {name} {like} the {thing} ?"}
    forms["ordered"] = "{name} , {like} the {thing} !"
    topics = {"food": FOODS, "animal": ANIMALS, "place": PLACES}
    rows = []
    for seed in range(ROWS):
        draw = Draw(seed)
        form, topic, verb = draw.one(list(forms)), draw.one(list(topics)), draw.one(["like", "want", "leave"])
        thing = draw.one([f"{colour} {word}" for colour in COLOURS for word in topics[topic]])
        text = forms[form].format(name=draw.one(PEOPLE), like=verb, likes=f"{verb}s", thing=thing)
        rows.append({"text": text, "form": form, "topic": topic})
    return rows


def _tags() -> list[dict[str, Any]]:
    """Persons of one word or two, towns of one word or two, and foods, in the BIO scheme."""
    frames = ["{PER} lives in {LOC} .", "{PER} and {PER} went from {LOC} to {LOC} .", "in {LOC} {PER} eats {FOOD} ."]
    frames += ["who in {LOC} sells {FOOD} to {PER} ?", "{FOOD} , said {PER} , is better in {LOC} ."]
    rows = []
    for seed in range(ROWS):
        draw = Draw(seed)
        tokens: list[str] = []
        tags: list[str] = []
        for word in draw.one(frames).split():
            kind = word.strip("{}")
            span = _SPANS[kind](draw) if kind != word else None
            tokens += span or [word]
            tags += [f"{'I' if i else 'B'}-{kind}" for i in range(len(span))] if span else ["O"]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def _named(draw: Draw) -> list[str]:
    return [draw.one(PEOPLE), *([draw.one(FAMILIES)] if draw.one([True, False]) else [])]


def _placed(draw: Draw) -> list[str]:
    return [*(["new"] if draw.one([True, False]) else []), draw.one(TOWNS)]


_SPANS: dict[str, Callable[[Draw], list[str]]] = {"PER": _named, "LOC": _placed, "FOOD": lambda d: [d.one(FOODS)]}


ASKED: dict[str, str] = {
    "town": "where does {name} live ?",
    "work": "what does {name} work as ?",
    "food": "what does {name} like ?",
    "animal": "what does {name} keep ?",
}
"""How somebody's fact is asked for."""


def _chats() -> list[dict[str, Any]]:
    """What is told of two people, a question about the one, its answer, and the same about the other."""
    rows = []
    for seed in range(ROWS):
        draw = Draw(seed)
        pairs = list(zip(draw.random.sample(PEOPLE, 2), draw.several([*FACTS], 2), strict=True))
        told = [FACTS[fact].format(name=name, **person(name)) for name, fact in pairs]
        asked = [ASKED[fact].format(name=name) for name, fact in pairs]
        said = [("user", f"{' '.join(told)} {asked[0]}"), ("assistant", told[0])]
        said += [("user", asked[1]), ("assistant", told[1])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    return rows


def _matches() -> list[dict[str, Any]]:
    """Questions about somebody, each with the sentence that answers it."""
    return [
        {"anchor": ASKED[fact].format(name=name), "positive": FACTS[fact].format(name=name, **person(name))}
        for name in PEOPLE
        for fact in FACTS
    ]


def _preferences() -> list[dict[str, Any]]:
    """What is told of two people, a question about one of them, the right answer and a wrong one."""
    lists = {"town": TOWNS, "work": WORKS, "food": FOODS, "animal": ANIMALS}
    rows = []
    for seed, row in enumerate(_chats()):
        draw, (asked, said, *_) = Draw(seed), row["messages"]
        name, word = said["content"].split()[0], said["content"].split()[-2]
        fact = next(fact for fact, values in lists.items() if word in values and person(name)[fact] == word)
        wrong = FACTS[fact].format(name=name, **{fact: draw.one([value for value in lists[fact] if value != word])})
        rows.append({"prompt": asked["content"], "chosen": said["content"], "rejected": wrong})
    return rows


def _questions() -> list[dict[str, Any]]:
    """What is told of four people in random order, and a question about one of them."""
    rows = []
    for seed in range(ROWS):
        draw = Draw(seed)
        people = draw.random.sample(PEOPLE, 4)
        context, answers = "", {}
        for name in people:
            fact = draw.one(list(FACTS))
            lists = {"town": TOWNS, "work": WORKS, "food": FOODS, "animal": ANIMALS}
            value = draw.one(lists[fact])
            told = FACTS[fact].format(name=name, **{fact: value})
            answers[name] = (fact, value, len(context) + told.rindex(value))
            context += f"{told} "
        name = draw.one(people)
        fact, value, start = answers[name]
        question = ASKED[fact].format(name=name)
        answer = {"text": [value], "answer_start": [start]}
        rows.append({"context": context.strip(), "question": question, "answers": answer})
    return rows


def _choices() -> list[dict[str, Any]]:
    """What is told of four people, a question about one of them, and three answers to choose from (``options``)."""
    rows = []
    for seed, row in enumerate(_questions()):
        (right,) = row["answers"]["text"]
        draw = Draw(seed)
        kind = next(values for values in (TOWNS, FOODS, WORKS, ANIMALS) if right in values)
        options = [right, *draw.random.sample([value for value in kind if value != right], 2)]
        draw.random.shuffle(options)
        named = {"context": row["context"], "question": row["question"], "options": options}
        rows.append(named | {"label": options.index(right)})
    return rows


def _descriptions() -> list[dict[str, Any]]:
    """From a table of facts to the sentence that tells them, in a fixed order."""
    rows = []
    for seed in range(ROWS):
        draw = Draw(seed)
        facts = {"name": draw.one(PEOPLE), "town": draw.one(TOWNS), "work": draw.one(WORKS), "food": draw.one(FOODS)}
        order = draw.random.sample(list(facts), len(facts))
        source = " | ".join(f"{fact} : {facts[fact]}" for fact in order)
        rows.append({"source": source, "target": "{name} is a {work} from {town} who likes {food} .".format(**facts)})
    return rows


def _facts() -> list[dict[str, Any]]:
    """Who keeps which animal, as ``sub`` and ``obj``: the objects are the candidates."""
    return [{"sub": name, "obj": person(name)["animal"]} for name in PEOPLE]


_SETS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "chats": _chats,
    "matches": _matches,
    "preferences": _preferences,
    "choices": _choices,
    "corpus": _corpus,
    "descriptions": _descriptions,
    "facts": _facts,
    "opinions": _opinions,
    "questions": _questions,
    "sentences": _sentences,
    "tags": _tags,
    **synthetic_zh.SETS,
}
