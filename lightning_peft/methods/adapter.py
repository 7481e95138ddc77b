"""Adapters: a small bottleneck network is trained in each block, ``A(x) = x + s U act(D x + b1) + b2``.

* ``houlsby``: after the output projection of both sublayers, before the residual sum; all LayerNorms are trained too.
* ``pfeiffer``: in the feed-forward sublayer alone, norms frozen. Where the norm comes after the residual sum (BERT),
  ``y = LN(U act(D LN(f + x)) + f + x)``: the norm is applied twice, and the residual is what went into it. Elsewhere
  (ViT, GPT-2, Llama, T5) ``y = x + A(f)``, as in the ViT adapters of VPT.
* ``parallel``: beside the feed-forward sublayer, ``y = x + f(x') + s U act(D x')`` with x' what the sublayer reads.

Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1; Pfeiffer et al. 2021, arXiv 2005.00247; parallel: He et al.
2022, arXiv 2110.04366; code: google-research/adapter-bert, adapter-hub/adapters.

The serial adapters of the paper come after the dropout that follows the projection. In today's models that dropout is a
module of its own in some families, shared by both sublayers or a function in others, so ours come before it: the same
function wherever dropout is off, and with it the adapter's whole output is dropped, not its input alone. Where a block
scales its sublayers (DINOv2), they come after the scale, which may be 1e-5. The paper draws D and U from a normal
distribution of std 1e-2, cut at two std; its code says 1e-3. We draw D so and start U at zero, which makes the start
the frozen model; ``zero_up=False`` is the paper. D must not be zero as well: then nothing but b2 would ever learn.

What adapter-hub's code does otherwise: it draws D and U from N(0, 0.02) (of its parallel form D as torch draws a linear
layer, and U zero), so that ``pfeiffer`` does not start at the frozen model; its bottleneck is width / 16
(``reduction=16``), of the parallel form width / 2 with ``scale=4``, the numbers of He et al.; its ``houlsby`` takes
swish, the code of Houlsby et al. GELU, as here. Where norms come first its ``pfeiffer`` reads ``f + x``, the sum that
it is added to; the paper has no such block, and there we read f, as VPT's code does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn
from transformers.activations import ACT2FN

from lightning_peft.core import anatomy, select, structure, sublayers
from lightning_peft.core.arguments import choice, natural, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.core.sublayers import width_of
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.bottleneck import AroundNorm, Bottleneck, Parallel, ParallelResidual, Serial

_SUBLAYERS: tuple[sublayers.Kind, ...] = ("attention", "ffn")


@dataclass(eq=False, kw_only=True)
class Adapter(Method):
    """Train bottleneck networks inside the blocks.

    Args:
        form: 'houlsby' in both sublayers, with the norms trained; 'pfeiffer' in the feed-forward sublayer; 'parallel'
            beside it.
        bottleneck: size m of the bottleneck, or one for each block.
        reduction: give m as width / reduction instead, e.g. 16.
        activation: name of an activation of transformers; None: 'gelu' for houlsby, else 'relu'.
        init_std: standard deviation of D, cut at two std.
        zero_up: start U at zero, so that training starts at the frozen model; False: draw it as D.
        scale: the factor s.
        train_norms: train the norms of the whole backbone; None: for houlsby alone.
        leave_out: blocks that get no adapter, negative ones counted from the end.
        cross_attention: put adapters after cross-attentions too.
        target_modules: the output projections that get a serial adapter, as suffixes or one regex; None: by their role.
        backbone_mode: whether dropout of the frozen backbone is active in training.
    """

    form: Literal["houlsby", "pfeiffer", "parallel"] = choice("houlsby", "is no form of adapter")
    bottleneck: int | list[int] = natural(64, "is no size of a bottleneck")
    reduction: float | None = positive(None)
    activation: str | None = None
    init_std: float = positive(1e-2, "leaves D at zero, so that nothing but a bias would learn")
    zero_up: bool = True
    scale: float = positive(1.0)
    train_norms: bool | None = None
    leave_out: list[int] = field(default_factory=list)
    cross_attention: bool = False
    target_modules: list[str] | str | None = None
    backbone_mode: Literal["train", "eval"] = "train"

    kind: ClassVar[str] = "modules"
    trains: ClassVar[str] = "bottleneck networks in the blocks (houlsby, pfeiffer, parallel), and the norms"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751"
    advised: ClassVar[Rates] = Rates(3e-3, 1e-2, MEASURED, Rates(9e-3, 3e-2, DIGITS))
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"init_std", "zero_up"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the bottlenecks; return the names of the norms that are trained."""
        self._check()
        indices = self._indices(backbone)
        chosen = self.without_excluded(dict(self._places(backbone, indices)))
        if self.target_modules is None:
            chosen = {name: chosen[name] for name in reached(backbone, chosen)}
        if not chosen:
            raise TuningError(
                f"exclude={self.exclude!r} leaves no place for an adapter in {type(backbone).__name__}: exclude less."
            )
        for name, (host, kind, width) in chosen.items():
            size = self._size(indices.get(_block_of(indices, name) or ""), width, backbone)
            activation = self.activation or ("gelu" if self.form == "houlsby" else "relu")
            attach(host, kind(host, width, size, activation, self.init_std, self.zero_up, self.scale), self.key)
        self._norms: set[str] = set()
        if self.train_norms if self.train_norms is not None else self.form == "houlsby":
            self._norms = set(reached(backbone, anatomy.norm_names(backbone)))
        return self._norms

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Ask for no weight decay of norms and of the biases of the bottlenecks, as in the authors' code."""
        free = name in self._norms or name.endswith((f"{self.key}.down.bias", f"{self.key}.up.bias"))
        return {"weight_decay": 0.0} if free else {}

    def _check(self) -> None:
        if self.activation is not None and self.activation not in ACT2FN:
            raise TuningError(f"activation={self.activation!r} is unknown{select.near(self.activation, ACT2FN)}.")
        if self.target_modules is not None and self.form != "houlsby":
            raise TuningError(
                f"target_modules names hosts of serial adapters, form={self.form!r} finds its own: leave one of them."
            )

    def _indices(self, backbone: nn.Module) -> dict[str, int]:
        """Return the name of each block that gets an adapter with its index in its list."""
        lists = anatomy.blocks(backbone)
        if not lists and self.target_modules is not None and not self.leave_out and isinstance(self.bottleneck, int):
            return {}
        if not lists:
            raise TuningError(
                f"{type(backbone).__name__} has no list of blocks to find the places of adapters in: name linear "
                "layers with target_modules=, and leave leave_out= and a list of bottleneck= out."
            )
        longest = max(len(entries) for entries in lists.values())
        for layer in self.leave_out:
            if not -longest <= layer < longest:
                raise TuningError(
                    f"leave_out has {layer}, but {type(backbone).__name__} has blocks 0 to {longest - 1}."
                )
        if not isinstance(self.bottleneck, int) and any(len(e) != len(self.bottleneck) for e in lists.values()):
            sizes = ", ".join(str(len(entries)) for entries in lists.values())
            raise TuningError(
                f"bottleneck has {len(self.bottleneck)} sizes, {type(backbone).__name__} {sizes} blocks: "
                "give one for each, or one number for all."
            )
        kept = {
            name: i
            for entries in lists.values()
            for i, (name, _) in enumerate(entries)
            if i not in {layer % len(entries) for layer in self.leave_out if -len(entries) <= layer < len(entries)}
        }
        if not kept:
            raise TuningError(f"leave_out={self.leave_out} leaves no block for an adapter: leave out fewer.")
        return kept

    def _size(self, index: int | None, width: int, backbone: nn.Module) -> int:
        if self.reduction is None:
            return self.bottleneck if isinstance(self.bottleneck, int) else self.bottleneck[index or 0]
        if width < self.reduction:
            raise TuningError(
                f"reduction={self.reduction} of width {width} is no size of a bottleneck in {type(backbone).__name__}: "
                f"take up to {width}."
            )
        return int(width // self.reduction)

    def _places(
        self, backbone: nn.Module, indices: dict[str, int]
    ) -> Iterable[tuple[str, tuple[nn.Module, type[Bottleneck], int]]]:
        """Yield the name of each host with the host, the kind of its adapter and the width that it works on."""
        inside = {
            name: module
            for name, module in anatomy.without_grafts(backbone).items()
            if (not indices or _block_of(indices, name) is not None)
            and (self.cross_attention or not any(select.has_role(p, "cross_attention") for p in _parts(name)))
        }
        if self.target_modules is not None:
            linears = {name: module for name, module in inside.items() if width_of(module)}
            for pattern, names in select.match(linears, self.target_modules).items():
                if not names:
                    raise TuningError(
                        f"{pattern!r} matches no linear layer {'in the blocks ' if indices else ''}of "
                        f"{type(backbone).__name__}"
                        f"{select.near(pattern, linears)}."
                    )
                for name in names:
                    yield name, (inside[name], Serial, width_of(inside[name]))
            return
        seen: set[int] = set()  # a block may share a layer with others (Zamba)
        for block in indices:
            for name, module, kind, width in self._in_block(backbone, block, inside):
                if id(module) not in seen:
                    seen.add(id(module))
                    yield name, (module, kind, width)
        if not seen:
            raise TuningError(
                f"{type(backbone).__name__} has no output projection of its sublayers under a known name, and no "
                "sublayers of tokens in its blocks: use form='houlsby' with target_modules=."
            )

    def _in_block(
        self, backbone: nn.Module, block: str, inside: dict[str, nn.Module]
    ) -> Iterable[tuple[str, nn.Module, type[Bottleneck], int]]:
        """Yield the hosts in one block, each with its name, the kind of its adapter and its width."""
        here = [name for name in inside if name.startswith(f"{block}.")]
        ends = {kind: sublayers.ends(backbone, block, kind, self.cross_attention) for kind in _SUBLAYERS}
        if self.form == "parallel":
            for place in ends["ffn"]:
                name, (module, kind, width) = _beside(inside, place.name, backbone)
                yield name, module, kind, width
            return
        for sublayer in _SUBLAYERS if self.form == "houlsby" else ("ffn" if ends["ffn"] else "attention",):
            norms = [name for name in here if select.has_role(name, "post_norm") and self.form == "pfeiffer"]
            scales = [name for name in here if select.has_role(name, f"{sublayer}_scale")]
            chosen = [(name, inside[name], width) for name in norms or scales if (width := width_of(inside[name]))]
            for name, module, width in chosen or ends[sublayer]:
                yield name, module, AroundNorm if norms else Serial, width


AdapterMixin = TunedBy[Adapter]


def _beside(
    inside: dict[str, nn.Module], name: str, backbone: nn.Module
) -> tuple[str, tuple[nn.Module, type[Bottleneck], int]]:
    """Return the host of the parallel adapter of the feed-forward sublayer whose output projection is ``name``."""
    parent = name.rpartition(".")[0]
    around = inside.get(parent)
    width = width_of(inside[name])
    if around is not None and any(
        child.startswith(f"{parent}.") and select.has_role(child, "intermediate") for child in inside
    ):
        kind: type[Bottleneck] = Parallel
    elif around is not None and _adds_second(around):
        kind = ParallelResidual
    else:
        raise TuningError(
            f"{type(backbone).__name__} has no module around its feed-forward sublayer at {name}, so that nothing can "
            "be put beside it: use form='pfeiffer'."
        )
    return parent, (around, kind, width)


def _adds_second(module: nn.Module) -> bool:
    """Tell whether a module takes what it computes on and a residual, which it adds before its norm, as BERT's does."""
    normed = any(isinstance(child, nn.LayerNorm) for child in module.children())
    return normed and len(structure.arguments_of(module)) == 2


def _block_of(indices: dict[str, int], name: str) -> str | None:
    return next((block for block in indices if name.startswith(f"{block}.")), None)


def _parts(name: str) -> list[str]:
    return name.split(".")
