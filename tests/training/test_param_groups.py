"""Options of single parameters: a group of their own, with any scheduler of torch."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from lightning_peft import TuningError
from lightning_peft.training.param_groups import schedulers_in, split_groups

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=1e-9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(3)]


def rates(optimizer: Optimizer, scheduler: LRScheduler, parameter: nn.Parameter) -> list[float]:
    """Return the learning rate of one parameter over six steps."""
    found = []
    for _ in range(6):
        (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        found.append(group["lr"])
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_the_new_group(name: str) -> None:
    alone = parameters()
    optimizer = SGD(alone, lr=0.1)
    expected = rates(optimizer, SCHEDULERS[name](optimizer), alone[0])
    assert len(set(expected)) > 1, "a schedule that changes nothing shows nothing"
    for at in (0, 1):
        a, b, c = parameters()
        optimizer = SGD([a, b, c], lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        split_groups([optimizer], [scheduler], lambda p, b=b: {"lr_ratio": 2.0} if p is b else {})
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]
        factor = (1.0, 2.0)[at]
        assert rates(optimizer, scheduler, (a, b)[at]) == pytest.approx([factor * rate for rate in expected])


def test_without_a_scheduler_each_option_finds_its_parameters() -> None:
    a, b, c = parameters()
    optimizer = AdamW([{"params": [a, b]}, {"params": [c], "weight_decay": 0.5}], lr=0.1)
    options: dict[nn.Parameter, dict[str, Any]] = {b: {"lr": 0.3, "weight_decay": 0.0}, c: {"lr_ratio": 3.0}}
    split_groups([optimizer], [], lambda p: options.get(p, {}))
    found = [(g["params"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert [(len(p), p[0] is q) for (p, _, _), q in zip(found, (a, c, b), strict=True)] == [(1, True)] * 3
    assert [lr for _, lr, _ in found] == pytest.approx([0.1, 0.3, 0.3])
    assert [decay for _, _, decay in found] == [0.01, 0.5, 0.0]


def test_a_whole_group_of_options_leaves_no_empty_group() -> None:
    a, b, _ = parameters()
    optimizer = SGD([a, b], lr=0.1)
    split_groups([optimizer], [], lambda p: {"lr": 0.2 if p is a else 0.4})
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.4])
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]


def test_an_option_that_the_optimizer_lacks_is_refused() -> None:
    (a, *_) = parameters()
    with pytest.raises(TuningError, match="SGD has no option 'betas'"):
        split_groups([SGD([a], lr=0.1)], [], lambda p: {"betas": (0.9, 0.9)})
    with pytest.raises(TuningError, match="where that of the group is 0"):
        split_groups([SGD([a], lr=0.0)], [], lambda p: {"lr": 0.1})


def test_schedulers_are_found_in_every_form() -> None:
    optimizer = SGD(parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    forms: list[Any] = [
        {"optimizer": optimizer, "lr_scheduler": scheduler},
        {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}},
        ([optimizer], [scheduler]),
        ([optimizer], [{"scheduler": scheduler}]),
        [{"optimizer": optimizer, "lr_scheduler": scheduler}],
    ]
    for form in forms:
        assert list(schedulers_in(form)) == [scheduler]
    for form in (None, optimizer, [optimizer], {"optimizer": optimizer}):
        assert list(schedulers_in(form)) == []


def test_what_a_group_has_already_splits_nothing() -> None:
    """Nor does a weight decay of 0, where the optimizer has none."""
    a, b, *_ = parameters()
    for optimizer in (SGD([a, b], lr=0.1), torch.optim.Rprop([a, b])):
        split_groups([optimizer], [], lambda p: {"weight_decay": 0.0} if p is a else {})
        assert len(optimizer.param_groups) == 1
