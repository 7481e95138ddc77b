"""Sharded tensors, and checkpoints that are folders with a file for each rank.

``torch.distributed.tensor`` takes as long to import as torch itself, and is imported where such a tensor is made.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.core.folder_seal import check_folder, plain_values
from lightning_peft.core.storage import first_line, read_torch

_REST = "meta.pt"  # where Lightning puts what is no tensor of the model or the optimizer

PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""The types of tensors that are of no subclass."""


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one device would hold it; every rank must call it for a sharded one."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def is_part(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor, of which each rank holds a part."""
    if type(tensor) in PLAIN:  # most are, and each call of a layer asks
        return False
    made = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return made is not None and isinstance(tensor, made.DTensor)


def leading_rows(tensor: Tensor) -> tuple[Tensor, int, Any] | None:
    """Return this rank's rows of a tensor, the number of the first one, and the process group that has the rest.

    Of a tensor that no other rank has a part of, these are all rows, 0 and None. None: it is split in another way.
    """
    if not is_part(tensor):
        return tensor, 0, None
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if mesh.ndim > 1 or not placements[0].is_shard(0):
        return None
    rows = -(-tensor.shape[0] // mesh.size())  # torch gives each rank as many, and what is left to the last one
    return tensor.to_local(), min(mesh.get_local_rank() * rows, tensor.shape[0]), mesh.get_group()  # type: ignore[attr-defined]


def like(live: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's part of ``tensor`` if ``live`` is sharded, with the placement of ``live``."""
    if not is_part(live) or is_part(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(live.device, live.dtype if tensor.is_floating_point() else tensor.dtype)
    # Each rank has read the file: nothing needs to be sent.
    return distribute_tensor(placed, live.device_mesh, live.placements, src_data_rank=None)  # type: ignore[attr-defined]


def joined(tensor: Tensor, shape: tuple[int, ...], mesh: Any) -> Tensor:
    """Return what each rank of a group has of a tensor of ``shape``, all of it or a part, as a DTensor.

    Raises:
        TuningError: it is neither.
    """
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    placement: Placement = Replicate()
    for dimension, (here, there) in enumerate(zip(tensor.shape, shape, strict=True)):
        if here != there:
            if placement.is_shard() or here * mesh.size() != there:
                raise TuningError(
                    f"a split layer gives {list(tensor.shape)} of {list(shape)} on one of {mesh.size()} ranks, which "
                    "is neither all nor an even part: give the plan other output_layouts."
                )
            placement = Shard(dimension)
    return DTensor.from_local(tensor, mesh, [placement], run_check=False)


def summed(tensor: Tensor) -> Tensor:
    """Return a tensor of which the ranks hold summands as their sum, on each of them; others as they are."""
    if not is_part(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    sums = [Replicate() if placement.is_partial() else placement for placement in placements]
    return tensor.redistribute(placements=sums)  # type: ignore[attr-defined]


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all ranks the values of rank 0, which is what DDP does."""
    if not torch.distributed.is_initialized():
        return
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    for tensor in list(tensors):
        held = tensor.detach().to(device).contiguous()
        torch.distributed.broadcast(held, 0)
        tensor.detach().copy_(held)


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gather the parameters that DeepSpeed's ZeRO-3 has partitioned, for a while; every rank must call it."""
    emptied = [p for p in parameters if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"]
    if not emptied:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(emptied):
        yield


def is_folder(path: str | Path) -> bool:
    """Tell whether ``path`` is a checkpoint of `torch.distributed.checkpoint`."""
    return (Path(path) / ".metadata").is_file()


def read_folder(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint folder as the one file that a single device would have written.

    Raises:
        TuningError: a part of it is missing or damaged.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    check_folder(Path(path))
    checkpoint = read_torch(Path(path) / _REST)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.pt"
        try:
            with plain_values(Path(path)):
                dcp_to_torch_save(path, file)
        except BaseException as error:  # whatever a damaged pickle makes the reader do; torch's own is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise TuningError(f"{path} lacks a part or is damaged ({first_line(error)}): take another copy.") from None
        tensors = read_torch(file)
    optimizers = sorted((k for k in tensors if k.startswith("optimizer_")), key=lambda k: int(k.rpartition("_")[2]))
    if optimizers:
        checkpoint["optimizer_states"] = [_numbered(tensors[key]) for key in optimizers]
    return checkpoint | {"state_dict": tensors["state_dict"]}


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state by number instead of name, in the order of its groups, as ``torch.optim`` has it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: i for i, name in enumerate(names)}
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[n]: values for n, values in state["state"].items()}, "param_groups": groups}


@torch.no_grad()
def optimizer_part(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with each moment sharded as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(number: int, value: Any) -> Any:
        same = isinstance(value, Tensor) and value.shape == parameters[number].shape
        return like(parameters[number], value) if same else value

    return state | {"state": {k: {n: part(k, v) for n, v in values.items()} for k, values in state["state"].items()}}


@torch.no_grad()
def optimizer_whole(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as one device would hold it, on the CPU; every rank must call it."""
    values = {
        k: {n: whole(v).cpu() if isinstance(v, Tensor) else v for n, v in entry.items()}
        for k, entry in state["state"].items()
    }
    return state | {"state": values}
