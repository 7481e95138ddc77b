"""Checks a model without its weights: builds, grafts and runs it on the meta device.

Nothing is stored and nothing is computed there, but shapes and dtypes are what they would be, so parameters, units and
bytes are those of the real run, for a model that fits on no machine at hand.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core import text_structure
from lightning_peft.core.attention_probe import inputs_on_meta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.tuning import tunings
from lightning_peft.features.activation_memory import tensors_in
from lightning_peft.reports.live_memory import LiveBytes
from lightning_peft.reports.memory import Memory, before_step, of_one_process
from lightning_peft.training import checks, lifecycle, precision
from lightning_peft.training.method import Method

COLUMNS = 512
"""How many tokens a text has, at most, where the data do not say how many it may have."""


class Dry(NamedTuple):
    """The result of a step on the meta device.

    Attributes:
        memory: of one process.
        without: the trained parameters that got no gradient.
        fed: what the step was of, for people.
        left_out: why there was no step; '' if there was one.
    """

    memory: Memory
    without: list[str]
    fed: str
    left_out: str = ""


class MetaBytes(LiveBytes):
    """Counts bytes on the meta device, and answers the questions that a forward pass asks of missing values.

    The rows are as they mostly are, of several kinds: of anything there is some (``any``), and not all is alike
    (``all``). So masks are made, since there may be padding, and prompts filled in, since there may be virtual tokens.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__(there)
        self._some: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or answer."""
        # https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml (``Tensor.item``)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return any(args[0].untyped_storage() is tensor.untyped_storage() for tensor in self._some)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket is torch.ops.aten.any:
            self._some.append(out)
        return out


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention on the meta device keep what the fused kernels keep, which torch has for real devices alone.

    The function itself is replaced: a mode of torch would not hold in the backward pass, where activations are computed
    anew.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Fused.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


class _Fused(torch.autograd.Function):
    """Keeps queries, keys, values, the output and a number for each query, and no matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def build_module(module: L.LightningModule, trainer: L.Trainer) -> list[Optimizer]:
    """Apply the methods, store what the precision plugin would, and return the optimizers.

    Args:
        module: was made on the meta device.
        trainer: its callbacks are the methods; it runs nothing.

    Raises:
        TuningError: a method does not fit, an optimizer lacks what is trained, or there are real weights.
    """
    with torch.device("meta"):
        module.configure_model()
    real = next((name for name, p in module.named_parameters() if not p.is_meta), None)
    if real is not None:
        raise TuningError(
            f"{type(module).__name__} has {real} on the {module.get_parameter(real).device.type}: let it take "
            "torch.get_default_device() and build its model by from_config there, or check without --meta."
        )
    life, own = lifecycle.extend_hooks(module), module.configure_callbacks()
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.extend([own] if isinstance(own, L.Callback) else own)
    life.methods.extend(callback for callback in callbacks if isinstance(callback, Method))
    if not life.methods:
        raise TuningError("no method is given, and the task has none: give --method.")
    lifecycle.apply_methods(module)
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        precision.convert_module(module, plugin.convert_module, all(method.keep_fp32 for method in life.methods))
    for method in life.methods:
        method.on_train_epoch_start(trainer, module)  # it sets which modules are in training mode
    module.to("meta")  # what a graft has made of numbers
    # How long the schedule is does not matter, but without data it must be said.
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, 1000
    module.trainer = trainer
    optimizers = lifecycle.optimizers_in(module.configure_optimizers())
    checks.check_optimizers(module, optimizers)
    module.trainer = None
    return optimizers


def two_steps(module: L.LightningModule, optimizers: list[Optimizer], rows: int, columns: int | None) -> Dry:
    """Take two steps on the meta device; the second has the optimizer's state, and its bytes are counted.

    Args:
        module: as `build_module` left it.
        optimizers: its optimizers.
        rows: how many rows the batch has.
        columns: how many tokens a text has; None: half of the model's positions, and no more than 512.

    Raises:
        TuningError: a method does not fit such a batch.
    """
    path, backbone = next((path, backbone) for path, backbone, _ in tunings(module))
    limit = text_structure.max_positions(backbone)
    columns = columns or min(COLUMNS, (limit or 2 * COLUMNS) // 2)
    try:
        peak, fed = 0, ""
        for _ in range(2):
            batch = _batch(module, backbone, rows, columns)
            with MetaBytes(before_step(module, optimizers, batch)) as live, fused_attention():
                fed = _step(backbone, batch, optimizers)
            peak = live.peak
        shape = f"{rows} rows" + (f" of {columns} tokens" if "input_ids" in batch else "")
        memory = of_one_process(module, optimizers).at_peak(peak)
        return Dry(memory, checks.without_gradient(module), f"{fed}, {shape}")
    except TuningError:
        raise
    except Exception as error:  # much of what looks at values, and need not be wrong elsewhere
        why = (str(error).strip().splitlines() or [""])[0]
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()
        return Dry(of_one_process(module, optimizers), [], path, f"{type(error).__name__}: {why[:160]}")


def _batch(module: nn.Module, backbone: nn.Module, rows: int, columns: int) -> dict[str, Tensor]:
    """Return what the methods make of texts or images without content; they may look at the values."""
    empty = inputs_on_meta(backbone, rows, columns, columns)
    batch: Any = {name: torch.ones_like(tensor, device="cpu") for name, tensor in empty.items()}
    for _, _, tuning in tunings(module):
        for method in tuning.methods.values():
            batch = dict(method.prepare(batch))
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}


def _step(backbone: nn.Module, batch: Any, optimizers: list[Optimizer]) -> str:
    """Compute a loss, its gradients and a step; return whose loss it was."""
    out: Any = backbone(**batch)
    logits = out.logits if "logits" in out else next(t for t in tensors_in(out) if t.is_floating_point())
    targets = torch.empty(logits.shape[:-1], dtype=torch.long, device="meta")
    loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return f"{type(backbone).__name__} with the cross-entropy of its output"
