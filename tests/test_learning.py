"""Learning is real: each method closes a stated part of the gap between a frozen model and full fine-tuning.

The model is a small one that reads the valley's texts for a minute; the tasks, methods and learning rates are those of
``examples/compare_text.py``. Each bound is at most three quarters of the share that was measured with this seed.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from examples.compare_text import PROBLEMS, run
from examples.pretrain_tiny import train

pytestmark = pytest.mark.slow

FULL = 1e-3
"""The learning rate of full fine-tuning."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has read 300 batches."""
    folder = tmp_path_factory.mktemp("read")
    with torch.random.fork_rng():
        train("bert", folder / "bert", 300)
    return folder


@cache
def ends(name: str, models: Path) -> tuple[float, float]:
    """Return the scores of the frozen model and of full fine-tuning."""
    problem = PROBLEMS[name]
    frozen = None if problem.frozen is None else problem.methods[problem.frozen]
    low = run(problem, frozen, 1e-2, 1, models, problem.steps)["test"]
    return low, run(problem, problem.methods["FullFineTuning"], FULL, 1, models, problem.steps)["test"]


@pytest.mark.parametrize(
    ("name", "method", "lr", "least"),
    [
        ("topics", "WARP(8)", 3e-2, 0.75),
        ("topics", "PromptTuning(8)", 3e-2, 0.7),
        ("topics", "PTuningV2(8)", 1e-1, 0.7),
        ("tags", "PromptTuning(8)", 3e-2, 0.1),
        ("tags", "PTuningV2(8)", 1e-1, 0.15),
        ("tags", "PrefixTuning(8)", 3e-3, 0.35),
        ("tags", "LoRA(r=4)", 1e-2, 0.55),
        ("tags", "BitFit", 1e-2, 0.08),
    ],
)
def test_closes_the_gap(name: str, method: str, lr: float, least: float, models: Path) -> None:
    low, high = ends(name, models)
    assert high - low > 0.1, "there is no gap to close"
    problem = PROBLEMS[name]
    found = run(problem, problem.methods[method], lr, 1, models, problem.steps)["test"]
    assert (found - low) / (high - low) >= least
