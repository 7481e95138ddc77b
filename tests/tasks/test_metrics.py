"""Scores against their formulas, in one process and summed over two."""

import pytest
import torch
from torchmetrics import Metric

from lightning_peft import TuningError
from lightning_peft.prompting.languages import language_of
from lightning_peft.tasks.metrics import Answers, CrossEntropy, ExactMatch, Rouge, SpanF1, TaskScores

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def logits(*rows: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(rows), len(TAGS)).float()


def joined(one: Metric, two: Metric) -> Metric:
    """Return a metric with the states of two processes reduced as torchmetrics does."""
    for name, reduce in one._reductions.items():
        values = [getattr(metric, name) for metric in (one, two)]
        setattr(
            one, name, reduce(torch.stack(values) if isinstance(values[0], torch.Tensor) else values[0] + values[1])
        )
    one._update_count = 2
    one._computed = None
    return one


@pytest.mark.parametrize(
    ("truth", "guess", "right", "found", "true"),
    [
        ([1, 2, 0, 3], [1, 2, 0, 3], 2, 2, 2),
        ([1, 2, 0, 3], [1, 0, 0, 3], 1, 2, 2),  # a span cut short is wrong
        ([1, 1, 0, 0], [1, 2, 0, 0], 0, 1, 2),  # two names are not one
        ([1, 2, 0, 0], [3, 4, 0, 0], 0, 1, 1),  # the type counts
        ([0, 2, 2, 0], [0, 1, 2, 0], 1, 1, 1),  # I- may begin a span
        ([0, 0, 0, 0], [0, 0, 0, 0], 0, 0, 0),
        ([1, -100, 2, 0], [1, 3, 2, 0], 1, 1, 1),  # later tokens of a word do not count
    ],
)
def test_spans(truth: list[int], guess: list[int], right: int, found: int, true: int) -> None:
    metric = SpanF1(TAGS)
    metric.update(logits(guess), torch.tensor([truth]))
    assert metric.counts.tolist() == [right, found, true]
    scores = metric.compute()
    assert scores["f1"] == (2 * right / (found + true) if found + true else 0)
    assert scores["precision"] == (right / found if found else 0)
    assert scores["recall"] == (right / true if true else 0)


def test_spans_of_rows_do_not_join() -> None:
    metric = SpanF1(TAGS)
    metric.update(logits([0, 1], [2, 0]), torch.tensor([[0, 1], [2, 0]]))
    assert metric.counts.tolist() == [2, 2, 2]


def test_the_surest_window_answers() -> None:
    one, two = Answers(), Answers()
    one.update([0, 1, 2], [1.0, 5.0, 2.0], ["cat", "a red dog", "hen"], [["dog"], ["red dog"], []])
    two.update([0, 2], [3.0, 4.0], ["The dog!", ""], [["dog"], []])
    scores = joined(one, two).compute()
    assert scores["exact_match"] == 1  # articles and points do not count
    alone = Answers()
    alone.update([0, 0], [2.0, 1.0], ["red dog", "dog"], [["dog"]] * 2)
    assert {name: value.item() for name, value in alone.compute().items()} == pytest.approx(
        {"exact_match": 0, "f1": 2 / 3}
    )
    with pytest.raises(TuningError, match="no answers to score"), pytest.warns(UserWarning, match="before the"):
        Answers().compute()


def test_texts_of_two_processes() -> None:
    texts = [("the cat sat", ["the cat sat"]), ("a dog", ["a hen", "the dog"]), ("x", ["y"])]
    for kind in (Rouge, ExactMatch):
        whole, one, two = kind(), kind(), kind()
        whole.update(*zip(*texts, strict=True))
        one.update(*zip(*texts[:2], strict=True))
        two.update(*zip(*texts[2:], strict=True))
        expected, found = whole.compute(), joined(one, two).compute()
        if kind is ExactMatch:
            assert found == expected == pytest.approx(1 / 3)
        else:
            assert found == expected
            assert found["rouge1"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_tasks_without_rows_have_no_score() -> None:
    metric = TaskScores(["a", "b", "c"])
    values = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    metric.update(values, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 2]))
    scores = metric.compute()
    assert scores.keys() == {"loss", "accuracy", "loss_a", "accuracy_a", "loss_c", "accuracy_c"}
    assert scores["accuracy_a"] == 0.5
    assert scores["accuracy"] == 0.75
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(values, torch.zeros(3).long()).item())


def test_ignored_labels_have_no_loss() -> None:
    metric = CrossEntropy()
    values, labels = torch.randn(2, 5, 3), torch.tensor([[0, -100, 1, 2, -100], [-100] * 5])
    metric.update(values, labels)
    expected = torch.nn.functional.cross_entropy(values.flatten(0, 1), labels.flatten())
    assert metric.compute() == pytest.approx(expected.item())


def test_rouge_of_chinese_counts_characters() -> None:
    english, chinese = Rouge(), Rouge(english=False)
    for metric in (english, chinese):
        metric.update(["他喜欢鱼"], [["他喜欢汤"]])
    assert english.compute()["rouge1"] == 0, "its words are Latin letters alone"
    assert chinese.compute()["rouge1"] == pytest.approx(3 / 4)
    assert chinese.compute()["rouge2"] == pytest.approx(2 / 3)
    plain, any_script = Rouge(), Rouge(english=False)
    for metric in (plain, any_script):
        metric.update(["The red fox, of 2024."], [["the red hen of 2024"]])
    assert plain.compute() == any_script.compute()


def test_answers_in_chinese_are_compared_by_characters() -> None:
    answers = Answers(language_of("zh"))
    answers.update([0, 1, 2], [1.0, 1.0, 1.0], ["北京市", "北京。", ""], [["北京", "上海"], ["北京"], []])
    assert answers.compute() == pytest.approx({"exact_match": 2 / 3, "f1": (0.8 + 1 + 1) / 3})
    german = Answers(language_of("de"))
    german.update([0, 1], [1.0, 1.0], ["das Haus", "Haus"], [["ein Haus"], ["der Baum"]])
    assert german.compute() == pytest.approx({"exact_match": 0.5, "f1": 0.5}), "articles do not count"
