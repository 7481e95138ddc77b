"""The page of the docs that says which method works on which family is what its command makes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.method import TuningMethod
from tests.families import architectures, matrix
from tests.families.builders import SAMPLE, pipeline
from tests.families.every import WHOLE, build_any
from tests.families.matrix import COLUMNS, MARKS, MORE, PAGE, Outcome, outcome, page, table
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
    found = outcome(pipeline(), method)
    assert found == expected
    text = page({"one": dict.fromkeys(COLUMNS, found)})
    assert f"on one: {expected.why}" in text or expected.end == "works"
    assert f"| one | {' | '.join([MARKS[expected.end]] * len(COLUMNS))} |" in text


class _Unmerged(LoRA):
    """Is taken off when it is merged."""

    def apply(self, model: nn.Module) -> None:
        super().apply(model)
        for place in grafts(model, self.key):
            vars(place.graft)["fold"] = lambda name, value, host: value


def test_what_is_not_in_the_weights_after_a_merge_does_not_work() -> None:
    assert outcome(pipeline(), LoRA(r=2), merges=True) == Outcome("works")
    assert outcome(pipeline(), _Unmerged(r=2), merges=True) == Outcome("fails", "merged it computes something else")


def test_rows_that_are_kept_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def row(family: str) -> dict[str, Outcome]:
        made.append(family)
        return {"lora": Outcome("refused", f"{len(made)}")}

    monkeypatch.setattr(matrix, "row", row)
    monkeypatch.setattr(matrix, "WHOLE", {"one": None, "two": None})
    kept = tmp_path / "rows.jsonl"
    assert table(kept) == {"one": {"lora": ("refused", "1")}, "two": {"lora": ("refused", "2")}}
    assert table(kept, anew=["two"])["two"] == {"lora": ("refused", "3")} == table(kept)["two"]
    assert made == ["one", "two", "two"]


@pytest.mark.parametrize("family", ["Bert", "DETR", "ViTMAE", "SegformerSeg", "torch_lstm"])
def test_a_family_of_the_file_has_a_small_model_and_a_batch_for_it(family: str) -> None:
    model, batch = build_any(family)
    assert sum(p.numel() for p in model.parameters()) < 3e5
    with torch.no_grad():
        error, first = matrix._run(model, batch)
    assert bool(error.isfinite())
    assert len(first) in (2, 3)


ASKED = {
    "lora": 225, "all_linear": 228, "dora": 225, "ia3": 195, "bitfit": 180, "houlsby": 205, "pfeiffer": 210,
    "diff_pruning": 225, "partial_k": 210, "linear_probe": 98, "mlp_head": 98, "side": 175, "ladder": 150,
    "tiny_tl": 28, "prompt_tuning": 170, "p_tuning_v2": 155, "vpt": 28,
}  # fmt: skip
"""On how many families a method works at least."""


def test_each_method_works_on_most_families_that_can_have_it() -> None:
    works = {name: sum(marks[name] == "+" for marks in rows().values()) for name in ASKED}
    assert {name: count for name, count in works.items() if count < ASKED[name]} == {}


@pytest.mark.slow
def test_the_page_is_that_of_today() -> None:
    assert page(table()) == PAGE.read_text(encoding="utf-8"), "make it anew: python -m tests.families.matrix"
