"""Fills a backbone that was built on the meta device: each rank reads its own part of each tensor from the files.

No rank ever holds the whole model, neither on its device nor in the memory of its host.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_peft.core import anatomy, select, sharded, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import resolve
from lightning_peft.core.private_torch import replace_tensors


def on_meta(module: nn.Module) -> bool:
    """Tell whether a tensor of the module has no storage yet."""
    return any(t.is_meta for t in itertools.chain(module.parameters(), module.buffers()))


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Allocate what is on the meta device, and read the values from the folder or hub id that the model names.

    Buffers that no file has (rotary frequencies) are computed as transformers does; a new task head is drawn, the same
    on all ranks.

    Raises:
        TuningError: the model does not say where its weights are, or the files lack a tensor.
    """
    if not on_meta(module):
        return
    for path, backbone in structure.pretrained_models(module).items():
        if not on_meta(backbone):
            continue
        absent = {
            name for name, t in itertools.chain(backbone.named_parameters(), backbone.named_buffers()) if t.is_meta
        }
        replace_tensors(backbone, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        _read(backbone, absent, path)
    if on_meta(module):
        names = [n for n, t in itertools.chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
        raise TuningError(f"{names[0]} is on the meta device but in no pretrained model, whose files would have it.")


def files_of(name: str) -> dict[str, Path]:
    """Return, for each tensor of a pretrained model's safetensors files, the file that holds it.

    Raises:
        TuningError: the folder, or the local cache, has no such files.
    """
    from transformers.utils.hub import cached_file

    name = resolve(name)
    try:
        index = None
        with suppress(OSError):  # all is in one file
            index = cached_file(name, "model.safetensors.index.json")
        if index is not None:
            entries = json.loads(Path(index).read_text())["weight_map"]
            paths = {file: Path(str(cached_file(name, file))) for file in set(entries.values())}
            return {tensor: paths[file] for tensor, file in entries.items()}
        single = Path(str(cached_file(name, "model.safetensors")))
    except OSError as error:
        raise TuningError(
            f"{name} has no safetensors files on this machine ({str(error).splitlines()[0]}): "
            "download it here first, or give a folder that all nodes share."
        ) from None
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(backbone: nn.Module, absent: set[str], path: str) -> None:
    name = structure.name_or_path(backbone)
    if not name:
        raise TuningError(
            f"{type(backbone).__name__} at {path or 'the root'} is on the meta device and names no folder to be read "
            "from: set config._name_or_path, or build it with from_pretrained."
        )
    files = files_of(name)
    head = set(anatomy.head_names(backbone))
    state = backbone.state_dict()
    aliases: dict[int, list[str]] = {}
    for key, parameter in backbone.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(key)
    for key, parameter in backbone.named_parameters():
        if key not in absent:
            continue
        source = next((s for s in _sources(backbone, aliases[id(parameter)]) if s in files), None)
        if source is not None:
            _copy(state[key], files[source], source)
        elif key in head:
            state[key].copy_(sharded.like(state[key], _drawn(backbone, key, state[key])))
        else:
            raise TuningError(f"the files of {name} lack {key}{select.near(key, files)}: load it with from_pretrained.")
    for key, buffer in backbone.named_buffers():
        if key not in absent:
            continue
        source = next((s for s in _sources(backbone, [key]) if s in files), None)
        if source is not None:
            _copy(buffer, files[source], source)
        else:
            _recompute(backbone, key)


def _sources(backbone: nn.Module, names: list[str]) -> Iterator[str]:
    """Yield the names that a file may have for a tensor: with or without the prefix of the base model."""
    prefix = f"{backbone.base_model_prefix}."
    for name in names:
        yield from (name, f"{prefix}{name}", name.removeprefix(prefix))


def _copy(live: Tensor, file: Path, name: str) -> None:
    """Read this rank's rows of a tensor."""
    with safe_open(file, framework="pt") as opened:
        rows = opened.get_slice(name)
        if tuple(rows.get_shape()) != tuple(live.shape):
            raise TuningError(f"{file} has {name} of shape {rows.get_shape()}, the model of {list(live.shape)}.")
        if not sharded.is_part(live):
            live.copy_(rows[:] if live.ndim else opened.get_tensor(name))
            return
        part = sharded.leading_rows(live)
        if part is None:
            live.copy_(sharded.like(live, rows[:]))  # split by another dimension, too: one tensor is whole for a moment
            return
        local, start, _ = part
        if local.numel():
            local.copy_(rows[start : start + local.shape[0]])


def _drawn(backbone: nn.Module, name: str, live: Tensor) -> Tensor:
    if live.ndim < 2:
        return torch.zeros(live.shape)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(live.shape, generator=generator) * structure.initializer_range(backbone)


def _recompute(backbone: Any, name: str) -> None:
    """Let transformers compute a buffer that is in no file.

    Raises:
        TuningError: it does not.
    """
    owner, _, leaf = name.rpartition(".")
    module = backbone.get_submodule(owner)
    buffer = module.get_buffer(leaf)
    marker = torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
    if buffer.dtype is not torch.bool:
        buffer.fill_(marker)
    # https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/modeling_utils.py
    backbone._init_weights(module)
    buffer = module.get_buffer(leaf)
    untouched = buffer.isnan().any() if buffer.is_floating_point() else (buffer == marker).any()
    if leaf in ("position_ids", "token_type_ids") and untouched:
        columns = torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer)
        buffer.copy_(columns if leaf == "position_ids" else torch.zeros_like(buffer))
    elif untouched:
        raise TuningError(
            f"{name} is in no file and transformers does not compute it: build the model with from_pretrained."
        )
