"""Deep prompts in the layers of a two-tower model, as MaPLe and IVLP train them.

In the text tower the prompt stands behind the start token, in the vision tower at the end of the patches, without
positions of its own. In the first layers, up to the depth, each layer gets other rows in its place; what the layer
before made of them is dropped. Behind the last layer the vision tower's are taken out, so that whatever pools its
tokens sees the image alone.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core import placement, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.towers.context_tokens import ContextCall, ContextTokens
from lightning_peft.towers.contexts import TextContext, graft_context, plain_layout
from lightning_peft.towers.text_towers import STANDARD_DEVIATION, reads_end, text_tower, two_towers

Tower = Literal["text", "images"]


class Prompts(Graft):
    """Holds the rows of all layers of both towers. Its host is the two-tower model.

    They are in one place since sharding gathers the blocks of the towers one by one, and rows that both towers read can
    belong to one block only.

    Args:
        text: the rows of each layer of the text tower, [n, d].
        images: those of each layer of the vision tower, [n', d']; none where they are made from those of the text.
        projections: the maps from d to d' that make them.
    """

    def __init__(
        self, text: Sequence[nn.Parameter], images: Sequence[nn.Parameter] = (), projections: Sequence[nn.Linear] = ()
    ) -> None:
        super().__init__()
        self.call = ContextCall()
        self.call.prompts = self
        self.text = nn.ParameterList(text)
        self.images = nn.ParameterList(images)
        self.projections = nn.ModuleList(projections)

    def rows(self, tower: Tower, layer: int) -> Tensor:
        """Return the rows of a layer, [n, d]."""
        if tower == "text":
            return self.text[layer]
        return self.projections[layer](self.text[layer]) if len(self.projections) else self.images[layer]


class PromptTokens(ContextTokens):
    """Gives the tokens of a prompt in the text the rows of the first layer."""

    def __init__(self, call: ContextCall) -> None:
        super().__init__(None, call)  # type: ignore[arg-type]

    def table(self) -> Tensor:
        """Return the rows, [n, d]."""
        return rows_in(self.call, "text", 0)


class DeepPrompt(Graft):
    """Replaces the prompt in the input of a block by the rows of that layer.

    Args:
        call: shared with the other grafts of the method.
        tower: which tower the block is of.
        layer: the number of the block.
        start: where the prompt is; None: at the end.
    """

    def __init__(self, call: ContextCall, tower: Tower, layer: int, start: int | None = None) -> None:
        super().__init__()
        self.call = call
        self.tower = tower
        self.layer = layer
        self.start = start

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens with other rows in the prompt's place, [B, T, d]."""
        if not self.call.active:
            return x
        rows = _of_batch(rows_in(self.call, self.tower, self.layer), x)
        start = x.shape[1] - rows.shape[1] if self.start is None else self.start
        return torch.cat([x[:, :start], rows, x[:, start + rows.shape[1] :]], dim=1)


class ImagePrompt(Graft):
    """Appends the rows of the first layer to the patch embeddings, which its host computes."""

    def __init__(self, call: ContextCall) -> None:
        super().__init__()
        self.call = call

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings with the prompt, [B, T + n, d]."""
        return torch.cat([out, _of_batch(rows_in(self.call, "images", 0), out)], dim=1) if self.call.active else out


class WithoutPrompt(Graft):
    """Removes the last ``count`` tokens from the output of its host, the last block of a vision tower."""

    def __init__(self, count: int, call: ContextCall) -> None:
        super().__init__()
        self.count = count
        self.call = call

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens without the prompt, [B, T, d]."""
        return out[:, : -self.count] if self.call.active else out


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """Return the blocks of a tower."""
    return list(tower.encoder.layers)  # type: ignore[union-attr, arg-type]


def check_depth(tower: nn.Module, depth: int, argument: str) -> None:
    """Check that a tower is as deep as its prompts.

    Raises:
        TuningError: it is not.
    """
    layers = len(blocks_of(tower))
    if not 1 <= depth <= layers:
        raise TuningError(f"{argument}={depth} is out of range: {type(tower).__name__} has {layers} layers.")


def vision_tower(backbone: nn.Module, method: str) -> nn.Module:
    """Return the vision tower of a two-tower model.

    Raises:
        TuningError: it has none of patch embeddings and blocks.
    """
    tower = structure.part(two_towers(backbone), "vision_model")
    known = tower is not None and isinstance(structure.part(tower, "encoder.layers"), nn.ModuleList)
    if tower is None or not known or structure.part(tower, "embeddings") is None:
        raise TuningError(
            f"{method} puts prompts into the images of a two-tower model, and {type(backbone).__name__} has no vision "
            "tower like that of CLIP or SigLIP: give a CLIPModel or a SiglipModel."
        )
    return tower


def tower_width(tower: nn.Module) -> int:
    """Return the hidden size of a tower."""
    return tower.config.hidden_size  # type: ignore[union-attr, return-value]


def random_prompt(tower: nn.Module, count: int) -> nn.Parameter:
    """Return rows drawn from N(0, 0.02²) for a tower, [n, d]."""
    rows = torch.empty(count, tower_width(tower), dtype=torch.float32).normal_(std=STANDARD_DEVIATION)
    return nn.Parameter(rows.to(device_of(tower)))


def device_of(tower: nn.Module) -> torch.device:
    """Return where a tower is."""
    return placement.device_of(tower)


def graft_prompts(model: nn.Module, prompts: Prompts, name: str, template: str, share_prefix: bool) -> None:
    """Attach the prompts and the grafts that put them into the layers of a two-tower model."""
    call = attach(model, prompts, name).call
    text, images = text_tower(model, name), vision_tower(model, name)
    count = len(prompts.rows("text", 0))
    context = TextContext(plain_layout(count), call, share_prefix=share_prefix, template=template)
    graft_context(text, PromptTokens(call), context, name)
    start = 1 if reads_end(text) else 0
    for layer in range(1, len(prompts.text)):
        attach(blocks_of(text)[layer], DeepPrompt(call, "text", layer, start), name)
    attach(images.embeddings, ImagePrompt(call), name)  # type: ignore[arg-type]
    for layer in range(1, len(prompts.projections) or len(prompts.images)):
        attach(blocks_of(images)[layer], DeepPrompt(call, "images", layer), name)
    attach(blocks_of(images)[-1], WithoutPrompt(len(prompts.rows("images", 0)), call), f"{name}_end")


def rows_in(call: ContextCall, tower: Tower, layer: int) -> Tensor:
    """Return the rows of a layer from the graft that holds them."""
    assert isinstance(call.prompts, Prompts)
    return call.prompts.rows(tower, layer)


def _of_batch(rows: Tensor, x: Tensor) -> Tensor:
    return rows.to(x).expand(len(x), -1, -1)  # where the block is: it may lie on another device than the rows
