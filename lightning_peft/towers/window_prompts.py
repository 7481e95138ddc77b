"""Prompts of images, and prompts in blocks that attend within windows (Swin).

In a windowed block the prompts of an image join each of its windows, with no relative position bias and no shift mask
of their own. What a window makes of them is averaged over the windows of that image, never over other images. Where the
next block has prompts of its own, nothing is averaged: they are dropped.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.towers.vision import Tower

_PARTS = ("attention.relative_position_bias", "layernorm_before", "layernorm_after", "mlp")


class ImagePrompts(Graft):
    """Holds prompts and gives each image of a batch its own copy.

    Args:
        weight: the prompts, [P, dp]; None: none of its own.
        projection: from dp to d; None: dp is d.
        dropout: of what is given.
    """

    def __init__(self, weight: nn.Parameter | None, projection: nn.Linear | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.projection = projection
        self.dropout = dropout

    def rows(self, x: Tensor) -> Tensor:
        """Return the prompts for the images of hidden states x, [B, P, d], in their dtype; dropout differs by image."""
        assert self.weight is not None
        rows: Tensor = self.weight
        if self.projection is not None:  # it is shared between blocks, which may lie on several devices
            rows = self.projection(rows.to(self.projection.weight.device))
        rows = rows.to(x).expand(x.shape[0], -1, -1)
        return F.dropout(rows, self.dropout, self.training) if self.dropout else rows


def attach_windows(tower: Tower, weights: Mapping[int, nn.Parameter], dropout: float, name: str) -> None:
    """Attach prompts to the windowed blocks of these numbers, and to those that their outputs go through.

    Raises:
        TuningError: the blocks are built otherwise than Swin's.
    """
    first = min(weights)
    width = weights[first].shape[0]
    last_of = {id(stage.blocks[-1]): stage for stage in _stages(tower)}
    for i in range(first, len(tower.blocks)):
        block: Any = tower.blocks[i]
        _check_block(block)
        keep = i + 1 < len(tower.blocks) and i + 1 not in weights
        stage = last_of.get(id(block)) if keep else None
        attach(block, WindowBlockPrompt(weights.get(i), dropout, keep, aside=stage is not None), name)
        attach(block.attention, WindowPrompt(), name)
        attach(block.attention.relative_position_bias, NoBias(width), name)
        if stage is not None:
            attach(stage, MergedPrompt(), name)


# What goes between these grafts are arguments and outputs of the modules between them: a module that is checkpointed
# runs its forward pass again without what stands around it.


class WindowBlockPrompt(ImagePrompts):
    """Wraps a block: adds its own prompts, or takes those that an earlier block passed on before the patches.

    Args:
        weight: the prompts, [P, d]; None: those passed on.
        dropout: of the prompts.
        keep: whether the prompts' outputs go on to the next block.
        aside: whether they do so in a pair with the attention weights, as the next block is that of another stage.
    """

    def __init__(self, weight: nn.Parameter | None, dropout: float, keep: bool, aside: bool) -> None:
        super().__init__(weight, None, dropout)
        self.keep = keep
        self.aside = aside

    def around(
        self,
        forward: Callable[..., Any],
        host: Any,
        x: Tensor,
        input_dimensions: tuple[int, int],
        *args: Any,
        **kw: Any,
    ) -> Any:
        """Return the block's output for the patches, with that for the prompts if they go on."""
        count = input_dimensions[0] * input_dimensions[1]
        carried, x = x[:, :-count], x[:, -count:]
        prompts = carried if self.weight is None else self.rows(x)
        normed = host.layernorm_before(prompts)
        out, (weights, attended) = forward(x, input_dimensions, *args, window_prompts=normed, **kw)
        if not self.keep:
            return out, weights
        prompts = prompts + host.drop_path(host.dropout(attended))
        prompts = prompts + host.dropout(host.mlp(host.layernorm_after(prompts)))
        return (out, (weights, prompts)) if self.aside else (torch.cat((prompts, out), dim=1), weights)


class WindowPrompt(Graft):
    """Wraps the attention of windows and adds the prompts to each of them."""

    def around(
        self,
        forward: Callable[..., Any],
        host: nn.Module,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        window_prompts: Tensor,
        **kwargs: Any,
    ) -> Any:
        """Return the output for the windows, [B * windows, T, d], and with the weights that for the prompts, [B, P, d].

        That for the prompts is the mean over the windows of their image.
        """
        batch, width, dim = window_prompts.shape
        windows = x.shape[0] // batch
        # The windows of an image lie together: (image 0, window 0), (image 0, window 1), ...
        rows = window_prompts.repeat_interleave(windows, dim=0)
        if mask is not None:
            mask = F.pad(mask, (width, 0, width, 0))
        out, weights = forward(torch.cat((rows, x), dim=1), mask, **kwargs)
        return out[:, width:], (weights, out[:, :width].reshape(batch, windows, width, dim).mean(1))


class RoomForPrompts(Graft):
    """Makes room beside the prompts in what its host is given or gives.

    Args:
        width: P, how many prompts there are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class NoBias(RoomForPrompts):
    """Extends the output of a table of relative positions by zeros for the prompts."""

    def after(self, out: Tensor, host: nn.Module) -> Tensor:
        """Return the bias with zeros for the prompts, [1, H, P + T, P + T]."""
        return F.pad(out, (self.width, 0, self.width, 0))


class MergedPrompt(Graft):
    """Wraps a stage, whose own output has no room for prompts: a prompt is merged as its own four neighbours."""

    def around(self, forward: Callable[..., Any], host: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the stage's output with the merged prompts before the patches."""
        out, reshaped, (weights, prompts) = forward(*args, **kwargs)
        merged = host.downsample.reduction(host.downsample.norm(prompts.repeat(1, 1, 4)))
        return torch.cat((merged, out), dim=1), reshaped, weights


def _stages(tower: Tower) -> list[Any]:
    first = tower.blocks[0]
    for stages in anatomy.block_lists(tower.module).values():
        inside = any(first is not stage and first in stage.modules() for stage in stages)
        if inside and all(structure.part(stage, "blocks") is not None for stage in stages):
            return list(stages)
    raise TuningError(f"{type(tower.module).__name__} has no stages of blocks: take a Swin, or an unwindowed model.")


def _check_block(block: nn.Module) -> None:
    names = {name for name, _ in block.named_modules()}
    if missing := [part for part in _PARTS if part not in names]:
        raise TuningError(
            f"{type(block).__name__} attends within windows but has no {missing[0]}, as Swin has: "
            "tune it by LoRA or BitFit."
        )
