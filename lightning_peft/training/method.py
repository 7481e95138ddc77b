"""A tuning method as a Lightning callback."""

from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core import select, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.tuning import Tuning
from lightning_peft.training import (
    checkpoint_content,
    checks,
    epoch_metrics,
    finetuning,
    lifecycle,
    modes,
    plain_load,
    precision,
    trainer_hooks,
)
from lightning_peft.training.checkpoint_io import Claim
from lightning_peft.training.record import Life

plain_load.guard()


@dataclass(eq=False, kw_only=True)
class Method(TuningMethod, L.Callback):
    """A `TuningMethod` as a callback of a Trainer, whose checkpoints then hold the delta.

    Use it as a callback, or without a Trainer as ``method.apply(model)``. The arguments are those of `TuningMethod`.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the method as early as the backbone exists, and install the hooks for checkpoints of the delta."""
        checks.check_launcher(trainer)
        checks.check_averaging(trainer, self)
        lifecycle.name_backbone(pl_module, [self, *(m for m in trainer.callbacks if isinstance(m, Method))])  # type: ignore[attr-defined]
        life = lifecycle.extend_hooks(pl_module)
        trainer_hooks.install_hooks(trainer, life, pl_module)
        if not any(other.key == self.key and other.backbone == self.backbone for other in life.methods):
            life.methods.append(self)
        lifecycle.await_backbone(pl_module, trainer)
        lifecycle.apply_methods(pl_module)
        self._assert_same(pl_module)
        finetuning.check_callbacks(pl_module, trainer)
        self._warn_of_others(trainer, pl_module)
        precision.patch_plugin(trainer, self.keep_fp32)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what would train nothing or resume wrongly, before the first batch."""
        self._assert_applied(pl_module)
        self._assert_checkpointing(trainer, pl_module)
        Claim.folders(trainer)
        finetuning.check_callbacks(pl_module, trainer)
        checks.check_averages(pl_module)
        checks.check_optimizers(pl_module, trainer.optimizers)
        checks.expect_gradients(pl_module)
        self._asked = False
        checkpoint_content.remap_optimizers(pl_module, trainer.optimizers)
        checkpoint_content.warn_of_other_conditions(pl_module, trainer)
        checkpoint_content.restore_random_state(pl_module)
        # Lightning warns of modules in eval mode before it calls on_train_start: the modes are set after that.
        if self._leads(trainer, on_backbone=True):
            modes.begin(pl_module, select.backbone_of(pl_module, self.backbone))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on where a run was saved: for one that was saved inside an epoch, none starts."""
        self.on_train_epoch_start(trainer, pl_module)
        checkpoint_content.go_on(pl_module, trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put what is frozen into the mode that the methods ask for, and what is trained into training mode."""
        modes.set_modes(pl_module, select.backbone_of(pl_module, self.backbone), self._trains_frozen(trainer))
        Life.of(pl_module).begin_epoch(pl_module)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add this method's penalty to the loss."""
        self._asked = True
        penalty = self.penalty(pl_module)
        if penalty is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:  # it knows its scale as a tensor, and to ask for the number would wait for the GPU
                penalty = scaler.scale(penalty)
            loss.add_(penalty.to(loss.dtype) / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note that a step begins, and which trained parameters get gradients."""
        Life.of(pl_module).stepping = True
        if self._leads(trainer):
            checks.note_gradients(pl_module, optimizer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, after the first epoch, a trained parameter that has had no gradient."""
        epoch_metrics.close(trainer, Life.of(pl_module).sums)
        checks.check_gradients(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the method is applied."""
        self._assert_applied(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the validation is over, and is not to be done again by a run that resumes from here."""
        Life.of(pl_module).validated = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replace the batch's entries by those of `prepare`; at the start of an epoch, look at the optimizers again."""
        Life.of(pl_module).begin_batch(trainer.global_step, epoch_metrics.marks(trainer))
        if batch_idx == 0:
            finetuning.check_optimized(pl_module, trainer)
        self._enter(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the batch back as it was, and refuse a loss that the penalty was not added to.

        Raises:
            TuningError: the module has called ``loss.backward()``, which tells no callback.
        """
        self._leave()
        Life.of(pl_module).end_batch()
        epoch_metrics.add(trainer, Life.of(pl_module).sums)
        if type(self).penalty is not TuningMethod.penalty and not self._asked and trainer.global_step:
            raise TuningError(
                f"{type(pl_module).__name__} calls loss.backward(), which leaves out the penalty of "
                f"{type(self).__name__}: call self.manual_backward(loss)."
            )

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Replace the batch's entries by those of `prepare`."""
        self._enter(trainer, pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give the batch back as it was."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the batch back as it was."""
        self._leave()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def rates(self, module: L.LightningModule) -> dict[nn.Parameter, float]:
        """Return the learning rates of trained parameters that have one of their own, whatever the module gives."""
        return {}

    def _leads(self, trainer: L.Trainer, on_backbone: bool = False) -> bool:
        """Tell whether this is the first method of the Trainer, or of its backbone, which acts once for all of them."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        methods = [callback for callback in callbacks if isinstance(callback, Method)]
        return next(m for m in methods if not on_backbone or m.backbone == self.backbone) is self

    def _assert_applied(self, module: L.LightningModule) -> None:
        if self.finds_backbone(module) and self.is_applied(module):
            return
        hint = f"no submodule {self.backbone!r}" if self.backbone else "no pretrained transformers model"
        children = ", ".join(name for name, _ in module.named_children()) or "nothing"
        raise TuningError(
            f"{type(module).__name__} has {hint}, so {type(self).__name__} knows no backbone to tune: "
            f"name it with backbone= (it has {children})."
        )

    def _warn_of_others(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Say which methods were applied before and compute, frozen, since they are no callbacks of this Trainer."""
        others = [type(m).__name__ for m in self._others(trainer, module)]
        if others:
            rank_zero_warn(
                f"{' and '.join(others)}, applied to {type(module).__name__} before, computes beside "
                f"{type(self).__name__}, frozen, and is not saved with it: give it as a callback, too, or remove it."
            )

    def _others(self, trainer: L.Trainer, module: L.LightningModule) -> list[TuningMethod]:
        """Return, if this is the first of the callbacks on its backbone, the methods at work that are none."""
        methods = [callback for callback in trainer.callbacks if isinstance(callback, Method)]  # type: ignore[attr-defined]
        methods = [method for method in methods if method.backbone == self.backbone]
        tuning = Tuning.of(select.backbone_of(module, self.backbone)) if self.finds_backbone(module) else None
        if tuning is None or methods[0] is not self:
            return []
        keys = tuning.switch.off.union(*(method.keys for method in methods))
        return [method for key, method in tuning.methods.items() if key not in keys]

    def _assert_same(self, module: L.LightningModule) -> None:
        applied = self.applied(module) if self.finds_backbone(module) else None
        if applied is None or applied is self:
            return
        ours, theirs = self.init_args(), applied.init_args()
        for name in ours.keys() - {"backbone", "backbone_mode"}:
            if ours[name] != theirs[name]:
                raise TuningError(
                    f"{type(self).__name__} is applied to {type(module).__name__} already with "
                    f"{name}={theirs[name]!r}, not {ours[name]!r}: remove it first, or give the same."
                )

    def _trains_frozen(self, trainer: L.Trainer) -> bool:
        """Tell whether a method on this backbone wants what is frozen to be in training mode; one is enough."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        methods = [callback for callback in callbacks if isinstance(callback, Method)]
        return any(method.backbone_mode == "train" for method in methods if method.backbone == self.backbone)

    def _assert_checkpointing(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        backbone = select.backbone_of(module, self.backbone)
        on = structure.recomputing(backbone)
        if on and not self._trains_frozen(trainer):
            raise TuningError(
                f"{type(backbone).__name__} has gradient checkpointing on, which transformers does in training mode "
                f"alone: give {type(self).__name__} backbone_mode='train'."
            )

    def _enter(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        applied = [self.applied_to(module), *self._others(trainer, module)]
        applied = [method for method in applied if type(method).prepare is not TuningMethod.prepare]
        if not applied:
            return
        prepared = batch
        for method in applied:
            prepared = method.prepare(prepared)
        if prepared is batch:  # it may be no mapping
            return
        before = {name: batch.get(name) for name in prepared if prepared[name] is not batch.get(name)}
        self._replaced = batch, before
        batch.update({name: prepared[name] for name in before})

    def _leave(self) -> None:
        batch, before = vars(self).pop("_replaced", ({}, {}))
        for name, value in before.items():
            if value is None:
                del batch[name]
            else:
                batch[name] = value
