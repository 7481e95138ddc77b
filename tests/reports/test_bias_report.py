"""Which biases moved most, as rows, table and plot."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_peft import BiasReport, BitFit, LoRA, TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.reports.bias_report import bias_changes, bias_table, plot_biases
from tests.models import tiny
from tests.modules import Tuned, loader, trainer


def moved() -> torch.nn.Module:
    """BERT, with the query's bias of block 1 moved by 0.5 and its intermediate one by 0.25 in half of its values."""
    model = tiny("bert")
    BitFit().apply(model)
    with torch.no_grad():
        layer = model.bert.encoder.layer[1]
        layer.attention.self.query.bias += 0.5
        layer.intermediate.dense.bias[::2] -= 0.5
    return model


def test_a_change_is_the_mean_of_the_absolute_differences() -> None:
    changes = {(c.kind, c.block): c.change for c in bias_changes(moved())}
    assert changes[("attention.self.query", 1)] == pytest.approx(0.5, abs=1e-6)
    assert changes[("intermediate.dense", 1)] == pytest.approx(0.25, abs=1e-6)
    assert changes[("attention.self.query", 0)] == 0
    assert changes[("bert.pooler.dense", None)] == 0
    assert not [
        change for change in changes.values() if change not in (0, 0.25, 0.5) and change > 1e-6 and change < 0.2
    ]


def test_the_table_has_what_moved_most_first() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(bias_table(bias_changes(moved()), rows=2))
    text = capture.get()
    assert text.index("attention.self.query") < text.index("intermediate.dense")
    assert "2.50e-01" in text
    assert "pooler" not in text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_shifts_and_added_biases_start_at_zero(kind: str) -> None:
    model = tiny(kind)
    BitFit(biases="query" if kind == "gpt2" else "all", add_missing_bias=kind == "llama").apply(model)
    assert {c.change for c in bias_changes(model)} == {0.0}
    place = next(iter(grafts(model)))
    with torch.no_grad():
        next(place.graft.parameters()).fill_(-2)
    assert max(c.change for c in bias_changes(model)) == 2


def test_the_plot_is_a_file(tmp_path: Path) -> None:
    path = plot_biases(bias_changes(moved()), tmp_path / "plots" / "biases.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Tuned("bert")
    report = BiasReport(plot=str(tmp_path / "biases.svg"))
    trainer(tmp_path, BitFit(), report).fit(module, loader("bert"), loader("bert"))
    assert "Biases that moved most" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "biases.svg").read_text()
    assert all(change.change > 0 for change in bias_changes(module))


def test_without_trained_biases_it_says_so_before_training(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="trains no bias"):
        trainer(tmp_path, LoRA(exclude="classifier.*"), BiasReport()).fit(Tuned("bert"), loader("bert"), loader("bert"))
