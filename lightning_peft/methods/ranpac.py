"""RanPAC: a head on random features, in closed form, ``W = (G + lambda I)^-1 Q``, for classes that come one by one.

``h = ReLU(f R)`` with R [d, M] drawn once from N(0, 1) and f the frozen features before the head; ``G = sum h hᵀ`` and
``Q = sum h yᵀ`` are over all rows so far, y being one-hot. So W is ridge regression on the rows of all tasks, in
whatever order they came; no row is kept. The sums, R and W are the delta.

Source: McDonnell et al. 2023, arXiv 2307.02251, algorithm 1, and its released code. There M is 10,000: M² numbers are
800 MB, so here it is 2,000 unless you say so. There lambda is chosen anew in each task, from 1e-8 to 1e8, by the last
fifth of the rows of the task; here by each fifth row of all tasks, whose sums are kept apart, so that the order of
tasks does not choose it. There a method may train on the first task: fit that first, and apply RanPAC to the result.
Sums are in double precision. Steps of an optimizer move W, until it is scored or saved, or the epoch ends.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
from torch import nn

from lightning_peft.core.arguments import natural, positive
from lightning_peft.core.batches import entry_of, inputs_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import attach
from lightning_peft.core.run import below_backbones, trained
from lightning_peft.features import heads
from lightning_peft.features.ridge_head import RandomHead
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class RanPAC(Method):
    """Replace the head by one on random features whose weight is ridge regression on all rows so far.

    Args:
        width: M, how many random features there are.
        ridge: lambda; None: chosen from 1e-8 to 1e8 by each fifth row.
    """

    width: int = natural(2000)
    ridge: float | None = positive(None)

    kind: ClassVar[str] = "head"
    trains: ClassVar[str] = "nothing by gradients: a head on random features, in closed form over all tasks"
    paper: ClassVar[str] = "McDonnell et al. 2023, arXiv 2307.02251"

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the head to the layer that gives the logits."""
        _, host = heads.last_linear(backbone, "RanPAC")
        if len(found := heads.head_linears(backbone)) > 1:
            raise TuningError(
                f"the head of {type(backbone).__name__} has {len(found)} layers, and RanPAC reads the features before "
                "a head of one: take MLPHead."
            )
        attach(host, RandomHead(host, self.width, self.ridge), self.key)
        return ()

    def fill(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Add the rows of batches with ``labels``, or of pairs of inputs and labels, to the sums, and solve for W.

        Raises:
            TuningError: there are too few to choose lambda by, or no label for each.
        """
        graft, backbone = self._random_head(model), self._tuned(model)
        with in_eval(backbone):
            for batch in batches:
                graft.labels = entry_of(batch, "labels", 1).to(graft.rows.device)
                backbone(**{name: value.to(graft.rows.device) for name, value in inputs_of(batch, backbone).items()})
        self._solve(model)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the method; the rows of the first epoch are those to add."""
        super().setup(trainer, pl_module, stage)
        self._epoch = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that nothing changes the features.

        Raises:
            TuningError: something does.
        """
        super().on_fit_start(trainer, pl_module)
        mine, below = {id(self._random_head(pl_module).weight)}, below_backbones(pl_module)
        others = [name for name, p in trained(pl_module).items() if id(p) not in mine and below(name)]
        if others:
            raise TuningError(
                f"RanPAC sums over features, which the training of {others[0]} would change: fit that first, and then "
                "RanPAC alone on the result."
            )

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Add the rows of this epoch, the first of a task."""
        self._epoch = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the head the labels of the batch, once for each row."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.current_epoch == self._epoch:
            self._random_head(pl_module).labels = entry_of(batch, "labels", 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Solve for W."""
        super().on_train_epoch_end(trainer, pl_module)
        self._solve(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Solve for W, which is what is scored."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._random_head(pl_module).solve()

    def state_dict(self) -> dict[str, Any]:
        """Return which epoch's rows are added, for a run that resumes inside of it."""
        return {"epoch": vars(self).get("_epoch", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which epoch's rows are added."""
        self._epoch = state_dict["epoch"]

    def _solve(self, model: nn.Module) -> None:
        graft = self._random_head(model)
        if int(graft.rows) < graft.least:
            raise TuningError(f"each fifth row chooses ridge=, and there are {int(graft.rows)}: give ridge= a number.")
        graft.solve()

    def _random_head(self, model: nn.Module) -> RandomHead:
        return self.own_grafts(model, RandomHead)[0].graft

    def _head(self, backbone: nn.Module) -> list[str]:
        """Return nothing: the model's own head is not used."""
        return []


RanPACMixin = TunedBy[RanPAC]
