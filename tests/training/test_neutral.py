"""`FullFineTuning` changes nothing of what Lightning does alone, whatever the settings and the other callbacks."""

from pathlib import Path

import pytest

from lightning_peft import FullFineTuning
from tests.contract import assert_same
from tests.neutral import SETTINGS, run

QUICK = (
    "limits",
    "reloaded",
    "parts in eval",
    "learning rate",
    "pruned",
    "backbone later",
    "sampler",
    "asks for steps",
)
"""What is run each time: one setting of each kind that has ever made a difference."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in SETTINGS])
def test_full_fine_tuning_changes_nothing(name: str, tmp_path: Path) -> None:
    alone = run(SETTINGS[name], tmp_path / "alone", None)
    for backbone in ("", "layer"):
        assert_same(alone, run(SETTINGS[name], tmp_path / f"with {backbone}", FullFineTuning(backbone=backbone)))
