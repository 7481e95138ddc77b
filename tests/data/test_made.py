"""The made-up valley: what a rule has made, a rule can answer."""

import math
import re
from itertools import combinations

import pytest

from lightning_peft import TuningError
from lightning_peft.data import synthetic, synthetic_zh
from lightning_peft.prompting import extract_answer


@pytest.mark.parametrize("name", synthetic.names())
def test_splits(name: str) -> None:
    splits, again = synthetic.load(name), synthetic.load(name)
    texts = {
        split: [str({k: v for k, v in row.items() if k != "nats"}) for row in rows] for split, rows in splits.items()
    }
    assert texts == {
        split: [str({k: v for k, v in row.items() if k != "nats"}) for row in r] for split, r in again.items()
    }
    assert all(len(set(rows)) == len(rows) for rows in texts.values())
    for one, two in combinations(texts.values(), 2):
        assert not set(one) & set(two)
    total = sum(map(len, texts.values()))
    few = name.endswith("facts")
    shares = {"validation": 0.2, "test": 0.4} if few else {"validation": 0.1, "test": 0.1}
    assert all(abs(len(texts[split]) / total - share) < (0.12 if few else 0.06) for split, share in shares.items())
    assert name in synthetic.BEST


def test_unknown_sets() -> None:
    with pytest.raises(TuningError, match=r"^made://tag is none of the sets .*; it has e\.g\. tags"):
        synthetic.load("tag")


def test_opinions_and_their_words() -> None:
    for row in synthetic.load("opinions")["train"]:
        words = row["text"].split()
        is_good = (words[-2] in synthetic.GOOD) != ("not" in words)
        assert row["label"] == ("good" if is_good else "bad")


def test_answers_stand_in_their_contexts() -> None:
    for row in synthetic.load("questions")["train"]:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
        name = row["question"].removesuffix(" ?").split()[2]
        context = f" {row['context']}"
        assert context.count(f" {name} ") == 1
        place = context.index(f" {name} ")
        assert place < start < context.index(" .", place)


def test_descriptions_follow_from_their_sources() -> None:
    for row in synthetic.load("descriptions")["train"]:
        facts = dict(part.split(" : ") for part in row["source"].split(" | "))
        assert row["target"] == "{name} is a {work} from {town} who likes {food} .".format(**facts)


def test_facts_are_in_the_corpus() -> None:
    corpus = " ".join(synthetic.load("corpus")["train"]["text"])
    facts = [row for rows in synthetic.load("facts").values() for row in rows]
    assert len(facts) == len(synthetic.PEOPLE)
    assert all(f"{row['sub']} keeps a {row['obj']} ." in corpus for row in facts)


def test_tags_are_spans() -> None:
    for row in synthetic.load("tags")["train"]:
        before = "O"
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            assert not tag.startswith("I-") or before[2:] == tag[2:]
            assert (tag == "B-FOOD") == (token in synthetic.FOODS)
            before = tag


def test_the_entropy_of_the_corpus() -> None:
    for row in synthetic.load("corpus")["train"]:
        if " all in all " in row["text"]:
            words = len(synthetic.GOOD)
            assert row["nats"] == pytest.approx(
                math.log(2 * 2 * 2 * words * len(synthetic.FOODS) * len(synthetic.TOWNS))
            )
        else:
            assert row["nats"] == pytest.approx(math.log(2 * len(synthetic.PEOPLE) * 4 * 3 * 2))


def test_chinese_rows_follow_their_rules() -> None:
    for row in synthetic.load("zh_opinions")["train"]:
        is_good = (row["text"][-3:-1] in synthetic_zh.GOOD) != (row["text"][-4] == "不")
        assert row["label"] == ("好" if is_good else "坏")
    corpus = "".join(synthetic.load("zh_corpus")["train"]["text"])
    for rows in synthetic.load("zh_facts").values():
        assert all(f"{row['sub']}养{row['obj']}。" in corpus for row in rows)
    for row in synthetic.load("zh_sums")["test"]:
        start, used, bought, given = map(int, re.findall(r"\d+", row["question"]))
        assert start - used + bought - given == int(row["answer"]) > 0
        assert extract_answer(row["rationale"]) == row["answer"]
