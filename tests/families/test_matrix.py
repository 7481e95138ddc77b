"""The page of the docs that says which method works on which family is what its command makes."""

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, TuningError
from lightning_peft.core.method import TuningMethod
from tests.families import architectures
from tests.families.builders import SAMPLE, pipeline
from tests.families.matrix import COLUMNS, MARKS, MORE, PAGE, Outcome, outcome, page, table
from tests.families.more import WHOLE
from tests.families.test_families import REFUSED


def rows() -> dict[str, dict[str, str]]:
    """Return the marks of the page, by family and method."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {family: dict(zip(cells[0][1:], marks, strict=True)) for family, *marks in cells[1:-1]}


def test_the_page_has_all_families_and_methods() -> None:
    assert list(rows()) == list(WHOLE)
    assert all(list(row) == list(COLUMNS) for row in rows().values())


def test_the_page_says_of_the_sample_what_the_tests_say() -> None:
    for family in SAMPLE:
        for name in COLUMNS.keys() - MORE.keys():
            expected = "-" if (family, name) in REFUSED else "+"
            assert rows()[family][name] == expected, (family, name)


def test_the_page_of_timm_says_what_its_rows_say() -> None:
    text = architectures.PAGE.read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    found = [architectures.Row(*row) for row in cells[1:]]
    assert architectures.page(found) == text
    assert len(found) > 90
    for column in ("lora", "all_linear"):
        assert sum(getattr(row, column).isdigit() for row in found) >= 0.95 * len(found)
    assert sum(row.head == "+" for row in found) >= 0.95 * sum(row.head != "none" for row in found)


class _Broken(LoRA):
    """Trains a parameter that nothing reads, or leaves something behind."""

    def apply(self, model: nn.Module) -> None:
        super().apply(model)
        model.register_parameter("stray", nn.Parameter(torch.zeros(1)))


class _Refusing(LoRA):
    def apply(self, model: nn.Module) -> None:
        raise TuningError(f"{type(model).__name__} is refused: take another.")


class _Raising(LoRA):
    def apply(self, model: nn.Module) -> None:
        raise KeyError("head")


@pytest.mark.parametrize(("method", "expected"), [
    (LoRA(r=2), Outcome("works")),
    (_Broken(r=2), Outcome("fails", "1 of 19 got no gradient, e.g. stray")),
    (_Refusing(), Outcome("refused", "the model is refused: take another.")),
    (_Raising(), Outcome("fails", "KeyError: 'head'")),
])  # fmt: skip
def test_an_outcome(method: TuningMethod, expected: Outcome) -> None:
    found = outcome(pipeline, method)
    assert found == expected
    text = page({"one": dict.fromkeys(COLUMNS, found)})
    assert f"on one: {expected.why}" in text or expected.end == "works"
    assert f"| one | {' | '.join([MARKS[expected.end]] * len(COLUMNS))} |" in text


@pytest.mark.slow
def test_the_page_is_that_of_today() -> None:
    assert page(table()) == PAGE.read_text(encoding="utf-8"), "make it anew: python -m tests.families.matrix"
