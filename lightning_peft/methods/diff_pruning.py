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
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_peft import select
from lightning_peft.errors import TuningError
from lightning_peft.folding import Folding
from lightning_peft.graft import attach, grafts
from lightning_peft.method import Method
from lightning_peft.mixin import MethodMixin
from lightning_peft.training import lifecycle
from lightning_peft.training.param_groups import schedulers_in
from lightning_peft.updates.hard_concrete import ExpectedCount, Masked, Scattered, gate, place, scatter, uniform_op

_SEEDS = 2**31 - 1


class Noise(Folding):
    """Draws, before each forward pass of the backbone in training, the seed of the noise of all gates."""

    folds = ()

    def __init__(self) -> None:
        super().__init__()
        self.value = 0
        self.seed = torch.zeros(1, dtype=torch.int64)  # the same number, for compiled graphs; no buffer, to stay on CPU
        self.is_given = False  # a Trainer gives it, the same to all processes

    def around(self, forward: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Draw a seed and run the forward pass."""
        if self.training and not self.is_given:
            if torch.compiler.is_compiling():
                self.seed = torch.randint(_SEEDS, (1,))
            else:
                self.give(int(torch.randint(_SEEDS, ()).item()))
        return forward(*args, **kwargs)

    def give(self, value: int) -> None:
        """Set the seed."""
        self.value = value
        self.seed = torch.full((1,), value)


class SparseDifference(Folding):
    """Lets its host read ``theta_0 + delta`` in place of its own parameters.

    For a parameter ``weight`` it has, dense, ``weight_w`` and ``weight_alpha`` in its shape and ``weight_group`` [1],
    or, sparse, ``weight_values`` [n] and the flat ``weight_indices`` [n]; neither if nothing of it was kept.

    Args:
        host: the module.
        names: of the host's parameters, with their numbers in the model, which their noise depends on.
        noise: the seed.
        settings: the method's arguments.
    """

    def __init__(self, host: nn.Module, names: Mapping[str, int], noise: Noise, settings: "DiffPruning") -> None:
        super().__init__()
        self.weights = self.folds = tuple(names)
        self.numbers = dict(names)
        self.low, self.high = settings.low, settings.high
        vars(self)["_noise"] = noise  # no child, since it lies in the backbone already
        for name in names:
            self.make_dense(name, host.get_parameter(name), settings)

    def make_dense(self, name: str, parameter: Tensor, settings: "DiffPruning") -> None:
        """Give a parameter w, zero, and open gates."""
        self._forget(name)
        new = {"dtype": torch.float32, "device": parameter.device}
        self._put(name, "w", torch.zeros(parameter.shape, **new))  # type: ignore[call-overload]
        self._put(name, "alpha", torch.full(parameter.shape, settings.alpha, **new))  # type: ignore[call-overload]
        if settings.structured:
            self._put(name, "group", torch.full((1,), settings.alpha, **new))  # type: ignore[call-overload]

    def make_sparse(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Keep of a parameter's difference these entries alone, and train their values."""
        self._forget(name)
        if len(indices):
            self._put(name, "values", values.detach().clone())
            # int32 in files; what has more entries needs more
            self.register_buffer(_key(name, "indices"), indices)

    def part(self, name: str, part: str) -> Any:
        """Return a tensor that belongs to a parameter, or None."""
        return getattr(self, _key(name, part), None)

    def is_dense(self) -> bool:
        """Tell whether gates are trained."""
        return any(self.part(name, "w") is not None for name in self.weights)

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return ``theta_0 + delta`` in the shape and dtype of ``w``."""
        dense, values = self.part(name, "w"), self.part(name, "values")
        if self._merged or (dense is None and values is None):
            return w
        if values is not None:
            indices = self.part(name, "indices")
            if torch.compiler.is_compiling():
                return scatter(w, values, indices)
            return Scattered.apply(w, values, indices)
        alpha, group = self.part(name, "alpha"), self.part(name, "group")
        noise: Noise = vars(self)["_noise"]
        number = 2 * self.numbers[name]
        if torch.compiler.is_compiling():
            return self._traced(w, dense, alpha, group, noise.seed if self.training else None, number)
        seed = place(noise.value, number) if self.training else None  # place(seed, 1) is that of the group
        return Masked.apply(w, dense, alpha, group, seed, self.low, self.high)

    def delta(self, name: str) -> Tensor | None:
        """Return the difference to a parameter as at inference, dense or as it is kept; None: there is none."""
        if self.part(name, "values") is not None:
            return self.part(name, "values")
        w, group = self.part(name, "w"), self.part(name, "group")
        if w is None:
            return None
        delta = gate(self.part(name, "alpha"), None, self.low, self.high).mul_(w)
        return delta if group is None else delta.mul_(gate(group, None, self.low, self.high))

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Add the difference to the parameter."""
        delta = self.delta(name)
        if delta is None:
            return value
        indices = self.part(name, "indices")
        return value.add_(delta) if indices is None else scatter(value, delta, indices)

    def _traced(
        self, w: Tensor, dense: Tensor, alpha: Tensor, group: Tensor | None, seed: Tensor | None, number: int
    ) -> Tensor:
        """Return the same in operations that a compiler sees through; it fuses them, and chooses what to keep."""
        value = dense
        for i, logits in enumerate((alpha, group)):
            if logits is not None:
                shift = logits
                if seed is not None:
                    shift = logits + uniform_op(logits.detach(), seed, number + i).logit()
                value = value * (torch.sigmoid(shift) * (self.high - self.low) + self.low).clamp(0, 1)
        return (w + value).to(w.dtype)

    def _put(self, name: str, part: str, values: Tensor) -> None:
        self.register_parameter(_key(name, part), nn.Parameter(values))

    def _forget(self, name: str) -> None:
        for part in ("w", "alpha", "group", "values", "indices"):
            if hasattr(self, _key(name, part)):
                delattr(self, _key(name, part))


class Twin(Folding):
    """Lets a host read a tied parameter as another host does.

    Args:
        names: name of the parameter here -> its name there.
        first: the graft of the other host.
    """

    def __init__(self, names: Mapping[str, str], first: SparseDifference) -> None:
        super().__init__()
        self.weights = self.folds = tuple(names)
        self.names = dict(names)
        vars(self)["_first"] = first  # no child, so that its parameters have one name

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return what the other graft makes of the parameter."""
        return vars(self)["_first"].weight(w, self.names[name])


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
    sparsity: float = 0.005
    penalty_weight: float = 1.25e-7
    structured: bool = True
    alpha: float = 5.0
    alpha_lr: float | None = 0.1
    low: float = -1.5
    high: float = 1.5
    prune_steps: int | None = None
    prune_epochs: int | None = None

    kind: ClassVar[str] = "weights"
    trains: ClassVar[str] = "a sparse difference to all weights"
    paper: ClassVar[str] = "Guo et al. 2021, arXiv 2012.07463"
    shards: ClassVar[bool] = False
    may_change: ClassVar[frozenset[str]] = Method.may_change | {
        "sparsity", "penalty_weight", "alpha_lr", "prune_steps", "prune_epochs"
    }  # fmt: skip

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Give each parameter of the backbone but those of the head a difference."""
        self._check()
        others = {id(p) for place_ in grafts(backbone) for p in place_.graft.parameters()} | {
            id(backbone.get_parameter(name)) for name in select.head_names(backbone)
        }
        every = backbone.named_parameters(remove_duplicate=False)
        kept = self._kept(name for name, p in every if id(p) not in others and p.is_floating_point())
        if not kept:
            raise TuningError(f"exclude={self.exclude!r} leaves no parameter to tune: let it name fewer.")
        for other, _, name, graft in grafts(backbone):
            if taken := sorted(kept & {f"{other}.{weight}".lstrip(".") for weight in graft.weights}):
                raise TuningError(
                    f"{name} puts another tensor in the place of {taken[0]} already, to which a difference may not "
                    "fit: apply DiffPruning first, or exclude that tensor."
                )
        first: dict[int, tuple[SparseDifference, str]] = {}
        noise = Noise()
        number = 0
        for path, host, own in _readers(backbone):
            mine = {leaf: p for leaf, p in own.items() if f"{path}.{leaf}".lstrip(".") in kept}
            new = {leaf: number + i for i, leaf in enumerate(n for n, p in mine.items() if id(p) not in first)}
            number += len(new)
            if new:
                added = attach(host, SparseDifference(host, new, noise, self), self.name)
            twins = {leaf: first[id(p)] for leaf, p in mine.items() if leaf not in new}
            for leaf, (owner, other) in twins.items():
                attach(host, Twin({leaf: other}, owner), f"{self.name}_{leaf.replace('.', '_')}")
            first |= {id(mine[leaf]): (added, leaf) for leaf in new}
        attach(backbone, noise, f"{self.name}_noise")
        return ()

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Give the gates their learning rate and no weight decay."""
        if self.alpha_lr is None or not name.endswith(("_alpha", "_group")) or f".{self.name}." not in f".{name}":
            return {}
        return {"lr": self.alpha_lr, "weight_decay": 0.0}

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return ``penalty_weight * sum_g sum_i P(z_i > 0) P(z_g > 0)``, [1], or None once entries are chosen."""
        counts = [count for graft, name in self._differences(module) if (count := _expected(graft, name)) is not None]
        return self.penalty_weight * torch.stack(counts).sum() if counts else None

    def groups(self, model: nn.Module) -> int:
        """Return how many tensors have a gate of their own."""
        return len(list(self._differences(model)))

    def achieved(self, model: nn.Module) -> float:
        """Return the share of entries that differ from the pretrained ones, as is expected while gates are trained."""
        entries = changed = 0.0
        for place_ in grafts(model):
            if isinstance(place_.graft, SparseDifference) and place_.name == self.name:
                for name in place_.graft.weights:
                    entries += place_.host.get_parameter(name).numel()
                    expected = _expected(place_.graft, name)
                    values = place_.graft.part(name, "values")
                    changed += expected.item() if expected is not None else 0 if values is None else values.numel()
        return changed / entries

    @torch.no_grad()
    def project(self, model: nn.Module) -> int:
        """Keep the ``round(sparsity * d)`` entries of greatest ``|delta|``, exactly; return how many.

        Raises:
            TuningError: the method is not applied, or they have been chosen before.
        """
        backbone = select.backbone_of(model, self.backbone)
        pairs = list(self._differences(backbone))
        if not self.is_dense(backbone):
            raise TuningError("the entries to keep have been chosen already: project once.")
        sizes = [graft.part(name, "w").numel() for graft, name in pairs]
        budget = max(1, round(self.sparsity * sum(sizes)))
        best = [_flat(graft, name).abs().topk(min(budget, n)) for (graft, name), n in zip(pairs, sizes, strict=True)]
        owner = torch.cat([torch.full_like(top.indices, i) for i, top in enumerate(best)])
        chosen = torch.cat([top.values for top in best]).topk(budget).indices
        flat = torch.cat([top.indices for top in best])[chosen]
        owner = owner[chosen]
        for i, (graft, name) in enumerate(pairs):
            indices = flat[owner == i].sort().values
            graft.make_sparse(name, _narrow(indices, sizes[i]), _flat(graft, name)[indices])
        return budget

    def is_dense(self, model: nn.Module) -> bool:
        """Tell whether the gates are still trained.

        Raises:
            TuningError: the method is not applied.
        """
        pairs = list(self._differences(model))
        if not pairs:
            raise TuningError(f"DiffPruning is not applied to this {type(model).__name__}: apply it first.")
        return any(graft.is_dense() for graft, _ in pairs)

    def expect(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take the form of the saved tensors: dense, or with the entries that were kept."""
        for place_ in grafts(backbone):
            graft = place_.graft
            if not isinstance(graft, SparseDifference) or place_.name != self.name:
                continue
            for name in graft.weights:
                start = f"{place_.path}.{place_.name}.{name.replace('.', '_')}_".lstrip(".")
                values = tensors.get(f"{start}values")
                parameter = place_.host.get_parameter(name)
                if values is not None:
                    indices = torch.zeros(values.shape, dtype=tensors[f"{start}indices"].dtype, device=parameter.device)
                    graft.make_sparse(name, indices, torch.zeros(values.shape, device=parameter.device))
                elif f"{start}w" in tensors:
                    if graft.part(name, "w") is None:
                        graft.make_dense(name, parameter, self)
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
        """See that the fit has steps after the projection."""
        super().on_train_start(trainer, pl_module)
        backbone = select.backbone_of(pl_module, self.backbone)
        self._is_dense, self._project_at = self.is_dense(backbone), self._step_of_projection(trainer)
        getattr(backbone, f"{self.name}_noise").is_given = True
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
        backbone = select.backbone_of(pl_module, self.backbone)
        if trainer.global_step >= self._project_at:
            self._exchange(trainer, pl_module, backbone)
            return
        noise: Noise = getattr(backbone, f"{self.name}_noise")
        value = int(torch.randint(_SEEDS, ()).item())
        noise.give(trainer.strategy.broadcast(value) if trainer.world_size > 1 else value)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the noise be drawn in the forward pass again, and say so if the fit ended before the projection."""
        backbone = select.backbone_of(pl_module, self.backbone)
        getattr(backbone, f"{self.name}_noise").is_given = False
        if self.is_dense(backbone):
            rank_zero_warn(
                "the fit ended before the entries to keep were chosen, so the delta is dense: resume it, or call "
                "project."
            )

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
            _advance(before, now.scheduler)
        lifecycle.check_optimizers(module, trainer.optimizers)
        self._seen_gradients = self._is_dense = False

    def _step_of_projection(self, trainer: L.Trainer) -> float:
        if self.prune_steps is not None:
            return self.prune_steps
        if self.prune_epochs is not None:
            return self.prune_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        total = trainer.estimated_stepping_batches
        return total if total == math.inf else total // 2

    def _differences(self, model: nn.Module) -> Iterator[tuple[SparseDifference, str]]:
        for place_ in grafts(model):
            if isinstance(place_.graft, SparseDifference) and place_.name == self.name:
                for name in place_.graft.weights:
                    yield place_.graft, name

    def _check(self) -> None:
        if not 0 < self.sparsity < 1:
            raise TuningError(f"sparsity={self.sparsity} is no share of the entries: take more than 0 and less than 1.")
        if not self.low < 0 or not self.high > 1:
            raise TuningError(f"low={self.low}, high={self.high} must be below 0 and above 1: gates close and open.")
        if self.prune_steps is not None and self.prune_epochs is not None:
            raise TuningError("prune_steps and prune_epochs both say when to choose the entries: give one.")
        for name in ("prune_steps", "prune_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TuningError(f"{name}={value} leaves no time to learn what to keep: take 1 or more.")


class DiffPruningMixin(MethodMixin):
    """For a LightningModule that is tuned by diff-pruning: set ``self.method`` to change its arguments."""

    default_method = DiffPruning

    def sparsity(self) -> float:
        """Return the share of entries that differ from the pretrained ones, as is expected while gates are trained."""
        assert isinstance(self.method, DiffPruning)
        return self.method.achieved(self)  # type: ignore[arg-type]


def _readers(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Yield each module that reads parameters in its own forward pass: path, module, name below it -> parameter."""
    inner: set[int] = set()
    for path, module in backbone.named_modules():
        if id(module) in inner:
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention):  # it reads the weights of its projection without a call
            own |= {f"out_proj.{name}": p for name, p in module.out_proj.named_parameters()}
            inner.add(id(module.out_proj))
        if own:
            yield path, module, own


def _key(name: str, part: str) -> str:
    return f"{name.replace('.', '_')}_{part}"


def _expected(graft: SparseDifference, name: str) -> Tensor | None:
    alpha = graft.part(name, "alpha")
    return None if alpha is None else ExpectedCount.apply(alpha, graft.part(name, "group"), graft.low, graft.high)


def _flat(graft: SparseDifference, name: str) -> Tensor:
    delta = graft.delta(name)
    assert delta is not None
    return delta.reshape(-1)


def _narrow(indices: Tensor, size: int) -> Tensor:
    return indices.to(torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64)


def _advance(before: Any, now: Any) -> None:
    """Bring a new scheduler to the step that an old one stands at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # this optimizer has made none
        for old, new in zip(schedulers_in(before), schedulers_in(now), strict=True):
            if not isinstance(new, ReduceLROnPlateau):
                for _ in range(old.last_epoch - new.last_epoch):
                    new.step()
