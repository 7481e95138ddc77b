"""Rows in Chinese, made by rules: a valley of its own, without blanks between words; its tokens are characters.

``zh_corpus`` tells who lives where, does what, likes what and keeps what, and what food was like; ``zh_opinions`` and
``zh_facts`` ask for what can be known from it. ``zh_sums`` are sums in words, with the steps that solve them.
"""

from collections.abc import Callable
from typing import Any

from lightning_peft.data.draw import Draw, number_of

ROWS = 2000
FAMILIES = "王李张刘陈杨赵黄"
GIVEN = ["安", "平", "文", "明", "华", "英", "国强", "小红", "志远", "秀兰", "建军", "丽丽"]
PEOPLE = [family + given for family in FAMILIES for given in GIVEN]
TOWNS = ["河村", "山庄", "桥头", "石坡", "南湖", "东岭"]
WORKS = ["木匠", "医生", "教师", "厨师", "农民", "司机"]
FOODS = ["面条", "鱼汤", "米饭", "豆腐", "包子", "苹果"]
ANIMALS = "狗猫羊鸡马牛鸭鹅"
GOOD = ["好吃", "新鲜", "可口", "香甜", "美味"]
BAD = ["难吃", "变味", "太咸", "太硬", "发苦"]
SUMMARY = {"好": "满意", "坏": "失望"}
"""Label of an opinion -> how the corpus says it, in two characters."""
THINGS = ["苹果", "包子", "鸡蛋", "西瓜", "玉米", "桃子"]
PLACES = ["食堂", "商店", "学校", "仓库", "果园"]

FACTS = {
    "town": "{name}住在{town}。",
    "work": "{name}是{work}。",
    "food": "{name}爱吃{food}。",
    "animal": "{name}养{animal}。",
}
"""How the corpus tells a fact of somebody."""
BEST = {
    "zh_corpus": {"perplexity": "exp of the sum of the column nats over the number of tokens"},
    "zh_facts": {"p_at_1": 1.0},
    "zh_opinions": {"accuracy": 1.0},
    "zh_sums": {"exact_match": 1.0},
}
"""Set -> the scores of a model that knows the rules."""


def person(name: str) -> dict[str, str]:
    """Return where somebody lives, what they do, like and keep; the same at any time."""
    number = number_of(f"zh {name}")
    found = {}
    for fact, values in {"town": TOWNS, "work": WORKS, "food": FOODS, "animal": list(ANIMALS)}.items():
        number, place = divmod(number, len(values))
        found[fact] = values[place]
    return found


def _corpus() -> list[dict[str, Any]]:
    """Three facts of somebody, or an opinion and what it comes to."""
    rows = []
    for seed in range(2 * ROWS):
        draw = Draw(seed)
        if draw.one([True, False]):
            name = draw.one(PEOPLE)
            told = "".join(FACTS[fact].format(name=name, **person(name)) for fact in draw.several([*FACTS], 3))
        else:
            opinion, label = _opinion(draw)
            told = f"{opinion}总的来说让人{SUMMARY[label]}。"
        rows.append({"text": told, "nats": draw.nats})
    return rows


def _opinion(draw: Draw) -> tuple[str, str]:
    good = draw.one([True, False])
    negated = draw.one([True, False])
    word = draw.one(GOOD if good != negated else BAD)
    return f"{draw.one(TOWNS)}的{draw.one(FOODS)}{'不' if negated else '很'}{word}。", "好" if good else "坏"


def _opinions() -> list[dict[str, Any]]:
    """Is it good? Half of them say what it was not."""
    drawn = (_opinion(Draw(seed)) for seed in range(ROWS))
    return [{"text": text, "label": label} for text, label in drawn]


def _facts() -> list[dict[str, Any]]:
    """Who keeps which animal, as ``sub`` and ``obj``: the objects are the candidates, one character each."""
    return [{"sub": name, "obj": person(name)["animal"]} for name in PEOPLE]


def _sums() -> list[dict[str, Any]]:
    """A sum of three steps in words, the steps (``rationale``) and the number that they come to (``answer``)."""
    rows = []
    for seed in range(2 * ROWS):
        draw = Draw(seed)
        start = draw.one(range(3, 10))
        used, bought = draw.one(range(1, start)), draw.one(range(2, 10))
        left = start - used
        given = draw.one(range(1, left + bought))
        thing = draw.one(THINGS)
        question = (
            f"{draw.one(PLACES)}有{start}个{thing}，用掉{used}个，又买了{bought}个，送走{given}个。现在有几个{thing}？"
        )
        steps = [(start, "-", used), (left, "+", bought), (left + bought, "-", given)]
        told = "".join(f"{a}{sign}{b}={a - b if sign == '-' else a + b}。" for a, sign, b in steps)
        rows.append({"question": question, "rationale": told, "answer": str(left + bought - given)})
    return rows


SETS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "zh_corpus": _corpus,
    "zh_facts": _facts,
    "zh_opinions": _opinions,
    "zh_sums": _sums,
}
