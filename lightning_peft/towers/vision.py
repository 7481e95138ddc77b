"""The parts of a vision transformer, found by what they are: patch embedding, blocks, tokens before the patches.

No table lists architectures. The patch embedding is the convolution outside of the blocks, the tower is the innermost
transformers model around it (for others see `plain_vision`), its blocks are its longest list of equal modules that
attend. How many tokens stand before the patches ([CLS], a distillation token, registers) is counted in one run of the
embeddings on an empty image.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, select, structure
from lightning_peft.core.empty_inputs import patches_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.placement import undispatched
from lightning_peft.towers.plain_vision import plain_tower


@dataclass(frozen=True)
class Tower:
    """A vision transformer inside a backbone.

    Attributes:
        module: takes pixels and returns hidden states.
        embeddings: its child whose output, [B, n + N, d], goes into the first block; of a plain one, the module
            whose input that is.
        blocks: its blocks in their order, those of all stages of a windowed one.
        patches: the convolution that makes tokens of patches.
        image_size: shape of an image of the size that the model was made for, [C, H, W]; of a video, [T, C, H, W].
        prefix: n, the number of tokens before those of the patches.
        tokens: N, the number of patches of an image of the size that the model was made for.
        dim: the width d of its first block.
        windowed: whether its blocks attend within windows of a shrinking grid (Swin).
        has_cls: whether the first token is a [CLS].
        plain: whether it is no transformers model.
        given: what it takes in place of an image, where that is a row of patches (SigLIP 2), without values.
    """

    module: nn.Module
    embeddings: nn.Module
    blocks: tuple[nn.Module, ...]
    patches: nn.Conv2d | nn.Conv3d | nn.Linear
    image_size: tuple[int, ...]
    prefix: int
    tokens: int
    dim: int
    windowed: bool
    has_cls: bool
    plain: bool = False
    given: Mapping[str, Tensor] | None = None

    @property
    def area(self) -> int:
        """The number of values of a patch."""
        if isinstance(self.patches, nn.Linear):
            return self.patches.in_features
        return self.patches.in_channels * math.prod(self.patches.kernel_size)

    def inputs(self, device: torch.device, rows: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Return what its forward pass takes, by position and by name; images of zeros."""
        if self.given is None:
            image = torch.zeros(rows, *self.image_size, dtype=self.patches.weight.dtype, device=device)
            return [image], {}
        return [], {name: each.to(device).repeat_interleave(rows, 0) for name, each in self.given.items()}


def tower(backbone: nn.Module, of_patches: bool = False) -> Tower:
    """Return the vision transformer of a backbone; of a CLIP the image side.

    Args:
        backbone: the model.
        of_patches: whether one will do that takes rows of patches in place of images.

    Raises:
        TuningError: there is none.
    """
    place = _patch_embedding(backbone)
    found = (_of_transformers(backbone, *place) if place is not None else None) or _plain(backbone)
    if found is None and of_patches:
        found = _of_rows(backbone)
    if found is None:
        raise TuningError(
            f"{type(backbone).__name__} has no vision transformer (a model that makes a row of tokens of patches and "
            "attends to them in equal blocks): take a ViT, DeiT, DINOv2, CLIP, SigLIP or Swin, say, or tune it by LoRA."
        )
    return found


def _of_transformers(backbone: nn.Module, module: nn.Module, embeddings: nn.Module, patches: nn.Conv2d) -> Tower | None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), undispatched(backbone):
        try:  # not by a call, since what methods have attached adds tokens
            out = type(embeddings).forward(embeddings, _empty_image(module, patches))
        except (RuntimeError, TypeError, ValueError, AttributeError):  # it embeds something else than one image
            return None
    windowed = isinstance(out, tuple)
    tokens = out[0] if isinstance(out, tuple) else out
    count, blocks = _grid(module, patches), _blocks(module, windowed)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or not blocks or tokens.shape[1] < count:
        return None
    names = [name for name, _ in embeddings.named_parameters(recurse=False)]
    return Tower(
        module,
        embeddings,
        blocks,
        patches,
        (patches.in_channels, *_image_size(module)),
        prefix=tokens.shape[1] - count,
        tokens=count,
        dim=tokens.shape[2],
        windowed=windowed,
        has_cls=has_cls(names),
    )


def _plain(backbone: nn.Module) -> Tower | None:
    found = plain_tower(backbone)
    if found is None:
        return None
    prefix, dim = found.shape[1] - found.tokens, found.shape[2]
    names = [name for name, _ in found.module.named_parameters(recurse=False)]
    return Tower(
        found.module,
        found.entry,
        found.blocks,
        found.patches,
        found.image_size,
        prefix=prefix,
        tokens=found.tokens,
        dim=dim,
        windowed=False,
        has_cls=has_cls(names),
        plain=True,
    )


def _of_rows(backbone: nn.Module) -> Tower | None:
    """Return the innermost tower that takes rows of patches, which a linear layer embeds."""
    for module in reversed([module for module in backbone.modules() if _is_model(module)]):
        given, patches = patches_of(module), structure.input_embeddings_of(module)
        if given and isinstance(patches, nn.Linear) and _attending(module):
            blocks, count = _blocks(module, windowed=False), given["pixel_values"].shape[1]
            size = tuple(given["pixel_values"].shape[1:])
            dim = patches.out_features
            return Tower(module, blocks[0], blocks, patches, size, 0, count, dim, False, False, given=given)
    return None


def has_cls(names: Iterable[str]) -> bool:
    """Tell whether there is a [CLS] token among parameters of these names."""
    return any(re.fullmatch(r"cls_token|class_token|class_embedding", name) for name in names)


def _patch_embedding(backbone: nn.Module) -> tuple[nn.Module, nn.Module, nn.Conv2d] | None:
    """Return the tower, its embeddings and the patch convolution."""
    models = dict(structure.pretrained_models(backbone))
    inside = {id(m) for outer in models.values() for m in outer.modules()}
    lists = anatomy.block_lists(backbone)
    for name, conv in backbone.named_modules():
        if not isinstance(conv, nn.Conv2d) or id(conv) not in inside or anatomy.block_index(lists, name):
            continue
        parts = name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            owner = backbone.get_submodule(".".join(parts[:depth]))
            is_tower = _is_model(owner) and structure.image_size(structure.config_of(owner)) is not None
            if is_tower and len(parts) > depth + 1 and _attending(owner):
                return owner, owner.get_submodule(parts[depth]), conv
    return None


def _is_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _attending(module: nn.Module) -> list[anatomy.BlockList]:
    """Return the lists of blocks that hold attentions."""
    query = re.compile(rf"(?:.*\.)?(?:{select.ROLES['query']}|{select.ROLES['fused_qkv']})")
    lists = anatomy.block_lists(module).values()
    return [blocks for blocks in lists if any(query.fullmatch(name) for name, _ in blocks[0].named_modules())]


def _blocks(module: nn.Module, windowed: bool) -> tuple[nn.Module, ...]:
    entries = max((list(blocks) for blocks in _attending(module)), key=len)
    if not windowed:
        return tuple(entries)
    return tuple(block for stage in entries for blocks in _attending(stage) for block in blocks)


def _empty_image(module: nn.Module, patches: nn.Conv2d) -> Tensor:
    height, width = _image_size(module)
    return patches.weight.new_zeros(1, patches.in_channels, height, width)


def _grid(module: nn.Module, patches: nn.Conv2d) -> int:
    height, width = _image_size(module)
    return (height // int(patches.stride[0])) * (width // int(patches.stride[1]))


def _image_size(module: nn.Module) -> tuple[int, int]:
    size = structure.image_size(structure.config_of(module))
    assert size is not None
    return size
