"""Which rows demonstrate a task, in which order, and what they look like."""

from collections import Counter

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting import Template, balanced_rows, context, ordered, random_rows, within, written
from lightning_peft.prompting.demonstrations import check_apart


def test_random_rows_are_those_of_the_seed() -> None:
    rows = random_rows(100, 8, seed=3)
    assert rows == random_rows(100, 8, seed=3)
    assert rows != random_rows(100, 8, seed=4)
    assert len(set(rows)) == 8


@pytest.mark.parametrize("count", [0, 1, 3, 7, 12])
def test_balanced_rows(count: int) -> None:
    labels = ["a"] * 90 + ["b"] * 6 + ["c"] * 4
    rows = balanced_rows(labels, count, seed=1)
    assert len(set(rows)) == count
    per_label = Counter(labels[row] for row in rows)
    assert max(per_label.values(), default=0) - min(per_label.get(name, 0) for name in "abc") <= 1
    assert rows == balanced_rows(labels, count, seed=1)
    assert len(balanced_rows(labels, 100, seed=1)) == 100
    assert {labels[balanced_rows(labels, 1, seed)[0]] for seed in range(30)} == {"a", "b", "c"}


def test_too_many() -> None:
    with pytest.raises(TuningError, match="4 demonstrations cannot be drawn from 3 rows: take fewer"):
        random_rows(3, 4, seed=0)
    with pytest.raises(TuningError, match="cannot be drawn"):
        balanced_rows(["a", "b"], 3, seed=0)


def test_order() -> None:
    assert ordered([5, 6, 7], "nearest_last", 0) == [7, 6, 5]
    assert ordered([5, 6, 7], "nearest_first", 0) == ordered([5, 6, 7], "as_selected", 0) == [5, 6, 7]
    many = list(range(20))
    assert ordered(many, "random", 1) == ordered(many, "random", 1) != ordered(many, "random", 2)
    assert sorted(ordered(many, "random", 1)) == many


def test_the_prompt_of_contextual_calibration() -> None:
    template = Template("Review: {text}\nSentiment: {answer}")
    rows = [("good", "Positive"), ("bad", "Negative")]
    shown = [written(template, {"text": text, "answer": "no leak"}, answer) for text, answer in rows]
    prompt = context(shown, instruction="Classify.") + template.prompt({"text": "fine", "answer": "no leak"})
    assert prompt == (
        "Classify.\n\nReview: good\nSentiment: Positive\n\nReview: bad\nSentiment: Negative\n\nReview: fine\nSentiment:"
    )
    assert prompt.count("Review:") == 3
    assert context([]) == ""


def test_without_labels() -> None:
    template = Template("Review: {text}\nSentiment: {answer}")
    assert written(template, {"text": "good", "answer": "Positive"}, None) == "Review: good\nSentiment:"


def test_whole_demonstrations_are_dropped_from_the_front() -> None:
    assert [within([3, 4, 5], budget) for budget in (0, 4, 5, 8, 9, 11, 12, 99)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_row_that_is_asked_about() -> None:
    check_apart([{"a": "x", "label": 1}], {"a": "y", "label": 1}, ["a"])
    with pytest.raises(TuningError, match=r"is the row that is asked about \(a='x'\): take the test rows out"):
        check_apart([{"a": "z"}, {"a": "x", "label": 1}], {"a": "x", "label": 0}, ["a"])
