"""Deep prompts in the layers of a two-tower model, as MaPLe and IVLP train them.

In the text tower the prompt stands behind the start token, in the vision tower at the end of the patches, without
positions of its own. In the first layers, up to the depth, each layer gets other rows in its place; what the layer
before made of them is dropped. Behind the last layer the vision tower's are taken out, so that whatever pools its
tokens sees the image alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core import placement, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.towers import vision
from lightning_peft.towers.context_tokens import ContextCall, ContextTokens
from lightning_peft.towers.contexts import TextContext, graft_context, plain_layout
from lightning_peft.towers.plain_text import MovedBack, PlainContext, graft_plain, plain_text, text_blocks
from lightning_peft.towers.text_towers import STANDARD_DEVIATION, reads_end, text_tower, two_towers, word_table

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


class EnteringPrompt(ImagePrompt):
    """Appends the rows of the first layer to the tokens of an image that go into its host."""

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens with the prompt, [B, T + n, d]."""
        return super().after(x, host)

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the host gives."""
        return out


class WithoutPrompt(Graft):
    """Removes the last ``count`` tokens from the output of its host, the last block of a vision tower."""

    def __init__(self, count: int, call: ContextCall) -> None:
        super().__init__()
        self.count = count
        self.call = call

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens without the prompt, [B, T, d]."""
        return out[:, : -self.count] if self.call.active else out


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


@dataclass(frozen=True)
class Side:
    """One of two towers.

    Attributes:
        module: the tower, or the model that it is in.
        blocks: its blocks, in their order.
        width: of its tokens.
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    width: int

    def check_depth(self, depth: int, argument: str) -> None:
        """Check that the tower is as deep as its prompts.

        Raises:
            TuningError: it is not.
        """
        layers = len(self.blocks)
        if not 1 <= depth <= layers:
            raise TuningError(f"{argument}={depth} is out of range: {type(self.module).__name__} has {layers} layers.")

    def random_prompt(self, count: int) -> nn.Parameter:
        """Return rows drawn from N(0, 0.02²), [n, d]."""
        rows = torch.empty(count, self.width, dtype=torch.float32).normal_(std=STANDARD_DEVIATION)
        return nn.Parameter(rows.to(self.device))

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return placement.device_of(self.module)


@dataclass(frozen=True)
class TextSide(Side):
    """The tower of texts, with its word table."""

    table: nn.Embedding


def text_side(backbone: nn.Module, method: str) -> TextSide:
    """Return the tower of texts.

    Raises:
        TuningError: there is none.
    """
    plain = plain_text(backbone)
    if plain is not None:
        return TextSide(plain.model, text_blocks(plain), plain.table.embedding_dim, plain.table)
    tower = text_tower(backbone, method)
    return TextSide(tower, _blocks_of(tower), _width_of(tower), word_table(tower))


def image_side(backbone: nn.Module, method: str) -> Side:
    """Return the tower of images.

    Raises:
        TuningError: there is none of patch embeddings and blocks.
    """
    if plain_text(backbone) is not None:
        found = vision.tower(backbone)
        return Side(found.module, found.blocks, found.dim)
    tower = vision_tower(backbone, method)
    return Side(tower, _blocks_of(tower), _width_of(tower))


def graft_prompts(backbone: nn.Module, prompts: Prompts, name: str, template: str, share_prefix: bool) -> None:
    """Attach the prompts and the grafts that put them into the layers of a two-tower model."""
    plain = plain_text(backbone)
    call = attach(two_towers(backbone) if plain is None else plain.model, prompts, name).call
    text, images = text_side(backbone, name), image_side(backbone, name)
    layout, start = plain_layout(len(prompts.rows("text", 0))), 1
    if plain is None:
        context = TextContext(layout, call, share_prefix=share_prefix, template=template)
        graft_context(text.module, PromptTokens(call), context, name)
        start = 1 if reads_end(text.module) else 0
        attach(images.module.embeddings, ImagePrompt(call), name)  # type: ignore[arg-type]
    else:
        begun = PlainContext(layout, call)
        graft_plain(plain, PromptTokens(call), begun, MovedBack(begun), name)
        attach(vision.tower(backbone).embeddings, EnteringPrompt(call), f"{name}_start")
    for layer in range(1, len(prompts.text)):
        attach(text.blocks[layer], DeepPrompt(call, "text", layer, start), name)
    for layer in range(1, len(prompts.projections) or len(prompts.images)):
        attach(images.blocks[layer], DeepPrompt(call, "images", layer), name)
    attach(images.blocks[-1], WithoutPrompt(len(prompts.rows("images", 0)), call), f"{name}_end")


def _blocks_of(tower: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(tower.encoder.layers)  # type: ignore[union-attr, arg-type]


def _width_of(tower: nn.Module) -> int:
    return tower.config.hidden_size  # type: ignore[union-attr, return-value]


def rows_in(call: ContextCall, tower: Tower, layer: int) -> Tensor:
    """Return the rows of a layer from the graft that holds them."""
    assert isinstance(call.prompts, Prompts)
    return call.prompts.rows(tower, layer)


def _of_batch(rows: Tensor, x: Tensor) -> Tensor:
    return rows.to(x).expand(len(x), -1, -1)  # where the block is: it may lie on another device than the rows
