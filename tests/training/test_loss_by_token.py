"""A step is the same, however its rows are cut into batches and ranks."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_peft import LoRA, LossByToken, TuningError
from tests.by_token import Summing, rows, stepped, trained
from tests.contract import assert_near
from tests.modules import Tuned, loader, trainer
from tests.processes import TORCHRUN, run_module

LORA = {"r": 4}


def batches(size: int) -> Any:
    return torch.utils.data.DataLoader(rows(), size)


@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_a_step_is_the_same_however_it_is_cut(size: int, accumulate: int, tmp_path: Path) -> None:
    """12 rows are a step of 8 and one of 4, the last and incomplete one; gradients are clipped in both."""
    one = stepped(tmp_path, 8, 1, LoRA(**LORA), gradient_clip_val=0.7)
    cut = stepped(tmp_path, size, accumulate, LoRA(**LORA), gradient_clip_val=0.7)
    assert cut.norms == pytest.approx(one.norms, rel=1e-5)
    assert len(one.norms) == 2
    assert min(one.norms) > 0.7
    assert_near(trained(cut), trained(one), 1e-6)


def test_penalties_count_once(tmp_path: Path) -> None:
    """Those of a callback, whose hooks Lightning calls before the module's."""

    class Pulled(LoRA):
        def penalty(self, module: torch.nn.Module) -> Tensor:
            return 0.1 * sum(p.square().sum() for p in module.parameters() if p.requires_grad)

    one, two = (trained(stepped(tmp_path, *cut, Pulled(**LORA), max_steps=1)) for cut in ((8, 1), (2, 4)))
    assert_near(two, one, 1e-6)
    free = trained(stepped(tmp_path, 8, 1, LoRA(**LORA), max_steps=1))
    assert max(float((free[name.replace("pulled", "lora")] - one[name]).abs().max()) for name in one) > 1e-3


def test_shown_is_the_mean_and_a_batch_without_tokens_counts_for_nothing(tmp_path: Path) -> None:
    shown: list[float] = []

    class Noting(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            shown.append(float(outputs["loss"]))

    data = rows()[:4]
    data[3]["labels"][:] = -100
    run = trainer(tmp_path, LoRA(**LORA), LossByToken(), Noting(), accumulate_grad_batches=2, max_steps=1)
    module = Summing()
    with torch.no_grad():
        total, count = Summing().training_step(torch.utils.data.default_collate(data[:2]), 0)
    run.fit(module, torch.utils.data.DataLoader(data, 2))
    assert shown[0] == pytest.approx(float(total / count) / 2, rel=1e-5)  # Lightning shows the share in the step
    run = trainer(tmp_path, LoRA(**LORA), LossByToken(), Noting(), accumulate_grad_batches=2, max_steps=1)
    L.seed_everything(0, verbose=False)
    empty = Summing()
    run.fit(empty, torch.utils.data.DataLoader([data[2], data[3]], 1))
    L.seed_everything(0, verbose=False)
    alone = Summing()
    run = trainer(tmp_path, LoRA(**LORA), LossByToken(), max_steps=1)
    run.fit(alone, torch.utils.data.DataLoader([data[2]], 1))
    assert shown[-1] == 0
    assert_near(trained(empty), trained(alone), 1e-6)


def test_hooks_are_given_back(tmp_path: Path) -> None:
    module = stepped(tmp_path, 2, 4, LoRA(**LORA))
    assert not {"training_step", "on_before_backward"} & vars(module).keys()


def test_a_module_that_does_not_count(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRA(**LORA), LossByToken())
    with pytest.raises(TuningError, match=re.escape("let it return (loss_sum, num_tokens)")):
        run.fit(Tuned("gpt2"), loader("gpt2"), loader("gpt2"))

    class Manual(Summing):
        automatic_optimization = False

    with pytest.raises(TuningError, match="Manual sets automatic_optimization=False"):
        trainer(tmp_path, LoRA(**LORA), LossByToken()).fit(Manual(), batches(2))

    class Three(Summing):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return (*super().training_step(batch, batch_idx), 1)

    with pytest.raises(TuningError, match=re.escape("returns 3 values: let it return (loss_sum, num_tokens)")):
        trainer(tmp_path, LoRA(**LORA), LossByToken()).fit(Three(), batches(2))


@pytest.mark.slow
def test_two_ranks_step_as_one(tmp_path: Path) -> None:
    run_module("tests.by_token", tmp_path, folder=tmp_path, before=TORCHRUN)
    found = {file.stem: torch.load(file) for file in tmp_path.glob("*.pt")}
    assert len(found) == 4
    for name, delta in found.items():
        clip = 0.5 if name.startswith("ddp") else None
        assert_near(delta, trained(stepped(tmp_path, 8, 1, LoRA(**LORA), gradient_clip_val=clip)), 1e-6)
