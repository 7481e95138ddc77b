"""Makes the page of the docs on timm's architectures: ``make timm`` (``python -m tests.families.architectures``).

Of each file of architectures the smallest of its models is built on the meta device, where nothing is downloaded and no
number computed, with a head of three classes, and is asked for its head and tuned by LoRA twice.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lightning_peft import LoRA, TuningError
from lightning_peft.core import anatomy
from lightning_peft.core.graft import grafts

PAGE = Path(__file__).parents[2] / "docs" / "timm.md"
_CHOICE = 6
"""How many models of a file are built to find a small one: those of the shortest names, which add nothing."""


class Row(NamedTuple):
    """What became of an architecture: its model, whether its head was found, and the layers that were tuned."""

    file: str
    model: str
    head: str
    lora: str
    all_linear: str


def rows() -> list[Row]:
    """Return a row for each file of architectures of timm that registers a model."""
    from timm.models import list_models, list_modules

    found = []
    for file in sorted(list_modules()):
        names = sorted(list_models(module=file), key=len)[:_CHOICE]
        built = [(name, model) for name in names if (model := _built(name)) is not None]
        if built:
            name, model = min(built, key=lambda one: sum(p.numel() for p in one[1].parameters()))
            found.append(Row(file, name, _head(model), _tuned(model, None), _tuned(model, "all-linear")))
    return found


def _built(name: str) -> nn.Module | None:
    """Return a model without values, or None where its file needs numbers to build it."""
    from timm import create_model

    for device in ("meta", "cpu"):
        try:
            with torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return create_model(name, num_classes=3)
        except (NotImplementedError, RuntimeError):
            continue
        except TypeError:  # it has no classes
            return None
    return None


def _head(model: nn.Module) -> str:
    """Return ``+`` where the head is what ``get_classifier()`` says, ``none`` where that has no parameters."""
    given = model.get_classifier() if hasattr(model, "get_classifier") else ()
    parts = given if isinstance(given, (tuple, list)) else (given,)
    said = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    own = dict(model.named_parameters())
    found = {id(own[name]) for name in anatomy.head_names(model)}
    return ("+" if found else "none") if found == said else "!"


def _tuned(model: nn.Module, targets: str | None) -> str:
    """Return how many layers LoRA tunes, or what it says."""
    method = LoRA(r=2, target_modules=targets)
    try:
        method.apply(model)
    except TuningError as refused:
        return f"- {refused}"
    except Exception as error:
        return f"! {type(error).__name__}: {error}".splitlines()[0]
    count = len(list(grafts(model)))
    method.remove(model)
    return str(count)


def page(found: list[Row]) -> str:
    """Return the page of the docs."""
    headed = [row for row in found if row.head != "none"]
    lora, every = (sum(getattr(row, name).isdigit() for row in found) for name in ("lora", "all_linear"))
    heads = sum(row.head == "+" for row in headed)
    lines = [
        "# timm, file by file",
        "",
        "Made by `make timm`: of each file of timm's architectures the smallest of a few models, on the meta device.",
        "The head is that of `get_classifier()`, as it should be (`+`), something else (`!`), or none. The numbers",
        'are those of the layers that LoRA tunes by default and with `target_modules="all-linear"`.',
        "",
        f"LoRA works on {lora} of {len(found)}, all-linear on {every} of {len(found)}, the head is found on {heads} of "
        f"{len(headed)} that have one.",
        "",
        "| file | model | head | LoRA | all-linear |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in found)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(rows()), encoding="utf-8")
