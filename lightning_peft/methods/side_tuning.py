"""Side-tuning: a small network is trained beside the frozen one, ``R(x) = s(a) B(x) + (1 - s(a)) S(x)``.

B is the backbone, S the side network, s the sigmoid, a a trained number that starts at 0, which is the mean of both.

Source: Zhang et al. 2020, arXiv 1912.13503; code: jozhang97/side-tuning ``tlkit/models/sidetune_architecture.py``. The
number has no weight decay, as the code asks: that would pull s(a) to 1/2, not to "off". The backbone runs without a
graph. S is a class of your own, or a narrow copy of the backbone, of random weights, with a projection to its width.
What is blended is what the head reads: the pooler's output where a model with a head has a pooler, else the hidden
states; with ``first_token`` that of the first token alone, as in the side-tuning baseline of VPT.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, cache_argument, compatibility, structure
from lightning_peft.core.arguments import choice, natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.reads import field_read
from lightning_peft.features.narrow import narrow
from lightning_peft.features.side import (
    BesideFrozen,
    base_of,
    check_is_read,
    field_of,
    with_fields,
    without_effect,
)
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

_LEFT_OUT = (*cache_argument.NAMES, "use_cache", "output_hidden_states", "output_attentions", "return_dict", "labels")


class Side(BesideFrozen):
    """Blends the output of its host with that of a network on the same inputs.

    Args:
        host: the frozen model.
        network: the side network.
        projection: brings its output to the width of the host's; None: it has that width.
        blend: which output of the host is blended.
        alpha: initial value of the number a.
    """

    def __init__(
        self, host: nn.Module, network: nn.Module, projection: nn.Linear | None, blend: str, alpha: float
    ) -> None:
        super().__init__(host)
        self.network, self.projection, self.blend = network, projection, blend
        parameters = inspect.signature(type(network).forward).parameters
        self.takes = [name for name in list(parameters)[1:] if name not in _LEFT_OUT]
        self.main = structure.main_input_of(host) or self.names[0]
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device_of(host)))

    def beside(self, out: Any, host: nn.Module, given: dict[str, Any]) -> Any:
        """Return the host's output with the blend in place of one field of it."""
        name = "last_hidden_state" if self.blend == "first_token" else self.blend
        whole = field_of(out, name, host)
        base = whole[:, 0] if self.blend == "first_token" else whole
        side = self._run(given, name)
        if side.shape != base.shape:
            raise TuningError(
                f"the side network {type(self.network).__name__} gives {list(side.shape)} where the {self.blend} of "
                f"{type(host).__name__} is {list(base.shape)}: both must have one shape."
            )
        share = self.alpha.sigmoid()
        blended = (share * base.float() + (1 - share) * side.float()).to(base.dtype)
        if self.blend == "first_token":
            blended = torch.cat([blended[:, None], whole[:, 1:]], 1)
        return with_fields(out, {name: blended})

    def _run(self, given: dict[str, Any], name: str) -> Tensor:
        inputs = {key: given[key] for key in self.takes if given.get(key) is not None}
        if not inputs:  # a network of the user's own, with names of its own
            inputs = {self.takes[0]: given[self.main]}
        floats = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        if self.projection is None:
            out = self.network(**floats)
            return out if isinstance(out, Tensor) else field_of(out, name, self.network)
        try:
            side = field_of(self.network(**floats), name, self.network)
            return self.projection(side.movedim(1, -1)).movedim(-1, 1) if side.ndim == 4 else self.projection(side)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise TuningError(
                f"the narrow copy of {type(self.network).__name__} does not compute in the sizes it was given ({why}): "
                "choose another reduction=, or give side= (a class path)."
            ) from error


@dataclass(eq=False, kw_only=True)
class SideTuning(Method):
    """Train a side network and how much of it is blended in.

    Args:
        side: the side network as a class path, such as ``mypackage.nets.Small``; it is called with those inputs of
            the backbone that its forward pass names, else with the main one. None: a narrow copy of the backbone.
        side_args: arguments of that class.
        reduction: by how much the copy is narrower: heads, width, feed-forward width.
        side_layers: number of blocks of the copy; None: as many as the backbone has.
        blend: what is blended: 'pooler_output', 'last_hidden_state', 'first_token', or 'auto', what the head reads.
        alpha_init: initial value of a; 0 is the mean.
    """

    side: str | None = None
    side_args: dict[str, Any] = field(default_factory=dict)
    reduction: int = natural(4, "makes no narrow copy")
    side_layers: int | None = natural(None)
    blend: Literal["auto", "pooler_output", "last_hidden_state", "first_token"] = choice("auto", "is no output")
    alpha_init: float = 0.0

    kind: ClassVar[str] = "side network"
    trains: ClassVar[str] = "a small network beside the backbone, blended in"
    paper: ClassVar[str] = "Zhang et al. 2020, arXiv 1912.13503"
    advised: ClassVar[Rates] = Rates(1e-2, 1e-1, MEASURED, Rates(3e-3, 3e-2, DIGITS))
    needs: ClassVar[frozenset[str]] = frozenset({compatibility.FEATURES})
    breaks: ClassVar[frozenset[str]] = frozenset({compatibility.GRADIENTS, compatibility.FEATURES})
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"alpha_init"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the side network to the base model."""
        base = base_of(backbone)
        inside = {id(parameter) for parameter in base.parameters()} if base is not backbone else set()
        for name in anatomy.head_names(backbone):
            if id(backbone.get_parameter(name)) in inside:
                raise TuningError(
                    f"{name} of the head lies inside of {type(base).__name__}, which is run without gradients, and "
                    "before what a side network is blended into: take LoRA."
                )
        blend = self._blend(backbone, base)
        device = device_of(base)
        projection = None
        if self.side is not None:
            network = _build(self.side, self.side_args)
        else:
            network, widths = narrow(base, self.reduction, self.side_layers, pooled=blend == "pooler_output")
            projection = nn.Linear(*widths, bias=False, device=device, dtype=torch.float32)
        network.to(device=device).requires_grad_(True)
        side = attach(base, Side(base, network, projection, blend, self.alpha_init), self.key)
        path = next(name for name, module in backbone.named_modules() if module is side)
        names = {f"{path}.network.{name}": name for name, _ in network.named_parameters()}
        kept = {names[name] for name in self._kept(names)} - set(
            without_effect(network, "last_hidden_state" if blend == "first_token" else blend)
        )
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in kept)
        network.train(base.training)
        check_is_read(backbone, base, f"{path}.alpha")
        return ()

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Ask for no weight decay of a."""
        return {"weight_decay": 0.0} if name.endswith(f"{self.key}.alpha") else {}

    def alpha(self, model: nn.Module) -> float:
        """Return s(a), the share of the backbone in the blend.

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        return self.own_grafts(model, Side)[0].graft.alpha.detach().sigmoid().item()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the share of the backbone as ``side_alpha``."""
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log("side_alpha", self.alpha(pl_module))

    def _blend(self, backbone: nn.Module, base: nn.Module) -> str:
        if self.blend != "auto":
            return self.blend
        if not anatomy.head_names(backbone):
            return "last_hidden_state"
        pooled = structure.part(base, "pooler") is not None
        return field_read(backbone) or ("pooler_output" if pooled else "last_hidden_state")


class SideTuningMixin(TunedBy[SideTuning]):
    """For a LightningModule with a side network: set ``self.method = SideTuning(...)`` to choose it."""

    def alpha(self) -> float:
        """Return the share of the backbone in the blend."""
        method, module = self._owned()
        return method.alpha(module)


def _build(path: str, arguments: dict[str, Any]) -> nn.Module:
    """Return an instance of the class at an import path."""
    package, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(package), name) if package else None
    except (ImportError, AttributeError) as error:
        raise TuningError(f"side={path!r} cannot be imported ({error}): give the path of a class.") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TuningError(f"side={path!r} is no path of an nn.Module class: give e.g. 'mypackage.nets.Small'.")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise TuningError(f"side={path!r} does not take side_args={arguments} ({error}): give what it takes.") from None
