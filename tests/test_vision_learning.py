"""Prompts for images learn: what ``examples/vision.py`` (one seed of its) and ``examples/compare_clip.py`` (all) show.

The backbones are those of ``examples/pretrain_vit.py`` and ``examples/pretrain_clip.py`` as they stand, in minutes. The
learning rates are those that were chosen on validation images.
"""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from examples import compare_clip, pretrain_clip, pretrain_vit, vision
from lightning_peft.reports.rows import read_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng():
        assert pretrain_vit.make(folder) >= 0.75
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        zero_shot = pretrain_clip.make(folder)
    assert zero_shot["filled"] >= 0.9
    assert zero_shot["outline"] <= zero_shot["dark"] - 0.1  # "a photo of a" is no wording for drawings
    return str(folder)


def rows(folder: Path, metric: str, **where: str | int) -> list[float]:
    """Return the values of a metric in the rows that have these values in their columns."""
    wanted = {"metric": metric, **where}
    return [row["value"] for row in read_rows(folder / "results.csv") if wanted.items() <= row.items()]


def test_vpt_deep_beats_the_linear_probe(vit: str, tmp_path: Path) -> None:
    for name in ("LinearProbe", "VPT-Deep"):
        vision.at_once(vit, tmp_path, 0, 8, name, 3e-2, test=True)
    (probe,), (prompts,) = (rows(tmp_path, "accuracy", method=name) for name in ("LinearProbe", "VPT-Deep"))
    assert prompts >= probe + 0.05


def test_l2p_forgets_less_than_fine_tuning(vit: str, tmp_path: Path) -> None:
    for name, lr in (("L2P", 3e-3), ("FullFineTuning", 1e-4)):
        vision.in_tasks(vit, tmp_path, 0, 4, name, lr, test=True)
    last = vision.TASKS - 1
    (pool,), (tuned,) = (rows(tmp_path, "forgetting", method=m, after=last) for m in ("L2P", "FullFineTuning"))
    assert pool <= tuned - 0.2
    (accuracy,) = rows(tmp_path, "average_accuracy", method="L2P", after=last)
    assert accuracy >= 0.3  # of 32 classes


def of_clip(protocol: str, seed: int, rates: dict[str, float], model: str, folder: Path, metric: str) -> list[float]:
    """Return the metric of each method of the protocol."""
    args = Namespace(model=model, folder=folder, epochs=None)
    for name, lr in rates.items():
        compare_clip.run(args, protocol, name, seed, lr, compare_clip.FEW[-1], test=True)
    return [rows(folder, metric, method=name)[0] for name in rates]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coop_beats_zero_shot(clip: str, tmp_path: Path, seed: int) -> None:
    zero_shot, tuned = of_clip("few_shot", seed, {"zero-shot": 0.03, "CoOp": 0.03}, clip, tmp_path, "accuracy")
    assert tuned >= zero_shot + 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cocoop_loses_less_on_new_classes_than_coop(clip: str, tmp_path: Path, seed: int) -> None:
    rates = {"zero-shot": 0.03, "CoOp": 0.1, "CoCoOp": 0.03}
    before, plain, conditional = of_clip("base_to_new", seed, rates, clip, tmp_path, "new_accuracy")
    assert plain < before
    assert conditional >= plain + 0.1
    base = [rows(tmp_path, "base_accuracy", method=name)[0] for name in rates]
    assert base[0] < base[2] < base[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_promptsrc_is_not_below_maple_of_as_many_epochs(clip: str, tmp_path: Path, seed: int) -> None:
    rates = {"MaPLe, 20 epochs": 0.01, "PromptSRC": 0.03}
    coupled, pulled = of_clip("base_to_new", seed, rates, clip, tmp_path, "harmonic_mean")
    assert pulled >= coupled


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dapl_beats_the_source_alone(clip: str, tmp_path: Path, seed: int) -> None:
    source, both = of_clip("adaptation", seed, {"CoOp": 0.1, "DAPL": 0.03}, clip, tmp_path, "accuracy")
    assert both >= source + 0.05
