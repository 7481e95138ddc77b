"""A method of tuning: what it does to a backbone (`Method.apply`), and its life in a Trainer, as a callback."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import lightning as L
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import select
from lightning_peft.errors import TuningError
from lightning_peft.graft import grafts, is_compiled
from lightning_peft.training import checks, lifecycle, precision, together, trainers
from lightning_peft.training.lifecycle import Life
from lightning_peft.tuning import Tuning

M = TypeVar("M")
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(eq=False, kw_only=True)
class Method(L.Callback):
    """A way to tune a frozen backbone: freezes it, adds what is to be trained, and keeps checkpoints to the delta.

    Use it as a callback of a Trainer, or without Lightning as ``method.apply(model)``. Several methods on one backbone
    add up: the first one freezes. A task head (what lies outside the base model of a model that is no language model)
    is trained beside them.

    Args:
        backbone: where the backbone is in the module, as a dotted name; None: its one pretrained model.
        also_train: a regex for names of further parameters of the backbone to train.
        exclude: a regex for names of modules and parameters that this method leaves alone.
        backbone_mode: whether dropout of the frozen backbone is active in training; BatchNorm statistics never move.
            Of several methods, one that says 'train' is enough.
        keep_fp32: store what trains in fp32 even where the Trainer or the backbone's checkpoint says half precision.
    """

    backbone: str | None = None
    also_train: str | None = None
    exclude: str | None = None
    backbone_mode: Literal["train", "eval"] = "eval"
    keep_fp32: bool = True

    kind: ClassVar[str] = ""
    """What sort of tensors it adds: weights, biases, prompts, head ..."""
    trains: ClassVar[str] = ""
    """What it trains, in a few words, for tables."""
    paper: ClassVar[str] = ""
    """Authors, year and arXiv number."""
    may_change: ClassVar[frozenset[str]] = frozenset({"backbone", "backbone_mode", "keep_fp32"})
    """Arguments that may differ between a delta file and the module that loads it."""
    needs: ClassVar[frozenset[str]] = frozenset({together.GRADIENTS})
    """What it counts on that another method on the same backbone may break; the words are those of `together`."""
    breaks: ClassVar[frozenset[str]] = frozenset()
    """What other methods on the same backbone cannot count on any more."""
    shards: ClassVar[bool] = True
    """Whether it works under strategies that shard parameters."""
    keeps_originals: ClassVar[bool] = True
    """Whether the values of base tensors trained in place are kept, so that `remove` can give them back."""

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach grafts to the frozen backbone; return the names of its own parameters that are to be trained."""
        raise NotImplementedError

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch as the backbone shall see it."""
        return batch

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return what is added to the loss of each training batch, or None."""
        return None

    def expect(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take the form of saved tensors before they are checked and loaded, where a method has several forms.

        Args:
            backbone: the tuned backbone.
            tensors: what was saved of it, by names below the backbone.
        """

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Return what the optimizer shall do otherwise with the trained parameter ``name`` of the backbone.

        ``lr_ratio`` multiplies the learning rate of its group; every other name is an option of the optimizer, such as
        ``lr`` and ``weight_decay``.
        """
        return {}

    @property
    def name(self) -> str:
        """The name of this method's grafts in their hosts."""
        return type(self).__name__.lower()

    def init_args(self) -> dict[str, Any]:
        """Return the arguments that rebuild this method, as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def apply(self, model: nn.Module) -> None:
        """Freeze the backbone of ``model`` and add what this method trains. On any error nothing has changed.

        Raises:
            TuningError: it is applied already, the model is compiled, or the method does not fit the backbone.
        """
        backbone = select.backbone_of(model, self.backbone)
        tuning = Tuning.of(backbone) or Tuning.begin(backbone)
        if self.name in tuning.methods:
            raise TuningError(
                f"{type(self).__name__} is applied to this {type(backbone).__name__} already: once is enough."
            )
        try:
            if is_compiled(model) or is_compiled(backbone):
                raise TuningError(
                    f"{type(backbone).__name__} is compiled and would ignore grafts: compile it afterwards."
                )
            self._check_exclude(backbone)
            trained = self._kept({*self.graft(backbone), *select.head_names(backbone), *self._also(backbone)})
            tuning.add(backbone, self.name, self, trained, self.keeps_originals)
            together.check(backbone, tuning)
        except BaseException:
            tuning.undo(backbone, self.name)
            raise
        if self.keep_fp32:
            precision.hold_fp32(backbone)

    def remove(self, model: nn.Module) -> None:
        """Give the backbone back as it was before `apply`: output, names and ``requires_grad``, bit for bit.

        Raises:
            TuningError: this method is not applied, or it trained tensors in place and kept no copies.
        """
        backbone = select.backbone_of(model, self.backbone)
        tuning = Tuning.of(backbone)
        if tuning is None or self.name not in tuning.methods:
            raise TuningError(
                f"{type(self).__name__} is not applied to this {type(backbone).__name__}: nothing to remove."
            )
        tuning.undo(backbone, self.name)
        precision.release(backbone)

    def is_applied(self, model: nn.Module) -> bool:
        """Tell whether `apply` has been done to ``model``."""
        return self.applied(model) is not None

    def applied(self, module: nn.Module) -> "Method | None":
        """Return the method of this class that is applied to the backbone of ``module``: this one, or its equal."""
        tuning = Tuning.of(select.backbone_of(module, self.backbone))
        return tuning.methods.get(self.name) if tuning is not None else None

    def finds_backbone(self, module: nn.Module) -> bool:
        """Tell whether the backbone is there already; some modules build it in ``configure_model``."""
        if self.backbone is not None:
            return self.backbone in dict(module.named_modules())
        return bool(select.pretrained_models(module))

    # The life in a Trainer, in the order of its hooks.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the method as early as the backbone exists, and see to it that checkpoints hold the delta."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise TuningError(
                "this strategy starts its processes by spawn or fork, from which grafts do not come back: "
                "use strategy='ddp' in a script."
            )
        checks.check_averaging(trainer, self)
        trainers.prepare(trainer, pl_module)
        life = Life.of(pl_module)
        if not any(type(other) is type(self) and other.backbone == self.backbone for other in life.methods):
            life.methods.append(self)
        life.await_backbone(pl_module)
        life.apply(pl_module)
        self._assert_same(pl_module)
        precision.install(trainer.precision_plugin, self.keep_fp32)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what would train nothing or resume wrongly, before the first batch."""
        self._assert_applied(pl_module)
        self._assert_checkpointing(trainer, pl_module)
        trainers.begin(trainer)
        checks.check_optimizers(pl_module, trainer.optimizers)
        lifecycle.remap_optimizers(pl_module, trainer.optimizers)
        lifecycle.restore_random_state(pl_module, trainer.global_rank, mid_epoch=False)
        self._seen_gradients, self._first_epoch = False, trainer.current_epoch
        # Lightning warns of modules in eval mode before it calls on_train_start: the modes are set after that.
        select.backbone_of(pl_module, self.backbone).train()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random state of a run that was saved inside an epoch, for which no epoch starts."""
        self.on_train_epoch_start(trainer, pl_module)
        lifecycle.restore_random_state(pl_module, trainer.global_rank, mid_epoch=True)
        Life.of(pl_module).resumed = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put what is frozen into the mode that the methods ask for, and what is trained into training mode."""
        backbone = select.backbone_of(pl_module, self.backbone)
        backbone.train(self._trains_frozen(trainer))
        for module in backbone.modules():
            trained = [p.requires_grad for p in module.parameters(recurse=False)]
            if isinstance(module, _BATCH_NORM):  # where its bias alone is trained, its statistics stay
                module.training = bool(trained) and all(trained)
            elif any(trained):
                module.training = True
        for place in grafts(backbone):
            place.graft.train()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add this method's penalty to the loss."""
        penalty = self.penalty(pl_module)
        if penalty is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            loss.add_(penalty.to(loss.dtype) * (scale / trainer.accumulate_grad_batches))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, after the first backward pass, a trained parameter that got no gradient."""
        if not self._seen_gradients and pl_module.automatic_optimization:
            checks.check_gradients(pl_module)
        self._seen_gradients = True

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note what gets gradients where the module optimizes by hand, in several backward passes, perhaps."""
        if not pl_module.automatic_optimization and trainer.current_epoch == self._first_epoch:
            checks.note_gradients(pl_module, optimizer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, after the first epoch of manual optimization, a trained parameter that never got a gradient."""
        if not pl_module.automatic_optimization and trainer.current_epoch == self._first_epoch:
            checks.check_noted_gradients(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the method is applied."""
        self._assert_applied(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the backbone see the batch as `prepare` makes it."""
        self._enter(pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the batch back as it was."""
        self._leave(batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the backbone see the batch as `prepare` makes it."""
        self._enter(pl_module, batch)

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
        self._leave(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the trainer's plugins as they were."""
        precision.uninstall(trainer.precision_plugin)
        trainers.release(trainer)

    def _assert_applied(self, module: L.LightningModule) -> None:
        if self.finds_backbone(module) and self.is_applied(module):
            return
        hint = f"no submodule {self.backbone!r}" if self.backbone else "no pretrained transformers model"
        children = ", ".join(name for name, _ in module.named_children()) or "nothing"
        raise TuningError(
            f"{type(module).__name__} has {hint}, so {type(self).__name__} knows no backbone to tune: "
            f"name it with backbone= (it has {children})."
        )

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
        on = any(getattr(child, "gradient_checkpointing", False) for child in backbone.modules())
        if on and not self._trains_frozen(trainer):
            raise TuningError(
                f"{type(backbone).__name__} has gradient checkpointing on, which transformers does in training mode "
                f"alone: give {type(self).__name__} backbone_mode='train'."
            )

    def _enter(self, module: L.LightningModule, batch: Any) -> None:
        if type(self).prepare is Method.prepare:
            return
        applied = self.applied(module)
        assert applied is not None
        prepared = applied.prepare(batch)
        self._batch = {name: batch.get(name) for name in prepared if prepared[name] is not batch.get(name)}
        batch.update({name: prepared[name] for name in self._batch})

    def _leave(self, batch: Any) -> None:
        for name, value in vars(self).pop("_batch", {}).items():
            if value is None:
                del batch[name]
            else:
                batch[name] = value

    def without_excluded(self, modules: dict[str, M]) -> dict[str, M]:
        """Return the modules that ``exclude`` does not name."""
        kept = self._kept(modules)
        return {name: module for name, module in modules.items() if name in kept}

    def _also(self, backbone: nn.Module) -> list[str]:
        if self.also_train is None:
            return []
        names = dict(backbone.named_parameters(remove_duplicate=False))  # a tied weight goes by each of its names
        first = {id(parameter): name for name, parameter in backbone.named_parameters()}
        chosen = [first[id(names[name])] for name in select.match(names, self.also_train)[self.also_train]]
        if not chosen:
            raise TuningError(
                f"also_train={self.also_train!r} matches no parameter of {type(backbone).__name__}"
                f"{select.near(self.also_train, names)}."
            )
        return chosen

    def _check_exclude(self, backbone: nn.Module) -> None:
        names = [name for name, _ in (*backbone.named_modules(), *backbone.named_parameters()) if name]
        if self.exclude is not None and self._kept(names) == set(names):
            raise TuningError(
                f"exclude={self.exclude!r} matches no module or parameter of {type(backbone).__name__}"
                f"{select.near(self.exclude, names)}."
            )

    def _kept(self, names: Iterable[str]) -> set[str]:
        if self.exclude is None:
            return set(names)
        regex = select.compile_pattern(self.exclude)
        return {name for name in names if not regex.fullmatch(name)}
