"""Finds the layers of a task head, puts a BatchNorm before them, and gives them initial values.

Initial values: 'vpt' is Kaiming-normal over the outputs with all biases at -log(99) = -4.595, so that each class
starts at a probability of 1 % (Jia et al. 2022, arXiv 2203.12119); 'mae' a normal distribution of std 0.01, cut at two
std, and zero biases (He et al. 2022, arXiv 2111.06377); 'model' leaves them as the model has them.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.placement import device_of

HeadInit = Literal["model", "vpt", "mae", "zero"]
PRIOR = 0.01


class RowNorm(nn.BatchNorm1d):
    """BatchNorm over the last dimension, [..., d], in fp32; all dimensions before it count as rows."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed rows, in the dtype of ``x``.

        Raises:
            TuningError: there is one row only in training, which has no variance.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # sums over rows round otherwise where rows lie apart
        if self.training and len(rows) == 1:
            raise TuningError(
                "a BatchNorm in the head cannot train on a batch of one row: give the data loader drop_last=True, or a "
                "batch size that leaves more."
            )
        return super().forward(rows.float()).view(x.shape).to(x.dtype)


class HeadNorm(Graft):
    """Puts a BatchNorm without trained parameters before a layer of the head; its statistics belong to the delta."""

    def __init__(self, host: nn.Linear, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RowNorm(host.in_features, eps=eps, affine=False, device=device_of(host), dtype=torch.float32)

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the normed input of the layer."""
        return self.norm(x)


def head_linears(backbone: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the task head by name, in the order of the model."""
    return {name: module for name, module in head_modules(backbone).items() if isinstance(module, nn.Linear)}


def head_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the task head that have parameters of their own, by name, those of methods left out."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in anatomy.head_names(backbone))
    modules = anatomy.without_grafts(backbone)
    return {name: modules[name] for name in owners if name in modules}


def last_linear(backbone: nn.Module, method: str) -> tuple[str, nn.Linear]:
    """Return the layer of the head that gives the logits, with its name.

    Raises:
        TuningError: the backbone has no head with a linear layer.
    """
    found = head_linears(backbone)
    if not found:
        raise TuningError(
            f"{type(backbone).__name__} has no task head with a linear layer, which {method} builds on: take a "
            "classifier, e.g. by AutoModelForSequenceClassification or AutoModelForImageClassification."
        )
    # Of layers that have a weight in common, as in Grounding DINO, the last one is that of the task.
    weight, modules = next(reversed(found.values())).weight, anatomy.without_grafts(backbone)
    same = {name: layer for name, layer in modules.items() if isinstance(layer, nn.Linear) and layer.weight is weight}
    return next(reversed(same.items()))


@torch.no_grad()
def initialise(layer: nn.Linear, how: str) -> None:
    """Give a layer that computes logits its initial values."""
    if how == "vpt":
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        fill = -math.log((1 - PRIOR) / PRIOR)
    elif how == "mae":
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        fill = 0.0
    else:
        nn.init.zeros_(layer.weight)
        fill = 0.0
    if layer.bias is not None:
        nn.init.constant_(layer.bias, fill)
