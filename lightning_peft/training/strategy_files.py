"""Makes sharding strategies save and load the delta alone, one tensor at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_peft.core import sharded
from lightning_peft.core.delta import delta_names, save_delta
from lightning_peft.core.delta_file import IN_FOLDER
from lightning_peft.core.errors import TuningError
from lightning_peft.core.folder_seal import check_folder, digests, seal_folder
from lightning_peft.core.gathering import of_the_first
from lightning_peft.core.run import canonical
from lightning_peft.training import patches
from lightning_peft.training.random_states import gather
from lightning_peft.training.shard_units import wrap_policy


def save_deltas(trainer: L.Trainer, restored: Callable[[], None]) -> None:
    """Patch the trainer's strategy to save and load deltas.

    Args:
        trainer: its strategy is changed on the instance; what saves stays after the run, since
            ``trainer.save_checkpoint`` may come later.
        restored: is called when the model has been loaded and before its optimizers are.
    """
    strategy, table = trainer.strategy, patches.of_run(trainer)
    if ddp_options(strategy).get("static_graph") and trainer.accumulate_grad_batches > 1:
        raise TuningError(
            "static_graph=True learns from the first backward pass, in which accumulate_grad_batches keeps DDP from "
            "taking part, and torch fails: give one of the two up."
        )
    if isinstance(strategy, DeepSpeedStrategy):
        # Its files are written by its engine, which asks for nothing else.
        table.patch(strategy, "exclude_frozen_parameters", True, lasting=True)
        table.patch(strategy, "save_checkpoint", partial(_deepspeed_save_checkpoint, strategy), lasting=True)
        table.patch(strategy, "load_checkpoint", partial(_load_without_frozen, strategy))
    elif isinstance(strategy, FSDPStrategy):
        # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/fsdp.py
        if strategy._state_dict_type == "sharded":
            raise TuningError(
                "FSDP writes deltas as one file: give state_dict_type='full', or take FullyShard (FSDP2)."
            )
        table.patch(strategy, "lightning_module_state_dict", partial(_fsdp_state_dict, strategy), lasting=True)
        table.patch(strategy, "load_checkpoint", partial(_fsdp_load_checkpoint, strategy, trainer))
        ours = {"auto_wrap_policy": wrap_policy, "use_orig_params": True}
        table.patch(strategy, "kwargs", ours | strategy.kwargs)
    elif isinstance(strategy, ModelParallelStrategy):
        table.patch(strategy, "lightning_module_state_dict", partial(_state_dict, strategy), lasting=True)
        table.patch(strategy, "optimizer_state", partial(_optimizer_state, strategy), lasting=True)
        table.patch(strategy, "load_checkpoint", partial(_load_checkpoint, strategy))
        if writes_parts(strategy):
            table.patch(strategy, "save_checkpoint", partial(_save_parts, strategy), lasting=True)
        table.patch(strategy, "load_model_state_dict", partial(_load_model, strategy, trainer, restored))


def ddp_options(strategy: Any) -> dict[str, Any]:
    """Return the options that a strategy gives torch's DDP, if it is one of DDP.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/ddp.py.
    """
    return strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}


def writes_parts(strategy: Any) -> bool:
    """Tell whether a checkpoint of this strategy is a folder to which each rank writes its part.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/model_parallel.py.
    """
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


@torch.no_grad()
def _state_dict(strategy: ModelParallelStrategy) -> dict[str, Tensor]:
    """Return the delta: in parts where each rank writes its own, else whole on rank 0, one tensor at a time.

    What is in no parts is that of rank 0 in both: other ranks may have other statistics of a BatchNorm, and which rank
    writes them is not ours to say.
    """
    module = strategy.lightning_module
    assert module is not None
    state = module.state_dict()
    delta = {canonical(name): state[name] for name in delta_names(module)}
    if writes_parts(strategy):
        return {name: t if sharded.is_part(t) else of_the_first(t.clone()) for name, t in delta.items()}
    gathered = ((name, sharded.whole(tensor)) for name, tensor in delta.items())
    first = strategy.is_global_zero
    return {name: tensor.cpu() for name, tensor in gathered if first}


def _optimizer_state(strategy: ModelParallelStrategy, optimizer: Any) -> dict[str, Any]:
    if writes_parts(strategy):
        return type(strategy).optimizer_state(strategy, optimizer)
    inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return sharded.optimizer_whole(inner.state_dict())


def _load_checkpoint(
    strategy: ModelParallelStrategy, checkpoint_path: Any, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read a checkpoint of any strategy; each rank reads the delta and keeps its part of it."""
    path = strategy.broadcast(str(checkpoint_path))
    return strategy.checkpoint_io.load_checkpoint(path, weights_only=weights_only)


@torch.no_grad()
def _load_model(
    strategy: ModelParallelStrategy,
    trainer: L.Trainer,
    restored: Callable[[], None],
    checkpoint: dict[str, Any],
    **_: Any,
) -> None:
    module = strategy.lightning_module
    assert module is not None
    state = module.state_dict()
    for name in delta_names(module):
        state[name].copy_(sharded.like(state[name], checkpoint["state_dict"][canonical(name)]))
    if trainer.state.fn != "fit":
        return
    if "optimizer_states" not in checkpoint:
        raise KeyError("Trying to restore training state but checkpoint contains only the model.")
    restored()
    for optimizer, saved in zip(strategy.optimizers, checkpoint["optimizer_states"], strict=True):
        optimizer.load_state_dict(sharded.optimizer_part(optimizer, saved))


def _save_parts(
    strategy: ModelParallelStrategy, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
) -> None:
    """Let each rank write its part, and seal the folder."""
    folder = Path(strategy.broadcast(str(filepath)))
    type(strategy).save_checkpoint(strategy, checkpoint, folder, storage_options)
    _seal(strategy, folder)


def _seal(strategy: Any, folder: Path) -> None:
    """Add the checksums of all files to a folder; each rank computes a share of them."""
    strategy.barrier()
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    place = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ranks else (0, 1)
    parts = gather(digests(folder, *place))
    if strategy.is_global_zero:
        seal_folder(folder, parts)
    strategy.barrier()


def _deepspeed_save_checkpoint(
    strategy: DeepSpeedStrategy, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
) -> None:
    """Let the engine write its folder, from which it resumes, and put the whole delta in it, as one file."""
    folder = Path(strategy.broadcast(str(filepath)))
    type(strategy).save_checkpoint(strategy, checkpoint, folder, storage_options)
    module = strategy.lightning_module
    assert module is not None
    with sharded.gathered(p for p in module.parameters() if p.requires_grad):
        if strategy.is_global_zero:
            save_delta(module, folder / IN_FOLDER)
    _seal(strategy, folder)


def _load_without_frozen(strategy: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """Let the strategy read what it has written, in which frozen weights are missing."""
    module = strategy.lightning_module
    assert module is not None
    check_folder(Path(checkpoint_path))
    with patches.patched(module, "strict_loading", False):
        loaded: dict[str, Any] = type(strategy).load_checkpoint(strategy, checkpoint_path, weights_only=weights_only)
        return loaded


def _fsdp_state_dict(strategy: FSDPStrategy) -> dict[str, Tensor]:
    """Return the delta of a module in FSDP's flat units, gathering those that hold something trained, one at a time."""
    assert strategy.model is not None
    found = {
        name: module for name, module in strategy.model.named_modules() if isinstance(module, FullyShardedDataParallel)
    }
    state: dict[str, Tensor] = {}
    for path in sorted(found, key=lambda name: -name.count(".") - bool(name)):  # inner units first
        unit = found[path]
        inner = tuple(
            f"{other}." for other in found if other != path and f"{other}.".startswith(f"{path}.".lstrip("."))
        )
        own = [
            n for n, p in unit.named_parameters() if p.requires_grad and not f"{path}.{n}".lstrip(".").startswith(inner)
        ]
        if not own:
            continue
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            whole = {canonical(name): p for name, p in unit.named_parameters()}
            if strategy.is_global_zero:
                state.update(
                    {canonical(f"{path}.{n}".lstrip(".")): whole[canonical(n)].detach().cpu().clone() for n in own}
                )
    for path, owner in strategy.model.named_modules():
        if strategy.is_global_zero and any(p.requires_grad for p in owner.parameters(recurse=False)):
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py
            transient = owner._non_persistent_buffers_set
            for name, buffer in owner.named_buffers(recurse=False):
                if name not in transient:
                    state[canonical(f"{path}.{name}".lstrip("."))] = buffer.detach().cpu().clone()
    return state


def _fsdp_load_checkpoint(
    strategy: FSDPStrategy, trainer: L.Trainer, checkpoint_path: Any, weights_only: bool | None = None
) -> dict[str, Any]:
    """Load a delta into flat units, for looking at it: FSDP numbers the moments of optimizers in its own way."""
    if trainer.state.fn == "fit":
        raise TuningError(
            "FSDP numbers the state of optimizers in its own way, in which that of a delta has no place: resume with "
            "strategy FullyShard (FSDP2), ddp or on one device, all of which read this file."
        )
    return _load_without_frozen(strategy, checkpoint_path, weights_only)
