"""Diff-pruning: a sparse difference to every weight is learnt, ``theta = theta_0 + delta``.

First each tensor has ``delta = z * z_g * w``: w dense and zero at the start, z a hard-concrete gate for each entry and
z_g one for the whole tensor, its group. What is added to the loss is the expected number of entries that are not zero,
``penalty * sum_g sum_i P(z_i > 0) P(z_g > 0)``. Then the entries of greatest ``|delta|`` are kept, exactly
``round(sparsity * d)`` of them over all tensors, and for the rest of the fit their values alone are trained.

A checkpoint of the first part holds w and the gates, with which it resumes bit for bit; one of the second part, and the
delta in the end, holds the indices and values of what was kept, 8 bytes an entry.

Source: Guo et al. 2021, arXiv 2012.07463, section 3. Where the authors' code (``run_glue_diffpruning.py``) differs
from the paper we follow the paper: its penalty adds the group's probability once where the paper multiplies by it; its
projection bisects a threshold, which overshoots the budget at ties, where we take the k greatest; its final delta is
one sample of the noise, ours has the gates of inference, which draw nothing. The head is trained densely, in all three.
The noise of a step is one sample for all processes, whatever the rest of their random state.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.core import anatomy
from lightning_peft.core.arguments import bounded, natural, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach, grafts
from lightning_peft.core.rates import EVERYTHING, Rates
from lightning_peft.core.reach import unreached
from lightning_peft.core.stand_in import readers
from lightning_peft.training import checks
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.training.param_groups import advance
from lightning_peft.updates.sparse_difference import Gates, Noise, SparseDifference, Twin, draw_seed


@dataclass(eq=False, kw_only=True)
class DiffPruning(Method):
    """Train a sparse difference to all weights of the backbone, ``theta = theta_0 + z * z_g * w``.

    Args:
        sparsity: share of the entries that may differ from the pretrained ones in the end, between 0 and 1.
        penalty_weight: what an entry that is not zero costs in the loss.
        structured: give each tensor a gate of its own beside those of its entries.
        alpha: the logits of all gates at the start.
        alpha_lr: learning rate of the logits; None: that of the group that they are in.
        low: lower end l of the interval that the gates are stretched to, negative.
        high: its upper end r, above 1.
        prune_steps: after how many steps of the optimizer the entries to keep are chosen.
        prune_epochs: after how many epochs; with neither of the two, after half of the fit.
        backbone_mode: whether dropout of the frozen backbone is active in training; in the paper it is.
    """

    backbone_mode: Literal["train", "eval"] = "train"
    sparsity: float = bounded(0.005, "is no share of the entries", above=0, below=1)
    penalty_weight: float = bounded(1.25e-7, at_least=0)
    structured: bool = True
    alpha: float = 5.0
    alpha_lr: float | None = positive(0.1)
    low: float = -1.5
    high: float = 1.5
    prune_steps: int | None = natural(None, "leaves no time to learn what to keep")
    prune_epochs: int | None = natural(None, "leaves no time to learn what to keep")

    kind: ClassVar[str] = "weights"
    trains: ClassVar[str] = "a sparse difference to all weights"
    paper: ClassVar[str] = "Guo et al. 2021, arXiv 2012.07463"
    advised: ClassVar[Rates] = EVERYTHING
    shards: ClassVar[bool] = False
    may_change: ClassVar[frozenset[str]] = Method.may_change | {
        "sparsity", "penalty_weight", "alpha_lr", "prune_steps", "prune_epochs"
    }  # fmt: skip

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Give each parameter of the backbone but those of the head a difference."""
        self._check()
        others = {id(p) for place_ in grafts(backbone) for p in place_.graft.parameters()} | {
            id(backbone.get_parameter(name)) for name in anatomy.head_names(backbone)
        }
        every = backbone.named_parameters(remove_duplicate=False)
        kept = self._kept(name for name, p in every if id(p) not in others and p.is_floating_point())
        kept -= unreached(backbone)
        if not kept:
            raise TuningError(f"exclude={self.exclude!r} leaves no parameter to tune: let it name fewer.")
        for other, _, name, graft in grafts(backbone):
            if not graft.rests and (
                taken := sorted(kept & {f"{other}.{weight}".lstrip(".") for weight in graft.weights})
            ):
                raise TuningError(
                    f"{name} puts another tensor in the place of {taken[0]} already, to which a difference may not "
                    "fit: apply DiffPruning first, or exclude that tensor."
                )
        first: dict[int, tuple[SparseDifference, str]] = {}
        noise, gates = Noise(), Gates(self.alpha, self.low, self.high, self.structured)
        number = 0
        for path, host, own in readers(backbone):
            mine = {leaf: p for leaf, p in own.items() if f"{path}.{leaf}".lstrip(".") in kept}
            new = {leaf: number + i for i, leaf in enumerate(n for n, p in mine.items() if id(p) not in first)}
            number += len(new)
            if new:
                added = attach(host, SparseDifference(host, new, noise, gates), self.key)
            twins = {leaf: first[id(p)] for leaf, p in mine.items() if leaf not in new}
            for leaf, (owner, other) in twins.items():
                attach(host, Twin({leaf: other}, owner), f"{self.key}_{leaf.replace('.', '_')}")
            first |= {id(mine[leaf]): (added, leaf) for leaf in new}
        attach(backbone, noise, f"{self.key}_noise")
        return ()

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Give the gates their learning rate and no weight decay."""
        if self.alpha_lr is None or not name.endswith(("_alpha", "_group")) or f".{self.key}." not in f".{name}":
            return {}
        return {"lr": self.alpha_lr, "weight_decay": 0.0}

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return ``penalty_weight * sum_g sum_i P(z_i > 0) P(z_g > 0)``, [1], or None once entries are chosen."""
        counts = [count for graft, name in self._differences(module) if (count := graft.expected(name)) is not None]
        return self.penalty_weight * torch.stack([c.to(counts[0]) for c in counts]).sum() if counts else None

    def groups(self, model: nn.Module) -> int:
        """Return how many tensors have a gate of their own."""
        return len(list(self._differences(model)))

    def achieved(self, model: nn.Module) -> float:
        """Return the share of entries that differ from the pretrained ones, as is expected while gates are trained."""
        entries = changed = 0.0
        for place_ in self.own_grafts(model, SparseDifference):
            for name in place_.graft.weights:
                entries += place_.host.get_parameter(name).numel()
                expected = place_.graft.expected(name)
                values = place_.graft.part(name, "values")
                changed += expected.item() if expected is not None else 0 if values is None else values.numel()
        return changed / entries

    @torch.no_grad()
    def project(self, model: nn.Module) -> int:
        """Keep the ``round(sparsity * d)`` entries of greatest ``|delta|``, exactly; return how many.

        Raises:
            TuningError: the method is not applied, or they have been chosen before.
        """
        backbone = self._tuned(model)
        pairs = list(self._differences(backbone))
        if not self.is_dense(backbone):
            raise TuningError("the entries to keep have been chosen already: project once.")
        sizes = [graft.part(name, "w").numel() for graft, name in pairs]
        budget = max(1, round(self.sparsity * sum(sizes)))
        best = [_magnitudes(graft, name).topk(min(budget, n)) for (graft, name), n in zip(pairs, sizes, strict=True)]
        owner = torch.cat([torch.full_like(top.indices, i) for i, top in enumerate(best)])
        chosen = torch.cat([top.values for top in best]).topk(budget).indices
        flat = torch.cat([top.indices for top in best])[chosen]
        owner = owner[chosen]
        for i, (graft, name) in enumerate(pairs):
            graft.keep(name, flat[owner == i].sort().values)
        return budget

    def is_dense(self, model: nn.Module) -> bool:
        """Tell whether the gates are still trained.

        Raises:
            TuningError: the method is not applied.
        """
        return any(graft.is_dense() for graft, _ in self._differences(model))

    def expect(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take the form of the saved tensors: dense, or with the entries that were kept."""
        for place_ in self.own_grafts(backbone, SparseDifference):
            graft = place_.graft
            for name in graft.weights:
                start = f"{place_.full_name}.{name.replace('.', '_')}_"
                values = tensors.get(f"{start}values")
                parameter = place_.host.get_parameter(name)
                if values is not None:
                    indices = torch.zeros(values.shape, dtype=tensors[f"{start}indices"].dtype, device=parameter.device)
                    graft.make_sparse(name, indices, torch.zeros(values.shape, device=parameter.device))
                elif f"{start}w" in tensors:
                    if graft.part(name, "w") is None:
                        graft.make_dense(name, parameter)
                elif any(other.endswith("_values") for other in tensors):  # nothing of it was kept
                    graft.make_sparse(name, torch.zeros(0), torch.zeros(0))

    # Its life in a Trainer.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the method, and see that the parameters can be exchanged in the middle of the fit.

        Raises:
            TuningError: the strategy shards parameters.
        """
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise TuningError(
                f"DiffPruning exchanges its parameters in the middle of a fit, which {type(trainer.strategy).__name__} "
                "cannot follow: use strategy='ddp' or one device."
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the fit has steps after the projection."""
        super().on_train_start(trainer, pl_module)
        backbone = self._tuned(pl_module)
        self._is_dense, self._project_at = self.is_dense(backbone), self._step_of_projection(trainer)
        self._noise(backbone).is_given = True
        total = trainer.estimated_stepping_batches
        if self._is_dense and not self._project_at < total:
            raise TuningError(
                f"the entries to keep would be chosen after step {self._project_at} of {total}, so never: set "
                "max_epochs, lower prune_steps or prune_epochs, or train longer."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the entries to keep when it is time, and give all processes one seed for the noise."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._is_dense:
            return
        backbone = self._tuned(pl_module)
        if trainer.global_step >= self._project_at:
            self._exchange(trainer, pl_module, backbone)
            return
        value = draw_seed()
        self._noise(backbone).give(trainer.strategy.broadcast(value) if trainer.world_size > 1 else value)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the noise be drawn in the forward pass again, and say so if the fit ended before the projection."""
        backbone = self._tuned(pl_module)
        self._noise(backbone).is_given = False
        if self.is_dense(backbone):
            rank_zero_warn(
                "the fit ended before the entries to keep were chosen, so the delta is dense: resume it, or call "
                "project."
            )

    def _noise(self, backbone: nn.Module) -> Noise:
        return cast(Noise, backbone.get_submodule(f"{self.key}_noise"))

    def _exchange(self, trainer: L.Trainer, module: L.LightningModule, backbone: nn.Module) -> None:
        """Train the values of what is kept in place of w and the gates: new optimizers, at the old place of the run."""
        self.project(backbone)
        if trainer.world_size > 1:  # ties may be broken in another way elsewhere
            for graft, name in self._differences(backbone):
                kept = (graft.part(name, "indices"), graft.part(name, "values"))
                first = trainer.strategy.broadcast(
                    tuple(t.detach().cpu() for t in kept) if kept[1] is not None else None
                )
                device = trainer.strategy.root_device
                empty = torch.zeros(0, device=device)
                graft.make_sparse(name, *((t.to(device) for t in first) if first is not None else (empty, empty)))
        module.zero_grad()
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = module  # its wrapper knows the old parameters
            strategy.configure_ddp()
        old = [config.scheduler for config in strategy.lr_scheduler_configs]
        strategy.setup_optimizers(trainer)
        for before, now in zip(old, strategy.lr_scheduler_configs, strict=True):
            advance(before, now.scheduler)
        checks.check_optimizers(module, trainer.optimizers)
        checks.expect_gradients(module)
        self._is_dense = False

    def _step_of_projection(self, trainer: L.Trainer) -> float:
        if self.prune_steps is not None:
            return self.prune_steps
        if self.prune_epochs is not None:
            return self.prune_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        total = trainer.estimated_stepping_batches
        return total if total == math.inf else total // 2

    def _differences(self, model: nn.Module) -> Iterator[tuple[SparseDifference, str]]:
        for place_ in self.own_grafts(model, SparseDifference):
            for name in place_.graft.weights:
                yield place_.graft, name

    def _check(self) -> None:
        if not self.low < 0 or not self.high > 1:
            raise TuningError(f"low={self.low}, high={self.high} must be below 0 and above 1: gates close and open.")
        if self.prune_steps is not None and self.prune_epochs is not None:
            raise TuningError("prune_steps and prune_epochs both say when to choose the entries: give one.")


class DiffPruningMixin(TunedBy[DiffPruning]):
    """For a LightningModule that is tuned by diff-pruning: set ``self.method`` to change its arguments."""

    def sparsity(self) -> float:
        """Return the share of entries that differ from the pretrained ones, as is expected while gates are trained."""
        method, module = self._owned()
        return method.achieved(module)


def _magnitudes(graft: SparseDifference, name: str) -> Tensor:
    delta = graft.delta(name)
    assert delta is not None
    return delta.reshape(-1).abs()
