"""Prompts of each image as keys and values of the blocks of a vision transformer, by a query of the frozen model.

The query is the [CLS] of the frozen model without prompts. One graft around the tower holds all that is trained, since
sharding gathers the blocks one by one; a graft in each attention puts in what the image has there.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, attention, structure
from lightning_peft.core.attention_probe import Attention
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.noted import Noting
from lightning_peft.core.placement import device_of
from lightning_peft.towers.vision import tower


class OfThisCall:
    """The keys and values of the images of a call, until the next: a block may be computed anew in the backward pass.

    Attributes:
        rows: number of the block -> keys and values, [B, 2, P, d] each.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: no tensor of the last call."""
        return {"rows": {}}


class ImagePrefix(Graft):
    """Puts the rows of an image before the keys and values of its host, an attention.

    Args:
        place: the attention.
        layer: the number of its block.
        call: shared with the graft around the tower.
    """

    def __init__(self, place: Attention, layer: int, call: OfThisCall) -> None:
        super().__init__()
        self.heads, self.layer, self.call = place.heads, layer, call

    def key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values with the rows on their left, [B, H, P + S, d]."""
        rows = self.call.rows.get(self.layer)
        if rows is None:
            return key, value
        keys, values = rows.to(key).unflatten(-1, (self.heads, -1)).permute(1, 0, 3, 2, 4)
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)


class PromptsByQuery(Noting):
    """Wraps a vision transformer: makes the keys and values of each image from its query."""

    task: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.call = OfThisCall()
        self.register_buffer("task", torch.zeros(1, dtype=torch.long, device=device))

    def rows(self, query: Tensor) -> dict[int, Tensor]:
        """Return number of a block -> keys and values for queries [B, d], [B, 2, P, d]."""
        raise NotImplementedError

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the tower for the images with their prompts."""
        self.call.rows = {}
        self.call.rows = self.rows(self._query(forward, host, args, kwargs).float())
        return forward(*args, **kwargs)

    @torch.no_grad()
    def _query(self, forward: Callable[..., Any], host: nn.Module, args: Any, kwargs: Any) -> Tensor:
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
        with in_eval(host) if host.training else nullcontext():
            out = forward(*args, **kwargs)
        found: Tensor = out[0][:, 0]
        return found


def attach_by_query(
    backbone: nn.Module, layers: list[int], name: str, make: Callable[[int, torch.device], PromptsByQuery]
) -> None:
    """Attach prompts to blocks of the vision transformer in a classifier.

    Args:
        backbone: the classifier.
        layers: numbers of the blocks.
        name: of the grafts.
        make: makes the graft around the tower, given the width d of its tokens and the device.

    Raises:
        TuningError: it has no vision transformer with a [CLS], no head, or not as many blocks.
    """
    found, kind = tower(backbone), type(backbone).__name__
    if found.plain or found.windowed or not found.has_cls:
        raise TuningError(
            f"prompts are chosen by the [CLS] token of a transformers model, which {kind} has not: take a ViT, DeiT, "
            "DINOv2 or CLIP."
        )
    if structure.gives_feature_maps(found.module) or not anatomy.head_names(backbone):
        raise TuningError(f"the prompts serve a task head, and {kind} has none: take a classifier.")
    outside = [layer for layer in layers if layer >= len(found.blocks)]
    if outside:
        raise TuningError(f"block {outside[0]} gets prompts, and {kind} has blocks 0 to {len(found.blocks) - 1}.")
    inside = {module: i for i, block in enumerate(found.blocks) for module in block.modules()}
    pool = attach(found.module, make(found.dim, device_of(found.patches)), name)
    for place in attention.join(backbone, name):
        layer = inside.get(place.module)
        if layer in layers:
            if place.heads * place.key_dim != found.dim or place.value_dim != place.key_dim:
                raise TuningError(f"{place.path} has keys of another width than its tokens: leave block {layer} out.")
            attach(place.module, ImagePrefix(place, inside[place.module], pool.call), name)
