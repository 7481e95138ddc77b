"""The table before training says what was chosen."""

import io

from rich.console import Console

from lightning_peft import IA3, BitFit
from lightning_peft.reports.parameters import parameter_table
from tests.models import tiny


def table_of(model: object) -> str:
    console = Console(width=1000, file=io.StringIO())
    console.print(parameter_table(model))
    return console.file.getvalue()


def test_the_table_says_where_the_method_is_and_what_the_head_is() -> None:
    model = tiny("bert")
    IA3().apply(model)
    text = table_of(model)
    parts = ("attention.self.key", "attention.self.value", "output.dense")
    assert all(f"bert.encoder.layer.N.{part} (2)" in text for part in parts)
    assert "classifier" in text.split("head")[1].splitlines()[0]


def test_what_is_trained_in_place_has_no_place_in_it() -> None:
    model = tiny("gpt2")
    BitFit().apply(model)
    rows = {word for line in table_of(model).splitlines() for word in line.split()[1:2]}
    assert "frozen" in rows
    assert not {"at", "head"} & rows
