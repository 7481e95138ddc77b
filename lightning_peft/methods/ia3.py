"""IA3: keys, values and the hidden layer of the feed-forward network are rescaled by learnt vectors.

``softmax(q (l_k ∘ k)ᵀ / sqrt(d)) (l_v ∘ v)`` and ``(l_ff ∘ act(x W₁)) W₂``, all l being 1 at the start.

Source: Liu et al. 2022, arXiv 2205.05638, section 3.3. With a gated feed-forward network the authors' code (T-Few,
``configs/ia3.json``) scales the linear branch ``wi_1``; we scale the input of W₂, which is the product of the branches
and so the same, and which networks without a gate have as well. Of a fused projection only the keys and values are
scaled (HF PEFT scales the queries of GPT-2 too); where its name does not tell their order (BLOOM, GPT-NeoX) all of it
is, as by HF PEFT: a scaled query is a scaled key. Weight decay would pull l to 0, so it has none. Channels of
convolutions are scaled where these are named.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.bases.merging import MergingMethod
from lightning_peft.core import anatomy, select, structure, sublayers
from lightning_peft.core.errors import TuningError
from lightning_peft.core.folding import Folding
from lightning_peft.core.graft import attach
from lightning_peft.core.hosts import check_is_real
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.core.reads import may_overwrite, passed_by
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates import in_place
from lightning_peft.updates.layer_update import LINEAR
from lightning_peft.updates.low_rank_layers import CONVOLUTIONS
from lightning_peft.updates.read_layer import ReadLayer

LAYERS = (*LINEAR, *CONVOLUTIONS)
"""What patterns can name; the layers that are chosen without a name are linear."""
_IN_ORDER = r"(?:.*\.)?(?:c_attn|qkv|Wqkv|qkv_proj|qkv_lin)"
_QUERIES_APART = rf"q_attn|{select.ROLES['query']}"


class Scaled(Folding):
    """Multiplies features of a layer, or channels of a convolution, by a vector l, which is 1 at the start.

    Args:
        size: number of features.
        device: of l.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))

    def neutral(self, host: nn.Module, name: str) -> Tensor:
        """Return ones."""
        return torch.ones_like(self.l)


class ScaledOutput(Scaled):
    """Multiplies the last features of a layer's output by l: all of them, or the keys and values of a fused projection.

    Args:
        host: the layer.
        keeps_output: whether the output may be kept for the backward pass, which then nobody may overwrite.
        first: the first feature that is scaled.
    """

    folds = ("weight", "bias")

    def __init__(self, host: nn.Module, keeps_output: bool = True, first: int = 0) -> None:
        super().__init__(_features(host)[0] - first, device_of(host))
        self.first, self.keeps_output = first, keeps_output

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scaled output, [..., out], of a convolution [..., out, *space]."""
        if self.merged:
            return out
        if isinstance(host, CONVOLUTIONS):
            return (out * _along(self.l, host)).to(out.dtype)
        if self.keeps_output and in_place.is_free(out, host, self, self.l):
            return in_place.rescale(out, None, self._whole(), None)
        return (out * self._whole()).to(out.dtype)

    def _whole(self) -> Tensor:
        """Return the factor of each feature, [out]; of those that are not scaled, 1."""
        return self.l if self.first == 0 else torch.cat([self.l.new_ones(self.first), self.l])

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return the rows of the weight, or the bias, times l."""
        l = self._whole().to(value.dtype)  # noqa: E741
        return value.mul_(l if name == "bias" or isinstance(host, Conv1D) else l.view(-1, *[1] * (value.dim() - 1)))


class ScaledInput(Scaled):
    """Multiplies the input of a layer by l."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(_features(host)[1], device_of(host))

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scaled input, [..., in] or [..., in, *space], computed in fp32 and in the dtype of x."""
        return x if self.merged else (x * _along(self.l, host)).to(x.dtype)

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return the columns of the weight times l."""
        l = self.l.to(value.dtype)  # noqa: E741
        if isinstance(host, CONVOLUTIONS):  # the outputs of each group see the inputs of theirs
            rows = l.view(host.groups, -1).repeat_interleave(host.out_channels // host.groups, 0)
            return value.mul_(rows.view(*rows.shape, *[1] * len(host.kernel_size)))
        return value.mul_(l[:, None] if isinstance(host, Conv1D) else l)


@dataclass(eq=False, kw_only=True)
class IA3(MergingMethod):
    """Train vectors that rescale keys, values and the hidden layer of the feed-forward network.

    Args:
        target_modules: layers, linear or convolutions, whose output is scaled: suffixes of module names, or one regex
            for the whole name; None: the key and value projections, or the keys and values of the fused one.
        feedforward_modules: layers whose input is scaled; None: the second of each feed-forward network.
        layers: indices of the blocks to tune, negative ones from the end; None: all.
        backbone_mode: whether dropout of the frozen backbone is active in training.
    """

    backbone_mode: Literal["train", "eval"] = "train"
    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    layers: list[int] | None = None

    kind: ClassVar[str] = "activations"
    trains: ClassVar[str] = "scales of keys, values and feed-forward activations"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638"
    advised: ClassVar[Rates] = Rates(9e-2, 3e-2, MEASURED)

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach a vector to each chosen layer."""
        outputs, inputs = self._keys_and_values(backbone), self._feed_forward(backbone)
        if self.target_modules is None and self.feedforward_modules is None:  # RWKV calls a feed-forward layer value
            outputs = {name: host for name, host in outputs.items() if name not in inputs}
            kept = set(reached(backbone, [*outputs, *inputs]))
            outputs = {name: host for name, host in outputs.items() if name in kept}
            inputs = {name: host for name, host in inputs.items() if name in kept}
        if not outputs and not inputs:
            if self.target_modules is None and self.exclude is None:
                select.by_role(backbone, ["key", "value"], LINEAR)  # says what is missing
            raise TuningError(
                "IA3 is left nothing to scale: name target_modules or feedforward_modules, or exclude less."
            )
        if both := sorted(outputs.keys() & inputs.keys()):
            raise TuningError(
                f"{both[0]} is one of target_modules and of feedforward_modules: scale its output or its input."
            )
        keeps_output = not structure.computes_in_place(backbone)
        read = passed_by(backbone)
        for name, host in (outputs | inputs).items():
            check_is_real(host, name)
        for name, host in outputs.items():
            first = _first_key(backbone, name, host) if self.target_modules is None else 0
            keeps = keeps_output and not may_overwrite(backbone, name)
            self._attach(host, ScaledOutput(host, keeps, first), read.get(name))
        for name, host in inputs.items():
            self._attach(host, ScaledInput(host), read.get(name))
        return ()

    def _attach(self, host: nn.Module, scale: Scaled, reader: tuple[nn.Module, str] | None) -> None:
        """Attach a vector to a layer, or to the module that reads the layer's weight without a call."""
        if reader is None:
            attach(host, scale, self.key)
        else:
            module, layer = reader
            attach(module, ReadLayer(module, layer, scale), f"{self.key}_{layer.replace('.', '_')}")

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Ask for no weight decay of the vectors."""
        own = any(part == self.key or part.startswith(f"{self.key}_") for part in name.split("."))
        return {"weight_decay": 0.0} if own and name.endswith(".l") else {}

    def _keys_and_values(self, backbone: nn.Module) -> dict[str, nn.Module]:
        if self.target_modules == []:
            return {}
        if self.target_modules is not None:
            return self.without_excluded(select.hosts(backbone, LAYERS, self.target_modules, self.layers))
        try:
            patterns = select.by_role(backbone, ["key", "value"], LINEAR)
        except TuningError:  # a network without attention
            return {}
        return self.without_excluded(select.hosts(backbone, LINEAR, patterns, self.layers))

    def _feed_forward(self, backbone: nn.Module) -> dict[str, nn.Module]:
        if self.feedforward_modules == []:
            return {}
        if self.feedforward_modules is not None:
            return self.without_excluded(select.hosts(backbone, LAYERS, self.feedforward_modules, self.layers))
        blocks = [name for entries in anatomy.blocks(backbone).values() for name, _ in entries]
        ends = [place.name for block in blocks for place in sublayers.ends(backbone, block, "ffn", read=True)]
        try:
            every = select.hosts(backbone, LINEAR, "all-linear", self.layers)
        except TuningError:  # none are linear
            return {}
        return self.without_excluded({name: every[name] for name in ends if name in every})


IA3Mixin = TunedBy[IA3]


def _along(scale: Tensor, host: nn.Module) -> Tensor:
    """Return factors in a shape that the input or output of a layer broadcasts."""
    return scale.view(-1, *[1] * len(host.kernel_size)) if isinstance(host, CONVOLUTIONS) else scale


def _features(host: nn.Module) -> tuple[int, int]:
    """Return (out, in), of features or channels; the weight of a quantised layer may be packed."""
    if isinstance(host, nn.Linear):
        return host.out_features, host.in_features
    if isinstance(host, CONVOLUTIONS):
        return host.out_channels, host.in_channels
    inside, out = host.weight.shape  # type: ignore[misc]
    return out, inside


def _first_key(backbone: nn.Module, name: str, host: nn.Module) -> int:
    """Return where the keys begin in the output of a projection: after the queries of a fused one in order, else 0."""
    out, inside = _features(host)
    if not select.has_role(name, "fused_qkv"):
        return 0
    siblings = [child for child, _ in backbone.get_submodule(name.rpartition(".")[0]).named_children()]
    if any(re.fullmatch(_QUERIES_APART, child) for child in siblings):  # GPT-2's cross-attention
        return 0
    return inside if re.fullmatch(_IN_ORDER, name) and inside < out <= 3 * inside else 0
