"""LoRA: a low-rank matrix is trained beside each frozen weight matrix.

``h = W x + s B A dropout(x)``, with A [r, in] random, B [out, r] zero, so that training starts at the frozen model, and
``s = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA. With DoRA the update turns the weight's rows, whose lengths m are
trained apart: ``h = m ∘ (V / ‖V‖) x``, ``V = W + s B A``. LoRA+ gives B a learning rate of its own.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732;
DoRA: Liu et al. 2024, arXiv 2402.09353, sections 4.1 and 4.3; LoRA+: Hayou et al. 2024, arXiv 2402.12354.
The paper draws A from a Gaussian, the authors' code (``loralib/layers.py``) from the Kaiming-uniform U(-1/sqrt(in),
1/sqrt(in)); we follow the code, as everyone has since. For an embedding the code has A zero and B Gaussian. DoRA's
norm is a constant of the gradient, as its section 4.3 proposes and its code does by default.

Where query, key and value are one projection (GPT-2's ``c_attn``), the whole of it is a target, with one A and one B:
the authors' ``MergedLinear`` has factors of the query and of the value alone there. An update of the key costs nothing
to merge, and a file of it is what HF PEFT writes; ``target_modules`` cannot name a third of a matrix. Their layers
merge whenever they are put into eval mode, and take the update out again to train; here `merge` does it once, so that
no rounding gathers in the weights. Rank and alpha have no default there; alpha / r is 2 in their runs on GLUE, as here,
and 8 in those of GPT-2.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start from factors of W and put the rest into the base weight.
Here the base weight stays: what is computed is ``W + s (B A - B₀ A₀)``, the same function and the same gradients. The
factors A₀ and B₀ of the start are part of the delta, since no two machines decompose a matrix alike to the last bit.
As a plain LoRA it has rank 2r: ``graft.factors()`` returns that pair, for whoever writes it to another format.

EVA (Paischer et al. 2024, arXiv 2410.07170) starts A from the directions of most variance in the layer's inputs, over
training batches, and gives the ranks to the directions that explain most of it. A layer has room for ``eva_rho r`` of
them; the rows of A and columns of B that it does not get are zero, have no gradient, and stay zero. So shapes do not
hang on data, and ``s = alpha / r`` is one for all layers, which is what HF PEFT's ``adjust_scaling_factors`` makes of
it. A fit reads its own training batches before the first step; without a Trainer call `initialise`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.bases.merging import MergingMethod
from lightning_peft.core import select, structure
from lightning_peft.core.arguments import bounded, natural, positive, rate
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach, overrides
from lightning_peft.core.hosts import check_is_real
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.reads import may_overwrite
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.explained_variance import directions
from lightning_peft.updates.layout import Layout
from lightning_peft.updates.low_rank import LowRank, shape_of
from lightning_peft.updates.low_rank_init import OF_THE_WEIGHT, Init
from lightning_peft.updates.low_rank_layers import CONVOLUTIONS, GRAFTS
from lightning_peft.updates.low_rank_weights import LowRankWeights
from lightning_peft.updates.targets import Target, targets


@dataclass(eq=False, kw_only=True)
class LoRA(MergingMethod):
    """Train a low-rank update of chosen weight matrices: ``h = W x + (alpha / r) B A x``.

    Args:
        r: rank of the updates.
        alpha: scale of the updates; what is added is divided by r.
        dropout: dropout rate on the input of the update.
        target_modules: suffixes of module names, one regex for the whole name, or 'all-linear' for every linear layer
            inside the blocks; None: the query and value projections, as in the paper (or the fused one). Matrices that
            are read without calling a layer are named as parameters, e.g. ``experts.gate_up_proj``.
        layers: indices of the blocks to tune, negative ones from the end; None: all.
        rank_pattern: suffix of module names -> rank there.
        alpha_pattern: suffix of module names -> alpha there.
        use_rslora: divide alpha by sqrt(r) instead of r.
        use_dora: train the length of each row of a weight apart from its direction.
        init: A and B at the start: 'kaiming' and 'gaussian' draw A and set B to zero; 'pissa' takes the greatest
            singular values of the weight, 'olora' its QR decomposition; 'eva' takes A from the data.
        eva_rho: for 'eva', how many times r the rank of a layer may become; 1: all layers have r.
        svd_iterations: for 'pissa', power iterations of a randomised decomposition, which is much faster for large
            weights (16 in the paper); None: the exact one.
        bias: which biases to train too: 'none', those of the 'lora_only' layers, or 'all' of the backbone.
        lora_plus_ratio: learning rate of B over that of the rest (LoRA+, 16 in the paper); None: the same.
        backbone_mode: whether dropout of the frozen backbone is active in training; in the paper it is.
    """

    backbone_mode: Literal["train", "eval"] = "train"
    r: int = 8
    alpha: float = 16.0
    dropout: float = rate(0.0)
    target_modules: list[str] | str | None = None
    layers: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init: Init = "kaiming"
    eva_rho: float = bounded(2.0, "shares out no rank", at_least=1)
    svd_iterations: int | None = natural(None)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_plus_ratio: float | None = positive(None, "is no ratio of learning rates")

    kind: ClassVar[str] = "weights"
    trains: ClassVar[str] = "low-rank updates of weight matrices (also DoRA, rsLoRA, LoRA+, PiSSA, OLoRA, EVA)"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    advised: ClassVar[Rates] = Rates(2e-3, 3e-2, MEASURED, Rates(6e-3, 9e-2, DIGITS))
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout", "svd_iterations", "lora_plus_ratio"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach a low-rank update to each chosen matrix; return the names of the biases that are trained too."""
        if self.svd_iterations is not None and self.init != "pissa":
            raise TuningError(
                f"svd_iterations={self.svd_iterations} is for init='pissa' (init={self.init!r}): leave it out."
            )
        chosen = self.without_excluded(targets(backbone, tuple(GRAFTS), self.target_modules, self.layers))
        if not chosen:
            raise TuningError(f"exclude={self.exclude!r} leaves nothing of the target modules: let it name fewer.")
        if self.dropout:  # which is on the input of a call
            chosen = {name: target.by_call() for name, target in chosen.items()}
        ranks = by_name(self.rank_pattern, chosen, self.r, "rank_pattern")
        alphas = by_name(self.alpha_pattern, chosen, self.alpha, "alpha_pattern")
        keeps_output = not structure.computes_in_place(backbone)
        read: dict[nn.Module, dict[str, dict[str, Any]]] = {}
        ranks |= self._limited(chosen, ranks)
        for name, target in chosen.items():
            self._check_fit(name, target, ranks[name], alphas[name])
            r, alpha = self._widened(name, target, ranks[name], alphas[name])
            if target.weight is not None:
                scale = alpha / (r**0.5 if self.use_rslora else r)
                arguments: dict[str, Any] = {"r": r, "scale": scale, "use_dora": self.use_dora, "init": self.init}
                arguments["iterations"] = self.svd_iterations
                read.setdefault(target.host, {})[target.weight] = arguments
                continue
            kind = next(graft for kind, graft in GRAFTS.items() if isinstance(target.host, kind))
            keeps = keeps_output and not may_overwrite(backbone, name)
            how = (self.use_rslora, self.use_dora, self.init, self.svd_iterations, keeps)
            attach(target.host, kind(target.host, r, alpha, self.dropout, *how), self.key)
        for host, updates in read.items():
            attach(host, LowRankWeights(host, updates), self.key)
        return self._biases(backbone, chosen)

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Return the learning rate of a B, as a multiple of that of the rest."""
        *path, last = name.split(".")
        is_b = last == "B" and self.key in path
        return {"lr_ratio": self.lora_plus_ratio} if is_b and self.lora_plus_ratio is not None else {}

    def initialise(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int]:
        """Start from the directions of most variance in the inputs of batches; return the rank of each layer.

        Raises:
            TuningError: this is for init='eva', or the batches do not do.
        """
        if self.init != "eva":
            raise TuningError(f"init={self.init!r} needs no data: take init='eva', or leave the batches out.")
        places = {place.path: place for place in self.own_grafts(model, LowRank)}
        layers = {name: (place.host, len(place.graft.A)) for name, place in places.items()}
        asked = by_name(self.rank_pattern, places, self.r, "rank_pattern")
        found = directions(self._tuned(model), layers, sum(asked.values()), batches)
        for name, vectors in found.items():
            places[name].graft.begin(vectors)
        return {name: len(vectors) for name, vectors in found.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on where a run was saved; start a new one from its training batches, where ``init`` says so."""
        super().on_train_start(trainer, pl_module)
        if self.init != "eva" or trainer.global_step:
            return
        loader: Any = trainer.train_dataloader
        with isolate_rng():
            self.initialise(pl_module, loader)

    @property
    def widening(self) -> float:
        """How many times the rank that was asked for the factors of a layer have at most."""
        return self.eva_rho if self.init == "eva" else 1.0 + (self.init in OF_THE_WEIGHT)

    def _widened(self, name: str, target: Target, r: int, alpha: float) -> tuple[int, float]:
        """Return a rank with the room that data may fill, and the alpha that leaves the scale as it is."""
        if self.init != "eva":
            return r, alpha
        if not isinstance(target.host, (nn.Linear, Conv1D)) or target.weight is not None:
            raise TuningError(
                f"init='eva' looks at the inputs of linear layers, and {name} is none that is called: exclude it."
            )
        wide = min(round(r * self.eva_rho), *_shape(target)[1])
        return wide, alpha * ((wide / r) ** 0.5 if self.use_rslora else wide / r)

    def _limited(self, chosen: dict[str, Target], ranks: dict[str, int]) -> dict[str, int]:
        """Return the rank of each matrix that has fewer rows or columns than the rank that was asked for.

        Where the matrix was not chosen by name it is the greatest that it can have, such as 1 for a gate of one row,
        unless no matrix has as much; else it stays, as in HF PEFT, with a warning, since what is more is wasted.
        """
        wide = {name: most for name, target in chosen.items() if ranks[name] > (most := min(_shape(target)[1]))}
        if self.target_modules is None or self.target_modules == "all-linear":
            named = {n for names in select.match(chosen, list(self.rank_pattern)).values() for n in names}
            return {name: most for name, most in wide.items() if name not in named and wide.keys() < chosen.keys()}
        if wide and self.init not in OF_THE_WEIGHT:
            name, most = next(iter(wide.items()))
            rank_zero_warn(
                f"r={ranks[name]} is more than the rank that {name} can have, which is {most} ({len(wide)} such "
                "layers): give it its own by rank_pattern=."
            )
        return {}

    def _check_fit(self, name: str, target: Target, r: int, alpha: float) -> None:
        host = target.host
        shape, limits = _shape(target)
        automatic = self.target_modules in (None, "all-linear") and r == self.r
        if r < 1 or (r > min(limits) and (automatic or self.init in OF_THE_WEIGHT)):
            raise TuningError(f"r={r} does not fit {name} of shape {list(shape)}: choose 1 to {min(limits)}.")
        if not alpha > 0:
            raise TuningError(f"alpha={alpha} at {name} would scale the update away: choose more than 0.")
        if isinstance(host, CONVOLUTIONS) and host.groups > 1:
            self._check_groups(name, host.groups, r)
        check_is_real(host, name)
        active = (g for g in host.children() if isinstance(g, Graft) and not g.rests)
        earlier = next((g for g in active if overrides(g, "after")), None)
        if self.use_dora and earlier is not None:
            raise TuningError(
                f"{type(earlier).__name__} already changes the output of {name}, and use_dora=True sets the magnitude "
                "of what the layer alone computes: apply LoRA first."
            )
        if target.weight is not None and self.dropout:
            raise TuningError(
                f"{name} is read without a call, so dropout={self.dropout} has no input to drop: set dropout to 0 or "
                "exclude it."
            )

    def _check_groups(self, name: str, groups: int, r: int) -> None:
        if r % groups:
            raise TuningError(
                f"{name} is a convolution of {groups} groups, among which r={r} cannot be divided: take a multiple of "
                f"{groups} for it by rank_pattern=, or leave it out."
            )
        if self.use_dora or self.init in OF_THE_WEIGHT:
            raise TuningError(
                f"{name} is a convolution of {groups} groups, whose update is no change of its weight: use_dora=True "
                f"and init={self.init!r} need one, so leave it out."
            )

    def _biases(self, backbone: nn.Module, chosen: dict[str, Target]) -> list[str]:
        last = {name: name.rpartition(".")[2] for name, _ in backbone.named_parameters()}
        every = [name for name, part in last.items() if part == "bias" or part.endswith("proj_bias")]
        if self.bias == "none":
            return []
        if self.bias == "lora_only":
            own = {f"{n}.bias" for n in chosen} | {f"{n.removesuffix('_weight')}_bias" for n in chosen}
            every = [name for name in every if name in own]
        if not every:
            raise TuningError(
                f"{type(backbone).__name__} has no biases that bias={self.bias!r} could train: take bias='none'."
            )
        return every


LoRAMixin = TunedBy[LoRA]


def _shape(target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a matrix or kernel, and the sizes that limit its rank."""
    if target.weight is not None:
        weight = target.host.get_parameter(target.weight).detach()
        return tuple(weight.shape), tuple(Layout.of(target.host, target.weight).matrix(weight).shape[-2:])
    shape = shape_of(target.host)
    return shape, (shape[0], math.prod(shape[1:]))


def by_name(pattern: dict[str, Any], names: Iterable[str], default: Any, argument: str) -> dict[str, Any]:
    """Return a value for each name: that of the pattern that it matches, or the default.

    Raises:
        TuningError: a pattern matches no name.
    """
    values = dict.fromkeys(names, default)
    for suffix, selected in select.match(values, list(pattern)).items():
        if not selected:
            raise TuningError(
                f"{argument} has {suffix!r}, which matches no targeted module{select.near(suffix, values)}."
            )
        values.update(dict.fromkeys(selected, pattern[suffix]))
    return values
