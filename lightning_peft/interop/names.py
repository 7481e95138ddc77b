"""Translates names of tensors between the model, its checkpoints, and the files of Hugging Face PEFT.

PEFT writes ``base_model.model.<module>.<part>``, or ``base_model.<module>.<part>`` for prompts, whose own tensor has no
prefix; a wrapped layer's own tensors stand below ``base_layer``. transformers 5 has renamed the modules of some models
(ViT, DeiT, BEiT, DINOv2, Swin, Mixtral) and translates the names of their checkpoints when it reads and writes them.
PEFT translates few of them, so an adapter holds the names of the transformers version that it was saved with. Here both
are read.

>>> strip("base_model.model.bert.pooler.dense.base_layer.bias", PREFIX)
('bert.pooler.dense.bias', True)
>>> strip("base_model.model.norm.weight", PROMPT_PREFIX), strip("prompt_embeddings", PROMPT_PREFIX)
(('model.norm.weight', False), ('prompt_embeddings', False))
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core.graft import graft_prefixes

PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."
BASE_LAYER = "base_layer"
LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What PEFT's LoRA wraps; other modules' matrices it knows as ``target_parameters``."""


@dataclass
class Names:
    """The names of one model's modules and tensors.

    Attributes:
        model: the backbone; what methods have added to it is left out.
    """

    model: nn.Module

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of every parameter and saved buffer of the model; a tied one has several names."""
        added = graft_prefixes(self.model)
        return {name: t for name, t in self.model.state_dict(keep_vars=True).items() if not name.startswith(added)}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Name -> module, those that methods have added left out."""
        added = graft_prefixes(self.model)
        return {name: m for name, m in self.model.named_modules() if name and not f"{name}.".startswith(added)}

    @cached_property
    def paths(self) -> dict[str, nn.Module]:
        """Name -> module, as `modules`, but one that stands at two places has both names."""
        added = graft_prefixes(self.model)
        every = self.model.named_modules(remove_duplicate=False)
        return {name: m for name, m in every if name and not f"{name}.".startswith(added)}

    @cached_property
    def first(self) -> dict[int, str]:
        """Identity of a tensor -> its first name, the one that a delta has."""
        first: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            first.setdefault(id(tensor), name)
        for name, parameter in self.model.named_parameters():
            first[id(parameter)] = name
        return first

    @cached_property
    def _renamed(self) -> dict[str, str]:
        return renamed(self.model, self.tensors)

    @cached_property
    def stacks(self) -> dict[str, dict[str, float]]:
        """Name of each stack of experts -> name in the model's checkpoints of each layer in it -> its first row."""
        return pieces(self.model, {name: t for name, t in self.tensors.items() if name not in self._renamed})

    @cached_property
    def on_disk(self) -> dict[str, str]:
        """Module -> its name in the model's checkpoints, where that is another."""
        pairs = {}
        for name, disk in self._renamed.items():
            module, _, leaf = name.rpartition(".")
            disk_module, _, disk_leaf = disk.rpartition(".")
            if leaf == disk_leaf and module != disk_module:
                pairs[module] = disk_module
        return pairs

    @cached_property
    def in_memory(self) -> dict[str, str]:
        """Name of a module in the model's checkpoints -> its name in the model."""
        return {disk: name for name, disk in self.on_disk.items()}

    def locate(self, key: str) -> tuple[str, str, str] | None:
        """Return the module that a name, stripped of PEFT's prefix, belongs to, what follows, and its name there.

        The name may be that of this transformers version or that of the model's checkpoints. None: there is no such
        module.
        """
        parts = key.split(".")
        for i in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:i])
            if path in self.in_memory:
                return self.in_memory[path], ".".join(parts[i:]), path
            if path in self.paths:
                return path, ".".join(parts[i:]), path
        return None


def strip(key: str, prefix: str) -> tuple[str, bool]:
    """Return the name of a tensor in the model, and whether it is one of a layer that PEFT has wrapped."""
    parts = key.removeprefix(prefix).split(".")
    return ".".join(part for part in parts if part != BASE_LAYER), BASE_LAYER in parts


def renamed(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return name in memory -> name in the model's checkpoints; tensors that are fused in memory are left out.

    transformers says how it renames when it saves; there is no public function for names alone. PEFT uses the same ones
    (https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py), and
    ``tests/interop/test_names.py`` fails when they change.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_converters, apply_renamings

    if not isinstance(model, PreTrainedModel):
        return {}
    mapping = [
        step for step in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(step, PrefixChange)
    ]
    steps: list[Any] = [step.reverse_transform() for step in reversed(mapping)]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if not isinstance(step, WeightRenaming)]
    found = {}
    for name in names:
        _, fused = apply_converters(name, converters)
        if fused is None:
            found[name] = apply_renamings(name, renamings)
    return found


def pieces(model: nn.Module, fused: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return name of a stack [experts, rows, columns] -> name in the checkpoints of each layer in it -> its first row.

    Rows are numbered through all experts; transformers is asked to save these numbers in place of the stack. That its
    function for this goes on doing so is what ``tests/interop/test_names.py`` sees to.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return {}
    found = {}
    for name, tensor in fused.items():
        if tensor.ndim == 3:
            experts, rows, _ = tensor.shape
            numbers = torch.arange(experts * rows, dtype=torch.float64).view(experts, rows, 1)
            saved = revert_weight_conversion(model, {name: numbers})
            found[name] = {disk: part[0, 0].item() for disk, part in saved.items() if part.ndim == 2}
    return found


def selection(chosen: Iterable[str], names: Iterable[str]) -> list[str] | str:
    """Return suffixes that select the chosen names alone, or one regex where a name ends as one that is not chosen.

    >>> selection(["foo"], ["foo", "bar"]), selection(["foo"], ["foo", "inner.foo"])
    (['foo'], 'foo')
    """
    chosen = set(chosen)
    ends = compact(chosen, names)
    if any(name not in chosen and name.endswith(tuple(f".{end}" for end in ends)) for name in names):
        return "|".join(map(re.escape, sorted(chosen)))
    return ends


def compact(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the last parts of the chosen names, if they select nothing else of ``names``, or the names themselves.

    >>> compact(["0.q", "1.q"], ["0.q", "1.q", "0.k"]), compact(["0.q"], ["0.q", "1.q"])
    (['q'], ['0.q'])
    """
    chosen = sorted(chosen)
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    if set(chosen) == {name for name in names if name.rpartition(".")[2] in leaves}:
        return leaves
    return chosen
