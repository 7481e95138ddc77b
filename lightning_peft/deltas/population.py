"""Trains several deltas of one method in one step, on one pass of the frozen backbone."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import LBFGS

from lightning_peft.core import anatomy, arguments, select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import below_backbones, trained
from lightning_peft.core.stand_in import stand_ins
from lightning_peft.core.streams import Stream
from lightning_peft.core.tuning import Tuning
from lightning_peft.deltas.member_steps import MemberSteps
from lightning_peft.deltas.members import Members
from lightning_peft.training.method import Method
from lightning_peft.training.record import Life


@dataclass(eq=False)
class Population(Members):
    """Trains members side by side, each as it would be trained alone: deltas of one method, named NAME_0, NAME_1 ...

    In a training step the frozen backbone runs once, for the rows of all members; the head and the loss are computed
    for each member on its own rows, by the module's own ``training_step``, and added up, so that each gets its own
    gradient. Gradients are clipped for each member. All members see the same batches. The backbone runs once for each
    member where it has dropout of its own, so that each draws what it would alone (``backbone_mode="eval"`` of the
    method turns it off), where methods make sequences of images longer or join the model as a whole, and where the
    model has none below its head, as T5 with its loss.

    Validation and test are run for each member; what they log is there for each, as ``val_loss_NAME_0``, and as the
    mean over all. When the fit is over the best one computes and the others rest.

    Args:
        method: what each of them is.
        size: how many; None: as many as there are seeds, or values in ``vary``.
        seeds: of the initial values and the dropout of each; None: 0, 1, 2 ...
        vary: values of arguments of the method, one for each member, as in ``{"r": [4, 8]}``. ``lr`` is the learning
            rate of all that a member trains but the head, whatever the module gives it.
        monitor: the score of a validation by which the best is named.
        mode: whether the least or the greatest of it is best.
    """

    size: int | None = arguments.natural(None)
    seeds: list[int] | None = None
    vary: dict[str, list[Any]] = field(default_factory=dict)
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        """Take over where the backbone is, and its mode."""
        super().__post_init__()
        self.best: str | None = None
        self.scores: dict[str, float] = {}

    @cached_property
    def members(self) -> list[Method]:
        """The methods of the members.

        Raises:
            TuningError: the numbers of seeds and values differ, or the method has no such argument.
        """
        given = {**({} if self.seeds is None else {"seeds": self.seeds}), **self.vary}
        sizes = {len(values) for values in given.values()} | ({self.size} if self.size else set())
        if len(sizes) != 1 or 0 in sizes:
            said = ", ".join(f"{len(values)} of {name}" for name, values in given.items())
            raise TuningError(
                f"size={self.size} with {said or 'nothing that varies'} does not say how many members there are: give "
                "size=, or as many seeds and values of each argument."
            )
        own = {each.name for each in dataclasses.fields(self.method)} - {"name", "backbone", "backbone_mode"}
        for name in self.vary.keys() - {"lr"} - own:
            raise TuningError(
                f"vary has {name!r}, which is no argument of {type(self.method).__name__}"
                f"{select.near(name, [*own, 'lr'])}."
            )
        rows = [{name: values[i] for name, values in self.vary.items() if name != "lr"} for i in range(max(sizes))]
        base = self.name or self.method.delta
        return [dataclasses.replace(self.method, name=f"{base}_{i}", **row) for i, row in enumerate(rows)]

    @cached_property
    def streams(self) -> list[Stream]:
        """Where each member draws its random numbers from."""
        return [Stream(seed) for seed in self.seeds or range(len(self.members))]

    def rates(self, module: L.LightningModule) -> dict[nn.Parameter, float]:
        """Return the learning rate of what each member trains, the head left out."""
        backbone = self._tuned(module)
        head, found = set(anatomy.head_names(backbone)), {}
        for member, lr in zip(self.members, self.vary.get("lr", ()), strict=False):
            heads = {own for own, base in stand_ins(backbone, member.key).items() if base in head}
            own = self.parameters_of(module, member)
            found.update({p: float(lr) for name, p in own.items() if name not in heads})
        return found

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the members, and let the steps of the module be taken for each of them."""
        super().setup(trainer, pl_module, stage)
        tuning = Tuning.of(self._tuned(pl_module)) if self.finds_backbone(pl_module) else None
        if stage != "predict":
            if tuning is not None:
                self.let_compute(pl_module, None)
            MemberSteps(self).install(trainer, pl_module)
        elif tuning is not None and self.keys <= tuning.switch.off:
            raise TuningError(
                f"none of {', '.join(self.names)} computes, so there is nothing to predict with: "
                f"activate(module, {self.names[0]!r}) first."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what the members would share.

        Raises:
            TuningError: the run trains more than the members, or steps an optimizer for all of them together.
        """
        super().on_fit_start(trainer, pl_module)
        inside, others = below_backbones(pl_module), (Life.of(pl_module).keys or set()) - self.keys
        shared = sorted(others) or [name for name in trained(pl_module) if not inside(name)]
        if shared:
            raise TuningError(
                f"this run trains {shared[0]}, too, which all members would share: let it be a part of the backbone's "
                "head, freeze it, or train the members one by one."
            )
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise TuningError("LBFGS searches along one line for all members together: take AdamW, or another.")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name the best member."""
        super().on_validation_end(trainer, pl_module)
        logged = {name: trainer.callback_metrics.get(f"{self.monitor}_{name}") for name in self.names}
        scores = {name: float(value) for name, value in logged.items() if value is not None}
        if len(scores) == len(logged) and not trainer.sanity_checking:
            self.scores = scores
            self.best = (min if self.mode == "min" else max)(scores, key=scores.__getitem__)
            rank_zero_info(f"{self.best} is the best of {len(scores)}: {self.monitor} {scores[self.best]:.4g}.")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the best member compute."""
        if self.best is not None:
            self.let_compute(pl_module, self.members[self.names.index(self.best)])

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, and where the random numbers are."""
        return {"best": self.best, "scores": self.scores, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` has returned."""
        self.best, self.scores = state_dict["best"], state_dict["scores"]
        super().load_state_dict(state_dict)
