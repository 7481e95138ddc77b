"""The learning rates that methods recommend: for AdamW with a linear schedule, as most tasks have it, or for SGD."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.pruned import live_name

if TYPE_CHECKING:
    from lightning_peft.core.tuning import Tuning

MEASURED = "measured on MiniLM, docs/results.md"
"""The source of a rate that is the best of those tried on real text."""
DIGITS = "measured on digits, docs/results.md"
"""The source of a rate that is the best of those tried on images."""
SHAPES = "measured on drawn shapes, docs/results.md"
"""The source of a rate that is the best of those tried on drawings and their names, or on tasks of them."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of what a method adds or trains, and of a new head beside it, and where they are from.

    Attributes:
        delta: of what a method adds or trains.
        head: of a new head.
        source: where they are from.
        images: those of a backbone that reads images; None: the same.
        headed: those of a backbone of texts with a new head; None: the same.
        optimizer: what they are for; tasks of two towers train by SGD.
    """

    delta: float
    head: float
    source: str
    images: "Rates | None" = None
    headed: "Rates | None" = None
    optimizer: Literal["AdamW", "SGD"] = "AdamW"

    def on(self, backbone: nn.Module) -> "Rates":
        """Return the rates for what this backbone reads, and for its head."""
        if structure.main_input_of(backbone) == "pixel_values":
            return self.images or self
        return self.headed if self.headed and anatomy.head_names(backbone) else self


ADDED = Rates(2e-3, 1e-2, "as for LoRA; not measured for this method")
"""The rates of a method that says none of its own."""
RECIPE = Rates(2e-3, 1e-2, "section 4.1 of CoOp's paper", optimizer="SGD")
"""The rates of a method in a task that trains by SGD, where it says none."""
EVERYTHING = Rates(3e-4, 1e-3, MEASURED, Rates(9e-4, 3e-3, DIGITS))
"""The rates at which all parameters of a pretrained model are trained."""


def rates_of(backbone: nn.Module, tuning: "Tuning") -> dict[str, float]:
    """Return the recommended rate of each trained parameter, by its name in the backbone.

    What several methods train has the smallest of their rates.
    """
    rates = {key: method.advice().on(backbone).delta for key, method in tuning.methods.items()}
    found: dict[str, float] = {}
    for key, name in _trained(backbone, tuning):
        found[name] = min(rates[key], found.get(name, rates[key]))
    return found


def head_rate(backbone: nn.Module, tuning: "Tuning") -> float:
    """Return the recommended rate of the head: the smallest of those of the methods."""
    return min(method.advice().on(backbone).head for method in tuning.methods.values())


def _trained(backbone: nn.Module, tuning: "Tuning") -> Iterator[tuple[str, str]]:
    """Yield the key of a method and the name of a parameter that it trains."""
    live = dict(backbone.named_parameters())
    for key, names in tuning.trains.items():
        yield from ((key, live_name(name, live)) for name in names)
    for place in tuning.grafts(backbone):
        if place.graft.owner in tuning.methods:
            yield from ((place.graft.owner, f"{place.full_name}.{n}") for n, _ in place.graft.named_parameters())
