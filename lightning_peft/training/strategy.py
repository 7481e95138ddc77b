"""Sharded training: graft first, shard after, and checkpoints that gather the delta and nothing else.

Under `ModelParallelStrategy` (FSDP2) every block of a backbone becomes a unit, its grafts with it, and what remains of
each child of the LightningModule another. A module that shards itself in ``configure_model`` is left as it is: what
methods have added since is sharded beside it, since plain parameters would diverge between the ranks, silently.
"""

from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from lightning_peft.core import sharded
from lightning_peft.core.delta import keep_fingerprints
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.private_torch import replace_tensors
from lightning_peft.core.tuning import tunings
from lightning_peft.training import patches, tensor_parallel
from lightning_peft.training.shard_units import units
from lightning_peft.training.weights import fill, on_meta

# Entries of a transformers model other than forward; torch must gather its parameters for them, too.
_ENTRIES = ("generate", "get_text_features", "get_image_features")
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


class FullyShard(ModelParallelStrategy):
    """FSDP2 over all processes: each holds its part of the weights, and a unit is gathered when it computes.

    With ``tensor_parallel_size`` groups of so many processes split single layers and see the same rows; the units are
    sharded between the groups.

    Args:
        tensor_parallel_size: how many processes, mostly those of one node, compute each layer together.
        tensor_parallel_plan: names of layers (``*``: one part of a name) -> ``colwise`` or ``rowwise``; ``auto``: the
            plan of transformers for the backbone.
        param_dtype: what the gathered parameters are cast to; None: computed in what they are stored in.
        cpu_offload: keep the parts, their gradients and the optimizer in the memory of the host.
        activation_checkpointing: compute a block's activations anew in the backward pass, by transformers' own switch,
            which needs ``backbone_mode="train"``.
        reshard_after_forward: free the gathered units between forward and backward.
        save_distributed_checkpoint: write a folder with a file for each rank instead of one file.
        process_group_backend: e.g. ``nccl`` or ``gloo``; None: that of the device.
        timeout: how long a collective may take before the process ends with an error.
    """

    def __init__(
        self,
        param_dtype: Literal["bf16", "16", "32"] | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        tensor_parallel_size: int = 1,
        tensor_parallel_plan: dict[str, str] | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.options: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
        self.activation_checkpointing = activation_checkpointing
        self.tensor_parallel_size = int(tensor_parallel_size)
        self.tensor_parallel_plan = tensor_parallel_plan
        if cpu_offload:
            self.options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        if param_dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=_DTYPES[param_dtype], reduce_dtype=torch.float32)
            self.options["mp_policy"] = policy

    def setup_environment(self) -> None:
        """Make all processes one data-parallel group, or several that each have a part of every split layer.

        Raises:
            TuningError: the processes do not make up whole groups.
        """
        size = self.tensor_parallel_size
        # Both are read by Lightning's own; how many processes there are, and on what, is known from here on:
        # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/model_parallel.py
        self._data_parallel_size, rest = divmod(self.num_nodes * self.num_processes, size) if size > 0 else (0, 1)
        if rest or not self._data_parallel_size:
            raise TuningError(
                f"tensor_parallel_size={size} does not divide {self.num_nodes} nodes of {self.num_processes} "
                "processes: take a divisor."
            )
        if "offload_policy" in self.options and self.process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms and checkpoints are gathered on the host
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move what is no part of a unit; with ``cpu_offload`` the parts stay where they are."""
        if "offload_policy" not in self.options:
            super().model_to_device()
            return
        assert self.model is not None
        for child in self.model.modules():
            own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
            if not any(sharded.is_part(tensor) for tensor in own):
                replace_tensors(child, lambda tensor: tensor.to(self.root_device), recurse=False)


def shard(module: L.LightningModule, trainer: L.Trainer | None) -> None:
    """Shard a grafted module under `ModelParallelStrategy`; every rank must call it.

    Raises:
        TuningError: the strategy splits tensors, and the module has no plan for that.
    """
    if trainer is not None and isinstance(trainer.strategy, DeepSpeedStrategy):
        keep_fingerprints(module)
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    table, plugin = patches.of_run(trainer), trainer.precision_plugin
    if "configure_model" not in vars(module):  # Lightning wants an overridden one when it sets the strategy up
        table.patch(module, "configure_model", partial(_configured, module))
    if getattr(trainer.strategy, "activation_checkpointing", False):
        checkpoint_activations(module, on=True)
        table.record(module, "activation_checkpointing", partial(checkpoint_activations, module, on=False))
    mesh, tensors = (module.device_mesh[name] for name in ("data_parallel", tensor_parallel.MESH))  # type: ignore[index]
    options: dict[str, Any] = trainer.strategy.options if isinstance(trainer.strategy, FullyShard) else {}
    split = tensor_parallel.split_grafts(module, tensors) if tensors.size() > 1 else set()
    if tensors.size() > 1:
        table.patch(plugin, "clip_grad_by_norm", partial(tensor_parallel.clip_by_norm, plugin))
        tensor_parallel.share_random_state(tensors)
    if any(isinstance(child, FSDPModule) for child in module.modules()):
        sharded.broadcast(p for p in module.parameters() if p.requires_grad and not sharded.is_part(p))
        for place in grafts(module):
            if place.graft in split or any(not sharded.is_part(p) for p in place.graft.parameters()):
                fully_shard(place.graft, mesh=mesh, **options)
    else:
        alone = mesh.size() == 1 < tensors.size() and not options.keys() & {"offload_policy", "mp_policy"}
        _shard_whole(module, trainer, mesh, None if alone else options)
    # Parts cannot be cast any more, and have been.
    table.patch(plugin, "convert_module", _unchanged)
    fill(module, torch.device("cpu") if "offload_policy" in options else trainer.strategy.root_device)
    for parameter in module.parameters():
        if parameter.requires_grad and not sharded.is_part(parameter):
            parameter.register_post_accumulate_grad_hook(partial(_average, mesh.get_group()))


def checkpoint_activations(module: L.LightningModule, on: bool) -> None:
    """Switch transformers' recomputation of block activations on or off."""
    switch = "activation_checkpointing_enable" if on else "activation_checkpointing_disable"
    for _, backbone, _ in tunings(module):
        holders = [child for child in backbone.modules() if getattr(child, "supports_gradient_checkpointing", False)]
        if not holders and on:
            raise TuningError(
                f"{type(backbone).__name__} cannot compute activations anew: give activation_checkpointing=False."
            )
        for holder in holders[:1] if hasattr(backbone, switch) else holders:
            getattr(holder, switch)()


def _shard_whole(module: L.LightningModule, trainer: L.Trainer, mesh: Any, options: dict[str, Any] | None) -> None:
    """Make units of a module that has none; without options it stays as it is, but for what all ranks must agree on."""
    keep_fingerprints(module)
    first = [*(p for p in module.parameters() if p.requires_grad), *module.buffers()]
    sharded.broadcast(tensor for tensor in first if not tensor.is_meta and not sharded.is_part(tensor))
    trainer.precision_plugin.convert_module(module)
    for unit in units(module) if options is not None else ():
        # FSDP2 refuses tensors without dimension (CLIP's temperature), and of one value most ranks would hold nothing.
        scalars = {p for p in unit.parameters() if p.numel() == 1}
        whole: dict[str, Any] = {"ignored_params": scalars} if scalars else {}
        fully_shard(unit, mesh=mesh, **(options or {}), **whole)
        for entry in _ENTRIES:
            if hasattr(unit, entry):
                register_fsdp_forward_method(unit, entry)


def split(module: L.LightningModule, trainer: L.Trainer | None) -> None:
    """Split the layers of a module that has no grafts yet, where the strategy asks for it.

    Raises:
        TuningError: the strategy has no plan, and the module has not parallelized itself.
    """
    size = _tensor_parallel_size(module)
    if size < 2 or tensor_parallel.is_split(module):
        return
    assert trainer is not None
    plan = trainer.strategy.tensor_parallel_plan if isinstance(trainer.strategy, FullyShard) else None
    if plan is None:
        raise TuningError(
            f"tensor_parallel_size={size} needs a plan which tensors to split: take strategy FullyShard, which has "
            f"one, parallelize in {type(module).__name__}.configure_model, or give tensor_parallel_size=1."
        )
    tensor_parallel.parallelize(module, module.device_mesh[tensor_parallel.MESH], plan)  # type: ignore[index]


def goes_first(module: L.LightningModule) -> bool:
    """Tell whether methods must wait for the strategy, which still has to fill the module or to split its layers."""
    size = _tensor_parallel_size(module)
    return (size > 0 and on_meta(module)) or (size > 1 and not tensor_parallel.is_split(module))


def keeps_own_optimizer(module: L.LightningModule) -> bool:
    """Tell whether the optimizers hold other tensors than the parameters: DeepSpeed's flat partitions of them."""
    return _is_under(module, DeepSpeedStrategy)


def is_flat(module: L.LightningModule) -> bool:
    """Tell whether the parameters lie in FSDP's flat units, which a state dict would gather."""
    return _is_under(module, FSDPStrategy)


def _is_under(module: L.LightningModule, kind: type[Strategy]) -> bool:
    try:
        return isinstance(module.trainer.strategy, kind)
    except RuntimeError:  # it is attached to no Trainer
        return False


def _tensor_parallel_size(module: L.LightningModule) -> int:
    """Return how many ranks share a tensor; 0 where the strategy is not of that kind."""
    try:
        strategy = module.trainer.strategy
    except RuntimeError:  # it is attached to no Trainer
        return 0
    if not isinstance(strategy, ModelParallelStrategy):
        return 0
    mesh = module.device_mesh
    return 1 if mesh is None else mesh[tensor_parallel.MESH].size()


def _configured(module: L.LightningModule) -> None:
    """Stands in for ``configure_model`` of a module that has none."""


def _unchanged(module: nn.Module) -> nn.Module:
    return module


def _average(group: Any, parameter: Tensor) -> None:
    """Average the gradient of a parameter that is no part of a unit."""
    assert parameter.grad is not None
    torch.distributed.all_reduce(parameter.grad, group=group)
    parameter.grad /= torch.distributed.get_world_size(group)
