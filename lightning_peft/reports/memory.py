"""Predicts the memory of a process: what it holds under each strategy, and what a step needs besides."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.delta import collect
from lightning_peft.core.tuning import tunings
from lightning_peft.features.activation_memory import tensors_in
from lightning_peft.reports.parameters import size
from lightning_peft.training.shard_units import kept_bytes, plan
from lightning_peft.training.strategy import FullyShard
from lightning_peft.training.strategy_files import ddp_options

_RECORD = 320
"""Bytes that a checkpoint needs for a tensor besides its values: its name, its entry in the archive, its padding."""
_FRAME = 18_000
"""Bytes of a checkpoint that holds no tensors: the loops, the methods, the backbone's fingerprint, random states."""


class Memory(NamedTuple):
    """Bytes of one process.

    Attributes:
        weights: parameters, buffers, and the copies of tensors trained in place that `remove` would give back.
        gradients: of what is trained.
        optimizer: its state.
        communication: what DDP copies gradients to, or what a sharded strategy gathers at once: two units, since the
            next one is fetched while one computes.
        activations: what a step takes besides: what is kept for the backward pass, and what operations return.
    """

    weights: int
    gradients: int
    optimizer: int
    communication: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    def at_peak(self, peak: int) -> "Memory":
        """Return the same with the activations of a step whose peak is ``peak`` bytes."""
        return self._replace(activations=max(peak - self.weights - self.gradients - self.optimizer, 0))

    def __str__(self) -> str:
        parts = [f"{name} {size(value)}" for name, value in self._asdict().items() if value or name != "communication"]
        return ", ".join(parts)


def held(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module, and the values kept to undo its methods."""
    originals = [t for _, _, tuning in tunings(module) for t in tuning.originals.values() if isinstance(t, Tensor)]
    return [*module.parameters(), *module.buffers(), *originals]


def before_step(module: nn.Module, optimizers: Iterable[Optimizer], batch: Any) -> list[Tensor]:
    """Return the tensors that are there when a step begins."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [*held(module), *gradients, *states(optimizers), *tensors_in(batch)]


def states(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the tensors of the optimizers' states."""
    of_parameters = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in of_parameters for value in state.values() if isinstance(value, Tensor)]


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages; those that share one count once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def file_bytes(module: nn.Module, optimizers: Iterable[Optimizer]) -> int:
    """Return the predicted bytes of a checkpoint: the delta, the optimizer's state, and what names them."""
    delta, state = list(collect(module).values()), states(optimizers)
    return stored_bytes(delta) + stored_bytes(state) + _RECORD * (len(delta) + len(state)) + _FRAME


def of_one_process(module: nn.Module, optimizers: Iterable[Optimizer]) -> Memory:
    """Return the memory of a process that holds the whole model."""
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return Memory(stored_bytes(held(module)), gradients, stored_bytes(states(optimizers)))


def of_rank(module: nn.Module, one: Memory, chosen: Any, ranks: int) -> Memory:
    """Return the memory of each of ``ranks`` processes under a strategy, where one alone would have ``one``.

    Args:
        module: the tuned module, not sharded, perhaps on the meta device.
        one: what a single process takes; its activations are those of each process.
        chosen: the Trainer's strategy, or its name.
        ranks: the number of processes.
    """
    name = chosen if isinstance(chosen, str) else type(chosen).__name__
    if isinstance(chosen, ModelParallelStrategy | FSDPStrategy) or name.startswith("fsdp"):
        parameters = list(module.parameters())
        units = plan(module, ranks)
        inside = sum(row[1] for row in units)
        rest = max(one.weights - inside, 0)  # buffers, and what stands outside of all units
        gathered = sorted((row[1] for row in units), reverse=True)
        options = chosen.options if isinstance(chosen, FullyShard) else {}
        together = gathered if options.get("reshard_after_forward") is False else gathered[:2]
        trained = [p for p in parameters if p.requires_grad]
        share = _share(trained, ranks)
        shards = sum(row[2] for row in units) + rest
        sharded = Memory(shards, round(one.gradients * share), round(one.optimizer * share), sum(together))
        if "offload_policy" in options:  # its parts, their gradients and the optimizer lie in the memory of the host
            sharded = Memory(rest, 0, 0, sum(together))
        return sharded._replace(activations=one.activations)
    if isinstance(chosen, DeepSpeedStrategy) or name.startswith("deepspeed"):
        stage = _stage(chosen, name)
        weights, gradients, optimizer = (-(-value // ranks) for value in one[:3])
        return one._replace(
            weights=weights if stage == 3 else one.weights,
            gradients=gradients if stage >= 2 else one.gradients,
            optimizer=optimizer if stage >= 1 else one.optimizer,
        )
    if ranks > 1:
        in_place = ddp_options(chosen).get("gradient_as_bucket_view")
        return one._replace(communication=0 if in_place else one.gradients)
    return one


def _share(trained: list[nn.Parameter], ranks: int) -> float:
    """Return which part of what is trained a rank holds."""
    return sum(kept_bytes(p, ranks) for p in trained) / max(sum(p.nbytes for p in trained), 1)


def _stage(chosen: Any, name: str) -> int:
    digits = [int(character) for character in name if character.isdigit()]
    config = getattr(chosen, "config", None)
    if isinstance(config, dict):
        return int(config.get("zero_optimization", {}).get("stage", 0))
    return digits[0] if digits else 2
