"""Vision transformers that are no transformers models: timm's, torchvision's, open_clip's, or one's own.

Their parts are found by a run without numbers. The patch embedding is a convolution outside of the blocks; the blocks
are the longest row of equal modules that attend; what goes into the first one must be a row of tokens, [B, n + N, d],
that comes from N patches. Prompts go in where that row is first complete, and a second run shows whether the model can
do with one token more.
"""

import math
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, image_structure, select
from lightning_peft.core.graft import Graft
from lightning_peft.core.meta_run import ran, resting

_MOST_EXTRA = 64  # tokens that may stand before those of the patches
_ATTENDS = re.compile(rf"(?:.*\.)?(?:{select.ROLES['query']}|{select.ROLES['fused_qkv']})")


class PlainTower(NamedTuple):
    """A vision transformer that is no transformers model; ``entry`` is the module whose input the prompts go into."""

    module: nn.Module
    entry: nn.Module
    blocks: tuple[nn.Module, ...]
    patches: nn.Conv2d | nn.Conv3d
    image_size: tuple[int, ...]
    tokens: int
    shape: torch.Size


def plain_tower(backbone: nn.Module) -> PlainTower | None:
    """Return the vision transformer in a backbone, or None."""
    modules = anatomy.without_grafts(backbone)
    in_blocks = {module for blocks in stacks(backbone) for block in blocks for module in block.modules()}
    for path, conv in modules.items():
        if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or conv in in_blocks or conv.kernel_size[0] < 2:
            continue
        parts = path.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            owner = backbone.get_submodule(".".join(parts[:depth]))
            found = _of(owner, conv)
            if found is not None:
                return found
    return None


def counting_prefixes(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules that say how many tokens before those of patches they leave out of what they turn."""
    return [
        module for block in blocks for module in block.modules() if image_structure.prefix_tokens_of(module) is not None
    ]


def _of(owner: nn.Module, conv: nn.Conv2d | nn.Conv3d) -> PlainTower | None:
    size: tuple[int, ...] | None = image_structure.stated_image_size(owner) or _size_by_positions(owner, conv)
    if size is None:
        return None
    frames = image_structure.frames_of(owner) if isinstance(conv, nn.Conv3d) else None
    size = size if frames is None else (frames, *size)
    if len(size) != len(conv.stride):
        return None
    tokens = math.prod(length // step for length, step in zip(size, conv.stride, strict=True))
    size = (conv.in_channels, *size) if frames is None else (frames, conv.in_channels, *size[1:])
    for blocks in sorted(stacks(owner), key=len, reverse=True):
        calls: list[tuple[nn.Module, torch.Size]] = []
        image = torch.empty(2, *size, dtype=conv.weight.dtype, device="meta")
        ran(owner, image, each=partial(noting, calls))
        before = [module for module, _ in calls]
        if blocks[0] not in before:
            continue
        at = before.index(blocks[0])
        shape = calls[at][1]
        if len(shape) != 3 or shape[0] != 2 or not 0 <= shape[1] - tokens <= _MOST_EXTRA:
            continue
        entries = [m for m, given in calls[:at] if given == shape and blocks[0] not in m.modules()]
        for entry in (*entries, blocks[0]):
            if ran(owner, image, each=partial(_with_one_more, entry, blocks, shape[1] - tokens)):
                return PlainTower(owner, entry, blocks, conv, size, tokens, shape)
    return None


def stacks(module: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Return the outermost rows of equal modules that attend."""
    found: dict[str, tuple[nn.Module, ...]] = {}
    for name, row in anatomy.without_grafts(module).items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(row, (nn.ModuleList, nn.Sequential)) and len(row) and not inside:
            blocks = tuple(row.children())
            if len({type(block) for block in blocks}) == 1 and all(_attends(block) for block in blocks):
                found[name] = blocks
    return list(found.values())


def _attends(block: nn.Module) -> bool:
    kinds = {name: type(module).__name__.lower() for name, module in block.named_modules()}
    return any("attention" in kind or _ATTENDS.fullmatch(name) for name, kind in kinds.items())


def _size_by_positions(owner: nn.Module, conv: nn.Conv2d | nn.Conv3d) -> tuple[int, int] | None:
    """Return the size of images whose patches, with a few tokens more, are as many as a table has positions."""
    for table in _tables(owner, conv.out_channels):
        side = math.isqrt(table.shape[-2])
        if side > 1 and table.shape[-2] - side * side <= min(_MOST_EXTRA, 2 * side):
            return side * int(conv.stride[-2]), side * int(conv.stride[-1])
    return None


def _tables(owner: nn.Module, width: int) -> Iterator[Tensor]:
    for name, parameter in owner.named_parameters():
        if "pos" in name and parameter.ndim in (2, 3) and parameter.shape[-1] == width:
            yield parameter


def noting(calls: list[tuple[nn.Module, torch.Size]], module: nn.Module) -> Any:
    """Let a module of a run note its first input; what methods have attached does nothing."""
    if isinstance(module, Graft):
        return resting
    forward = module.forward

    def note(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            calls.append((module, args[0].shape))
        return forward(*args, **kwargs)

    return note


def _with_one_more(entry: nn.Module, blocks: tuple[nn.Module, ...], start: int, module: nn.Module) -> Any:
    """Let a run have one token more from the entry on, which the last block takes out."""
    if isinstance(module, Graft):
        return resting
    if image_structure.prefix_tokens_of(module) is not None and any(module in block.modules() for block in blocks):
        vars(module)["num_prefix_tokens"] = module.num_prefix_tokens + 1  # type: ignore[operator]
    forward = module.forward

    def longer(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is entry:
            x = torch.cat((x[:, :start], x[:, :1], x[:, start:]), dim=1)
        out = forward(x, *args, **kwargs)
        if module is not blocks[-1]:
            return out
        tokens = out[0] if isinstance(out, tuple) else out
        tokens = torch.cat((tokens[:, :start], tokens[:, start + 1 :]), dim=1)
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens

    return longer if module in (entry, blocks[-1]) else None
