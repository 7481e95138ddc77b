"""An exponential moving average of the trained parameters alone.

Lightning's averages the whole module: twice the memory of the backbone, and its update ``d p + (1 - d) p`` drifts the
frozen weights by rounding. Here the frozen weights are not touched.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import canonical, trained
from lightning_peft.core.sharded import like, whole
from lightning_peft.training.strategy_files import writes_parts

_CURRENT = "current_model_state"


class DeltaEMA(L.Callback):
    """Averages the trained parameters as ``a <- a + (1 - decay) (p - a)`` after each optimizer step.

    Validation uses the average, checkpoints hold it as the delta (with the current values beside it, for resuming), and
    when fit ends the module keeps it.

    Args:
        decay: how much of the average stays at each step.
        start_step: the optimizer step from which on it averages; before it, the average is the parameter.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise TuningError(f"decay={decay} is no share of the average that stays: give a number from 0 to below 1.")
        self.decay, self.start_step = decay, start_step
        self.average: dict[str, Tensor] = {}
        self._step = 0
        self._is_swapped = self._is_left = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the parameters as they are.

        Raises:
            TuningError: a checkpoint without training state would hold the current values, not the average.
        """
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise TuningError(
                    "ModelCheckpoint(save_weights_only=True) would save what was not validated, since Lightning does "
                    "not ask DeltaEMA then: give save_weights_only=False."
                )
        self._is_swapped = self._is_left = False
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in _named(pl_module).items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average towards the parameters, once for each step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weight = 1 - self.decay if self._step > self.start_step else 1.0
        named = _named(pl_module)
        # https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
        torch._foreach_lerp_([self.average[name] for name in named], [p.detach() for p in named.values()], weight)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the module."""
        self._swap(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parameters back."""
        self._swap(trainer, pl_module)

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module."""
        self._is_left = True
        for name, p in _named(pl_module).items():
            p.detach().copy_(self.average[name])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave it there, too, when a run is resumed that was at its end, which does not train."""
        if not self._is_left:
            self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint's delta be the average."""
        averaged = self.average
        if writes_parts(trainer.strategy):
            raise TuningError("DeltaEMA writes one file: give the strategy save_distributed_checkpoint=False.")
        gathered = {name: whole(tensor).cpu() for name, tensor in averaged.items()}  # all ranks take part
        state = {canonical(name): tensor for name, tensor in checkpoint["state_dict"].items()}
        held = state | {name: tensor for name, tensor in gathered.items() if name in state}
        # During a validation the module has the average, and what is held here is the current values.
        checkpoint[_CURRENT], checkpoint["state_dict"] = (held, state) if self._is_swapped else (state, held)

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the current values and the average of a run that is resumed."""
        if trainer.state.fn != "fit" or _CURRENT not in checkpoint:
            return
        current, averaged = ({canonical(n): t for n, t in checkpoint[k].items()} for k in (_CURRENT, "state_dict"))
        for name, p in _named(pl_module).items():
            self.average[name] = like(p, averaged[name]).detach().to(p.device, p.dtype, copy=True)
            p.detach().copy_(like(p, current[name]))

    def state_dict(self) -> dict[str, Any]:
        """Return the latest step that was averaged."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that step."""
        self._step = state_dict["step"]

    @torch.no_grad()
    def _swap(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._is_swapped = not self._is_swapped
        for name, p in _named(module).items():
            held = p.detach().clone()
            p.detach().copy_(self.average[name])
            self.average[name].copy_(held)


def _named(module: L.LightningModule) -> dict[str, Tensor]:
    return {canonical(name): p for name, p in trained(module).items()}
