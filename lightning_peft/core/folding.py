"""Folding what methods have added into the weights of the backbone."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.core import placement
from lightning_peft.core.computed_weights import check_is_parameter
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, detach, grafts, overrides
from lightning_peft.core.master_weights import MasterWeights
from lightning_peft.core.quantized import dense, has_quantized_weight, is_quantized, with_float_weight
from lightning_peft.core.run import unwrapped
from lightning_peft.core.tuning import tunings

_log = logging.getLogger(__name__)


class Folding(Graft):
    """A graft whose effect can be folded into its host's parameters, for good (`merge`) or for a while (`LoRA.merge`).

    While it is folded in, its joints return what they get.
    """

    folds: tuple[str, ...] = ("weight",)
    """The parameters that take it in, by their names below the host; those that the host lacks are left out."""

    def __init__(self) -> None:
        super().__init__()
        self._originals: dict[str, Tensor] = {}

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return ``value``, of fp32 or more, with the effect in it; it may be written to."""
        raise NotImplementedError

    def cannot_fold(self, host: nn.Module) -> str | None:
        """Say why the parameters of this host cannot take in the effect; None: they can."""
        return None

    def folded(self, host: nn.Module) -> list[str]:
        """Return the names of the parameters that take in the effect."""
        parameters = dict(host.named_parameters())
        return [name for name in self.folds if name in parameters]

    @torch.no_grad()
    def merge(self, host: nn.Module, keep: bool = False) -> float:
        """Put the effect into the parameters of the host, computed in fp32 or more and rounded once.

        Args:
            host: the graft's host.
            keep: keep the values that the parameters had, so that `unmerge` can give them back.

        Returns:
            The greatest rounding error of a parameter as a share of what was added to it, both as Euclidean norms:
            0 for parameters of fp32, and about 2^-9 |W| / |change of W| for those of bf16.

        Raises:
            TuningError: a weight is quantised.
        """
        if self.merged:
            return 0.0
        parameters = {name: host.get_parameter(name) for name in self.folded(host)}
        for parameter in parameters.values():
            if is_quantized(parameter):
                raise TuningError(
                    f"a quantised weight ({type(parameter).__name__} of {type(host).__name__}) cannot take in an "
                    "update: lightning_peft.merge(model, dequantize=True) makes it a float first."
                )
        worst = 0.0
        for name, parameter in parameters.items():
            if keep:
                self._originals[name] = parameter.detach().clone()
            worst = max(worst, self._write(name, parameter, parameter.detach(), host))
        self.merged = True
        return worst

    @torch.no_grad()
    def unmerge(self, host: nn.Module) -> None:
        """Give the parameters of the host the values that they had, bit for bit.

        Raises:
            TuningError: they were not kept.
        """
        if self.merged and not self._originals:
            raise TuningError(
                f"{type(self).__name__} was merged into {type(host).__name__} without keeping the weights: load the "
                "backbone anew, or merge with keep=True."
            )
        for name, original in self._originals.items():
            parameter = host.get_parameter(name)
            parameter.copy_(original.to(parameter.device))
        self._originals.clear()
        self.merged = False

    @torch.no_grad()
    def merge_as_float(self, host: nn.Module) -> tuple[nn.Module, float]:
        """Put the effect into the dequantised weight; return the layer that has it, the host if it can, and the error.

        Raises:
            TuningError: the layer is of a class that this cannot replace by a plain one.
        """
        quantised = dense(host)
        dtype = getattr(host, "compute_dtype", None) or quantised.dtype
        weight = nn.Parameter(quantised.to(dtype, copy=True), requires_grad=False)
        error = self._write("weight", weight, quantised, host)
        layer: nn.Module = host
        if type(host) is nn.Linear:
            host.weight = weight
        else:
            layer = with_float_weight(host, weight)
        for name in self.folded(layer):
            if name != "weight":
                error = max(error, self._write(name, layer.get_parameter(name), layer.get_parameter(name), host))
        self.merged = True
        return layer, error

    def _write(self, name: str, parameter: nn.Parameter, value: Tensor, host: nn.Module) -> float:
        wide = torch.promote_types(value.dtype, torch.float32)
        with _full_fp32():
            exact = self.fold(name, value.to(wide), host)  # fp32 is written to where it stands
        if wide is value.dtype:
            parameter.copy_(exact)
            return 0.0
        change = torch.linalg.vector_norm(exact - value).item()
        parameter.copy_(exact)
        error = torch.linalg.vector_norm(exact - parameter).item()
        return error / change if change else 0.0


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Let products of fp32 be of fp32: ``set_float32_matmul_precision`` may round their factors to TF32 or bf16."""
    # torch has it for each library since 2.9, and refuses that both ways are mixed.
    backends = [part.matmul for part in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(part, "matmul")]
    ways = [(backend, "fp32_precision", "ieee") for backend in backends if hasattr(backend, "fp32_precision")]
    with ExitStack() as stack:
        for backend, name, exact in ways:
            stack.callback(setattr, backend, name, getattr(backend, name))
            setattr(backend, name, exact)
        if not ways:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def merge(module: nn.Module, dequantize: bool = False, safe: bool = False) -> nn.Module:
    """Fold the grafts of ``module`` into the weights and forget them; what was trained in place stays as trained.

    Deltas that rest are removed. Where weights are in half precision, what rounding took of the update is logged.

    Args:
        module: holds one or more tuned backbones.
        dequantize: whether quantised weights that are to take in an update may become floats, for good.
        safe: refuse a result that is not finite in the dtype of the weights.

    Raises:
        TuningError: a graft cannot be folded, or ``safe`` finds no finite result; nothing has been changed then.
    """
    whole, module = module, unwrapped(module)
    masters = [place for place in grafts(module) if isinstance(place.graft, MasterWeights)]
    places, worst, layers = foldable(module, dequantize), 0.0, dict(module.named_modules())
    if safe:
        _check_finite(places)
    for place in list(grafts(module)):
        if place.graft.rests:
            detach(place.host, place.name)
    for path, host, name, graft in [*places, *masters]:
        error = None
        if isinstance(graft, Folding) and dequantize and has_quantized_weight(host):
            layer, error = graft.merge_as_float(host)
            if layer is not host:
                parent, _, leaf = path.rpartition(".")
                setattr(layers[parent], leaf, layer)
        else:
            error = graft.merge(host)
        worst = max(worst, error or 0.0)
        detach(host, name)
    for _, backbone, tuning in list(tunings(module)):
        tuning.end(backbone)
    if worst:
        _log.warning("Merging into half precision rounded away %.1f %% of the update, where it was most.", 100 * worst)
    return whole


@torch.no_grad()
def folded_values(host: nn.Module, own: Sequence[Graft]) -> dict[str, Tensor]:
    """Return the parameters that grafts of a host fold into, as they would be afterwards; nothing is changed.

    Args:
        host: of the grafts.
        own: in the order in which they are folded.
    """
    values: dict[str, Tensor] = {}
    for graft in own:
        for name in graft.folded(host) if isinstance(graft, Folding) else graft.weights:
            value = values.get(name)
            if value is None:
                value = dense(host) if name == "weight" and has_quantized_weight(host) else host.get_parameter(name)
                value = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            values[name] = graft.fold(name, value, host) if isinstance(graft, Folding) else graft("weight", value, name)
    return values


def _check_finite(places: Sequence[Grafted[Graft]]) -> None:
    """Check that what grafts fold into a host is finite in the dtype of its weights."""
    for host in dict.fromkeys(place.host for place in places):
        own = [place for place in places if place.host is host]
        for name, value in folded_values(host, [place.graft for place in own]).items():
            dtype = value.dtype if has_quantized_weight(host) else host.get_parameter(name).dtype
            if not value.to(dtype).isfinite().all():
                raise TuningError(
                    f"{own[0].path}.{name} would not be finite in {dtype}: merge into a backbone of fp32, or take an "
                    "earlier file of a delta that diverged."
                )


def foldable(module: nn.Module, dequantize: bool = False, owner: str | None = None) -> list[Grafted[Graft]]:
    """Return the grafts of ``module`` that methods have put there, in the order in which they fold into the weights.

    Args:
        module: holds one or more tuned backbones.
        dequantize: whether quantised weights may become floats.
        owner: the name of the method whose grafts are wanted; None: those of all.

    Raises:
        TuningError: one cannot be folded, its weight is quantised, is computed, or is tied to that of another module.
    """
    every = (place for place in grafts(module, owner) if not isinstance(place.graft, MasterWeights))
    places = [place for place in every if not place.graft.rests]
    owners = Counter(id(p) for child in module.modules() for p in child.parameters(recurse=False))
    for place in places:
        if not overrides(place.graft, "merge"):
            raise TuningError(
                f"{type(place.graft).__name__} at {place.path or 'the root'} computes what no weight can, so it cannot "
                "be merged: keep the delta beside the backbone."
            )
        if isinstance(place.graft, Folding) and (why := place.graft.cannot_fold(place.host)) is not None:
            raise TuningError(f"{place.path} {why}, so it cannot be merged: keep the delta beside the backbone.")
        tied = any(owners[id(p)] > 1 for p in place.host.parameters(recurse=False))
        if tied and not place.graft.folds_ties:
            raise TuningError(
                f"the weight of {place.path} is tied to that of another module, which would change with it: "
                "keep the delta beside the backbone."
            )
        if isinstance(place.graft, Folding):
            placement.check_readable(place.host, "merging")
            if not has_quantized_weight(place.host):
                for name in place.graft.folds:
                    check_is_parameter(place.host, name, "it cannot take in an update", f"{place.path}.{name}")
        if has_quantized_weight(place.host) and not dequantize:
            kind = type(place.host.weight).__name__
            raise TuningError(
                f"the weight of {place.path} is quantised ({kind}), so it cannot take in an update: "
                "merge(model, dequantize=True) makes these layers floats, or keep the delta beside the backbone."
            )
    # A layer runs with its changed weights; what scales its input scales these with all that others have added to them.
    return sorted(places, key=lambda place: (overrides(place.graft, "before"), not overrides(place.graft, "weight")))
