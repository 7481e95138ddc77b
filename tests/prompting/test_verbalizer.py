"""Words of labels, and the scores of labels from those of words."""

import math

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting import Verbalizer


def test_scores_of_labels() -> None:
    words = {"a": ["x", "y"], "b": "z"}
    assert Verbalizer(words).scores([1.0, 3.0, 5.0]) == [2.0, 5.0]
    assert Verbalizer(words, "max").scores([1.0, 3.0, 5.0]) == [3.0, 5.0]
    assert Verbalizer(words, "sum").scores([math.log(0.2), math.log(0.3), math.log(0.1)]) == pytest.approx(
        [math.log(0.5), math.log(0.1)]
    )


def test_the_mean_of_log_likelihoods_orders_as_the_mean_of_logits() -> None:
    logits = [0.3, -1.2, 2.5]
    total = math.log(sum(math.exp(x) for x in [*logits, 1.1]))
    verbalizer = Verbalizer({"a": ["x", "y"], "b": "z"})
    plain, normal = verbalizer.scores(logits), verbalizer.scores([x - total for x in logits])
    assert plain[1] - plain[0] == pytest.approx(normal[1] - normal[0])


def test_order_of_the_data() -> None:
    verbalizer = Verbalizer({"a": "x", "b": ["y", "z"]}, "max").ordered(["b", "a"])
    assert (verbalizer.labels, verbalizer.words, verbalizer.owners, verbalizer.combine) == (
        ["b", "a"],
        ["y", "z", "x"],
        [0, 0, 1],
        "max",
    )


def test_labels_without_words_and_words_without_labels() -> None:
    with pytest.raises(TuningError, match="no word for 'c': give words to each of"):
        Verbalizer({"a": "x", "b": "y"}).ordered(["a", "b", "c"])
    with pytest.raises(TuningError, match="words for 'b', which is none of the labels"):
        Verbalizer({"a": "x", "b": "y", "c": "z"}).ordered(["a", "c"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"a": "x", "b": "x"}, "labels 'a' and 'b' share the word 'x': give each its own"),
        ({"a": ["x", "y"], "b": [" y"]}, "labels 'a' and 'b' share the word ' y'"),
        ({"a": ["x", "x"], "b": "y"}, "label 'a' has a word twice"),
        ({"a": [], "b": "y"}, "label 'a' has an empty word or none"),
        ({"a": " ", "b": "y"}, "label 'a' has an empty word or none"),
        ({"a": "x"}, "a verbalizer of 1 labels leaves no choice"),
    ],
)
def test_mistakes(words: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        Verbalizer(words)
    with pytest.raises(TuningError, match="combine='min' is no way to combine words: take mean, max, sum"):
        Verbalizer({"a": "x", "b": "y"}, "min")
