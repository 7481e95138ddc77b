"""Wordings of a task: read, listed, mixed and scored as FLAN does."""

from collections import Counter
from statistics import fmean

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting import Instructions, mixed, mixing_rates, over_templates

TEN = {f"t{i}": f"{{text}} {i} {{answer}}" for i in range(9)} | {"write": "Write a {label} text:"}


def test_ten_templates_one_of_them_inverse() -> None:
    mood = Instructions.of({"task": "mood", "templates": TEN, "inverse": ["write"], "words": {"pos": "good"}})
    assert mood.names() == list(TEN)
    assert len(mood.scored) == 9
    assert mood.named("write").inverse
    assert "write" not in [template.name for template in mood.scored]
    assert mood.words == {"pos": "good"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": {"a": "{text}"}}, "mood has 1 templates where 10 are asked for: write 10"),
        ({"templates": {}}, "instructions have no templates"),
        ({"templates": ["{text}"]}, "instructions have no templates"),
        ({"task": ""}, "instructions have no task: give it a name"),
        ({"inverse": ["t99"]}, "inverse names 't99', which is no template of mood: take t0"),
        ({"invers": []}, "'invers' is no entry of instructions, did you mean 'inverse'"),
        ({"templates": TEN | {"t0": "{text.x}"}}, "is no slot"),
    ],
)
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        Instructions.of({"task": "mood", "templates": TEN} | change)


def test_no_such_template() -> None:
    mood = Instructions.of({"task": "mood", "templates": TEN})
    with pytest.raises(TuningError, match="'writes' is no template of mood: take 'write'"):
        mood.named("writes")


def test_mixing_in_proportion_with_a_cap() -> None:
    assert mixing_rates({"a": 30_000, "b": 3000, "c": 1500}, cap=3000) == {"a": 0.4, "b": 0.4, "c": 0.2}
    assert mixing_rates({"a": 1, "b": 3}, cap=100) == {"a": 0.25, "b": 0.75}
    with pytest.raises(TuningError, match="leave nothing to mix"):
        mixing_rates({"a": 0, "b": 1})


def test_a_mixture_has_these_shares() -> None:
    drawn = list(mixed({"a": 40, "b": 10}, 4000, cap=20, seed=1))
    assert drawn == list(mixed({"a": 40, "b": 10}, 4000, cap=20, seed=1))
    shares = Counter(task for task, _ in drawn)
    assert shares["a"] / 4000 == pytest.approx(2 / 3, abs=0.03)
    rows = [row for task, row in drawn if task == "b"]
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, len(rows) - 10, 10))


def test_over_templates() -> None:
    scores = [0.5, 0.75, 1.0]
    found = over_templates(scores)
    assert found.mean == fmean(scores)
    assert (found.min, found.max, found.n_templates) == (0.5, 1.0, 3)
    assert found.std == pytest.approx(0.2041241)
    assert over_templates([0.5]).std == 0
