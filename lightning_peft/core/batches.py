"""What a batch of any loader holds: a mapping, as transformers has it, or a pair of inputs and labels, as torchvision.

>>> import torch
>>> entry_of((torch.zeros(2, 3), torch.tensor([0, 1])), "labels", 1)
tensor([0, 1])
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError


def inputs_of(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the arguments of a model in a batch: entries of such names; of a pair, the first; a tensor itself.

    Raises:
        TuningError: it has none.
    """
    names = structure.arguments_of(model)
    first = batch[0] if _is_pair(batch) else batch
    if isinstance(first, Mapping):
        found = {name: value for name, value in first.items() if name in names and isinstance(value, Tensor)}
    else:
        name = structure.main_input_of(model) or next(iter(names), None)
        found = {name: first} if name is not None and isinstance(first, Tensor) else {}
    if not found:
        raise TuningError(
            f"{type(model).__name__} takes none of what the batch has ({_content(batch)}): give batches that are "
            "mappings with arguments of the model, or pairs of inputs and labels."
        )
    return found


def entry_of(batch: Any, name: str, place: int) -> Tensor:
    """Return an entry of a mapping by its name, or of a pair by its place.

    Raises:
        TuningError: there is none.
    """
    entry = batch.get(name) if isinstance(batch, Mapping) else batch[place] if _is_pair(batch) else None
    if not isinstance(entry, Tensor):
        raise TuningError(
            f"the batch ({_content(batch)}) shows no {name}: give batches that are mappings with {name}, or pairs of "
            "inputs and labels."
        )
    return entry


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2


def _content(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{kind} of {', '.join(map(str, batch)) or 'nothing'}"
    return f"{kind} of {len(batch)}" if isinstance(batch, Sequence) else kind
