"""The parts of a vision transformer, found by what they are: patch embedding, blocks, tokens before the patches.

No table lists architectures. The patch embedding is the convolution outside of the blocks, the tower is the innermost
transformers model around it, its blocks are its longest list of equal modules that attend. How many tokens stand before
the patches ([CLS], a distillation token, registers) is counted in one run of the embeddings on an empty image.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import select, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.placement import undispatched


@dataclass(frozen=True)
class Tower:
    """A vision transformer inside a backbone.

    Attributes:
        module: takes pixels and returns hidden states.
        embeddings: its child whose output, [B, n + N, d], goes into the first block.
        blocks: its blocks in their order, those of all stages of a windowed one.
        patches: the convolution that makes tokens of patches.
        image_size: height and width that the model was made for [pixels].
        prefix: n, the number of tokens before those of the patches.
        tokens: N, the number of patches of an image of the size that the model was made for.
        dim: the width d of its first block.
        windowed: whether its blocks attend within windows of a shrinking grid (Swin).
        has_cls: whether the first token is a [CLS].
    """

    module: nn.Module
    embeddings: nn.Module
    blocks: tuple[nn.Module, ...]
    patches: nn.Conv2d
    image_size: tuple[int, int]
    prefix: int
    tokens: int
    dim: int
    windowed: bool
    has_cls: bool


def tower(backbone: nn.Module) -> Tower:
    """Return the vision transformer of a backbone; of a CLIP the image side.

    Raises:
        TuningError: there is none.
    """
    place = _patch_embedding(backbone)
    if place is None:
        raise TuningError(
            f"{type(backbone).__name__} has no vision transformer (a transformers model that makes tokens of patches "
            "and attends to them): take a ViT, DeiT, DINOv2, CLIP, SigLIP or Swin, say."
        )
    module, embeddings, patches = place
    with torch.no_grad(), torch.random.fork_rng(devices=[]), undispatched(backbone):
        # Not by a call, since what methods have attached adds tokens.
        out = type(embeddings).forward(embeddings, _empty_image(module, patches))
    windowed = isinstance(out, tuple)
    tokens: Tensor = out[0] if isinstance(out, tuple) else out
    count = _grid(module, patches)
    names = [name for name, _ in embeddings.named_parameters(recurse=False)]
    return Tower(
        module,
        embeddings,
        _blocks(module, windowed),
        patches,
        _image_size(module),
        prefix=tokens.shape[1] - count,
        tokens=count,
        dim=tokens.shape[2],
        windowed=windowed,
        has_cls=any(re.fullmatch(r"cls_token|class_token|class_embedding", name) for name in names),
    )


def _patch_embedding(backbone: nn.Module) -> tuple[nn.Module, nn.Module, nn.Conv2d] | None:
    """Return the tower, its embeddings and the patch convolution."""
    models = dict(structure.pretrained_models(backbone))
    inside = {id(m) for outer in models.values() for m in outer.modules()}
    lists = structure.block_lists(backbone)
    for name, conv in backbone.named_modules():
        if not isinstance(conv, nn.Conv2d) or id(conv) not in inside or select.block_index(lists, name):
            continue
        parts = name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            owner = backbone.get_submodule(".".join(parts[:depth]))
            if _is_model(owner) and len(parts) > depth + 1 and _attending(owner):
                return owner, owner.get_submodule(parts[depth]), conv
    return None


def _is_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _attending(module: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of blocks that hold attentions."""
    query = re.compile(rf"(?:.*\.)?(?:{select.ROLES['query']}|{select.ROLES['fused_qkv']})")
    lists = structure.block_lists(module).values()
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
    config: Any = module.config
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])
