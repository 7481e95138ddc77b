"""What adapters of Hugging Face PEFT call a method, its arguments and its tensors; `interop` converts by it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

LAYER_KEYS: Mapping[str, Any] = {
    "exclude_modules": None, "init_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "target_modules": None,
}  # fmt: skip
"""What PEFT writes for most forms that change chosen layers, by default."""


@dataclass(frozen=True)
class Twin:
    """The form that PEFT gives a method that changes layers, tensor by tensor the same.

    Attributes:
        peft_type: the name of the form.
        tensors: tensor of a graft -> what PEFT calls it at the layer.
        arguments: argument of the method -> its key in ``adapter_config.json``.
        defaults: every key that PEFT writes for this form, but those that all forms have, with its default.
        free: keys that change nothing of what is computed, such as those of the initial values; any other key that is
            no argument must have its default.
        kinds: the layers that PEFT has it for.
        parts: kind of layer -> what PEFT calls the tensors there, where that is not what ``tensors`` says.
        words: argument -> pairs of a value here and what PEFT has in its place; the first pair that fits is taken, and
            a value in no pair is the same there.
        differs: says why PEFT would compute something else for a layer of these kinds; None: it would not.
    """

    peft_type: str
    tensors: Mapping[str, str]
    arguments: Mapping[str, str]
    defaults: Mapping[str, Any]
    free: frozenset[str] = field(default=frozenset())
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    parts: Mapping[type[nn.Module], Mapping[str, str]] = field(default_factory=dict)
    words: Mapping[str, tuple[tuple[Any, Any], ...]] = field(default_factory=dict)
    differs: Callable[[nn.Module], str | None] = lambda _: None

    def parts_of(self, host: nn.Module | None) -> Mapping[str, str]:
        """Return what PEFT calls the tensors at a layer: tensor of a graft -> part."""
        return next((parts for kind, parts in self.parts.items() if isinstance(host, kind)), self.tensors)

    def theirs(self, argument: str, value: Any) -> Any:
        """Return what PEFT has in place of the value of an argument."""
        return next((word for ours, word in self.words.get(argument, ()) if ours == value), value)

    def ours(self, argument: str, value: Any) -> Any:
        """Return the value of an argument that PEFT has as this."""
        pairs = self.words.get(argument, ())
        return next((own for own, word in pairs if type(word) is type(value) and word == value), value)
