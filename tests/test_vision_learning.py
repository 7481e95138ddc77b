"""Prompts for images learn: what ``examples/vision.py`` shows, with one seed of its.

The backbone is that of ``examples/pretrain_vit.py`` as it stands, in minutes. The learning rates are those that were
chosen on validation images.
"""

import csv
from pathlib import Path

import pytest
import torch

from examples import pretrain_vit, vision

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng():
        assert pretrain_vit.make(folder) >= 0.75
    return str(folder)


def rows(folder: Path, metric: str, **where: str) -> list[float]:
    with (folder / "results.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["metric"] == metric]
    return [float(row["value"]) for row in found if all(row[column] == value for column, value in where.items())]


def test_vpt_deep_beats_the_linear_probe(vit: str, tmp_path: Path) -> None:
    for name in ("LinearProbe", "VPT-Deep"):
        vision.at_once(vit, tmp_path, 0, 8, name, 3e-2, test=True)
    (probe,), (prompts,) = (rows(tmp_path, "accuracy", method=name) for name in ("LinearProbe", "VPT-Deep"))
    assert prompts >= probe + 0.05


def test_l2p_forgets_less_than_fine_tuning(vit: str, tmp_path: Path) -> None:
    for name, lr in (("L2P", 3e-3), ("FullFineTuning", 1e-4)):
        vision.in_tasks(vit, tmp_path, 0, 4, name, lr, test=True)
    last = str(vision.TASKS - 1)
    (pool,), (tuned,) = (rows(tmp_path, "forgetting", method=m, after=last) for m in ("L2P", "FullFineTuning"))
    assert pool <= tuned - 0.2
    (accuracy,) = rows(tmp_path, "average_accuracy", method="L2P", after=last)
    assert accuracy >= 0.3  # of 32 classes
