"""Makes the loss of an optimizer step a mean over its tokens, however these are cut into batches and ranks.

Lightning averages the means of the batches that it accumulates, and DDP those of the ranks: a token of a short batch
counts for more than one of a long batch. Here the loss of each batch is weighted with its tokens before the backward
pass, and when all tokens of the step are known, its gradients are divided by their number, before they are clipped.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.core.errors import TuningError
from lightning_peft.core.sharded import is_part
from lightning_peft.training import patches


class LossByToken(L.Callback):
    """The loss of a step is the sum over its tokens, divided by their number over all accumulated batches and ranks.

    ``training_step`` says how many tokens a batch has. It returns either ``(loss_sum, num_tokens)``, or a mapping whose
    ``loss`` is the mean over ``num_tokens``; both numbers are those of this batch on this rank. Penalties that methods
    or hooks add to the loss count once a step. Our own tasks whose loss is a mean over tokens have this callback.

    Gradients are divided in ``on_before_optimizer_step``: a callback that looks at them there comes after this one.
    DeepSpeed, which accumulates by itself, keeps the mean over batches.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self._unit: float | None = None
        self._all: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the module's ``training_step`` tell how many tokens its loss is of, and its backward pass heed them.

        Raises:
            TuningError: the module optimizes by itself.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise TuningError(
                f"{type(pl_module).__name__} sets automatic_optimization=False, so that only it knows which batches "
                "make a step: divide by the tokens there, or leave the optimization to the Trainer."
            )
        table = patches.of_run(trainer)
        for name, function in (("training_step", self._step), ("on_before_backward", self._weigh)):
            earlier = patches.inherited(pl_module, vars(pl_module).get(name), name)
            table.patch(pl_module, name, partial(function, pl_module, earlier))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with no tokens."""
        self._tokens = self._all = self._unit = None
        if trainer.strategy.handles_gradient_accumulation and _parts(trainer) > 1:
            rank_zero_warn(
                f"{type(trainer.strategy).__name__} accumulates gradients by itself: the loss of a step is the mean "
                "over its batches, not over its tokens."
            )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Divide the gradients by the tokens of the step."""
        tokens, self._all = self._all, None
        if tokens is None:
            return
        assert self._unit is not None
        tokens = trainer.strategy.reduce(tokens, reduce_op="sum")
        factor = _parts(trainer) * self._unit / tokens.clamp(min=1)
        for group in optimizer.param_groups:
            for gradient in (p.grad for p in group["params"] if p.grad is not None):
                own = gradient.to_local() if is_part(gradient) else gradient
                own.mul_(factor.to(own.device))

    def _step(self, module: L.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``training_step``; its result is one that Lightning takes."""
        self._tokens, out = None, step(*args, **kwargs)
        if isinstance(out, tuple):
            out = _as_mapping(out, module)
        if isinstance(out, Mapping) and "num_tokens" in out:
            self._tokens = torch.as_tensor(out["num_tokens"], device=module.device).detach().float()
        elif out is not None:
            raise TuningError(
                f"training_step of {type(module).__name__} does not say of how many tokens its loss is, which "
                "LossByToken divides by: let it return (loss_sum, num_tokens)."
            )
        return out

    def _weigh(self, module: L.LightningModule, hook: Callable[..., Any], loss: Tensor) -> None:
        """Stands in for the module's ``on_before_backward``, which comes after those of callbacks."""
        hook(loss)
        trainer = module.trainer
        if self._tokens is None or _parts(trainer) == 1 or trainer.strategy.handles_gradient_accumulation:
            return
        if self._unit is None:
            self._unit = _unit(trainer, self._tokens)
        loss.mul_((self._tokens / self._unit).to(loss.dtype))
        self._all = self._tokens if self._all is None else self._all + self._tokens


def _parts(trainer: L.Trainer) -> int:
    """Return by how many a step's sum of losses is divided: Lightning's batches, times the ranks."""
    return trainer.accumulate_grad_batches * trainer.world_size


def _unit(trainer: L.Trainer, tokens: Tensor) -> float:
    """Return a power of two near the tokens of a batch, the same on each rank.

    Losses keep their size, by which half precision is scaled, and a power of two rounds nothing away.
    """
    mean = float(trainer.strategy.reduce(tokens.clone(), reduce_op="mean"))
    return 2.0 ** round(math.log2(max(mean, 1)))


def _as_mapping(out: tuple[Any, ...], module: L.LightningModule) -> dict[str, Any]:
    """Return the loss that Lightning shows, a mean, and the number of tokens.

    Raises:
        TuningError: there are not two values.
    """
    if len(out) != 2:
        raise TuningError(
            f"training_step of {type(module).__name__} returns {len(out)} values: let it return (loss_sum, num_tokens)."
        )
    total, count = out
    return {"loss": total / torch.as_tensor(count, device=total.device).clamp(min=1), "num_tokens": count}
