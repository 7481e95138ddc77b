"""Puts a soft prompt into what a model is called with, where no batch has been prepared.

A Trainer with the method as its callback widens the batches. A script of one's own, a Trainer without the method and a
second text that a module reads from elsewhere do not, and must not compute with the bare model.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.tracing import is_traced
from lightning_peft.prompts.virtual_tokens import VirtualTokens, is_widened


class Prepared:
    """Knows which ids a method has put its prompt into, without looking at their values; grafts of a backbone share it.

    Attributes:
        inside: whether one of the modules that read texts is running; those in it get what it has prepared.
        bare: whether the word table was last called from outside with ids that have no virtual token; None: it was not
            called since the model was.
    """

    def __init__(self) -> None:
        self._ids: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self.inside = False
        self.bare: bool | None = None

    def note(self, ids: Tensor) -> None:
        """Remember ids with virtual tokens in them."""
        self._ids[id(ids)] = ids

    def knows(self, ids: Tensor) -> bool:
        """Tell whether these very ids were noted."""
        return self._ids.get(id(ids)) is ids

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared, ()


class InModel(Graft):
    """Prepares what its host, a module that reads texts, is called with.

    Args:
        prepare: the method's, which returns a batch with the prompt in it.
        known: what has been prepared.
    """

    def __init__(self, prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]], known: Prepared) -> None:
        super().__init__()
        self.prepare, self.known = prepare, known

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute with the prompt, as if the batch had been prepared; a tracer sees the inputs as they are."""
        if is_traced() or self.known.inside:
            return forward(*args, **kwargs)
        inputs = dict(zip(structure.arguments_of(host), args, strict=False)) | kwargs
        self.known.inside = True
        try:
            prepared = self._prepared(host, inputs)
            return forward(*args, **kwargs) if prepared is inputs else forward(**prepared)
        finally:
            self.known.inside = False

    def _prepared(self, host: nn.Module, inputs: dict[str, Any]) -> Mapping[str, Any]:
        """Return the inputs with the prompt in them.

        Raises:
            TuningError: it cannot be put there any more.
        """
        other = structure.main_input_of(host)
        if inputs.get("input_ids") is None and other is not None and _is_ids(inputs.get(other)):  # Perceiver's `inputs`
            inputs = {name: value for name, value in inputs.items() if name != other} | {"input_ids": inputs[other]}
        ids, mask, cache = inputs.get("input_ids"), inputs.get("attention_mask"), cache_in(inputs)
        if not isinstance(ids, Tensor):
            self._check_embedded(host, inputs)
            return self._beside(inputs)
        if ids.is_meta or self.known.knows(ids) or is_widened(inputs) or (cache is not None and cache.get_seq_length()):
            return inputs
        if cache is not None or (isinstance(mask, Tensor) and mask.ndim != 2):
            raise TuningError(
                f"{type(host).__name__} is called without its prompt, which cannot be put in beside a cache or a mask "
                "that is not [B, T]: call it with what method.prepare(batch) returns."
            )
        return self.prepare(inputs)

    def _check_embedded(self, host: nn.Module, inputs: Mapping[str, Any]) -> None:
        bare, self.known.bare = self.known.bare, None
        if bare is not False and inputs.get("inputs_embeds") is not None:
            raise TuningError(
                f"{type(host).__name__} is given embeddings of a text without its prompt: embed the ids that "
                "method.prepare(batch) returns."
            )

    def _beside(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a decoder with a mask as long as what the encoder has given."""
        states, mask = inputs.get("encoder_outputs"), inputs.get("attention_mask")
        if states is None or not isinstance(mask, Tensor):
            return inputs
        if states[0].shape[1] > mask.shape[1]:
            plain = {"input_ids": torch.zeros_like(mask, dtype=torch.long), "attention_mask": mask}
            return inputs | {"attention_mask": self.prepare(plain)["attention_mask"]}
        return inputs


def _is_ids(given: Any) -> bool:
    return isinstance(given, Tensor) and given.ndim == 2 and given.dtype == torch.long


class KnownTokens(VirtualTokens):
    """Virtual tokens that note a call from outside with ids that have none."""

    def __init__(self, weight: nn.Parameter | nn.Module, known: Prepared) -> None:
        super().__init__(weight)
        self.known = known

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return ids that the table has, [B, T]."""
        if not (is_traced() or self.known.inside or x.is_meta):
            self.known.bare = not self.known.knows(x) and not bool((x < 0).any())
        return super().before(host, x)


def readers(backbone: nn.Module, tables: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that read texts: they take ids and a mask and hold a word table; no decoder of two stacks."""
    skip = backbone.get_decoder() if structure.is_encoder_decoder(backbone) else None  # type: ignore[operator]
    for name, module in backbone.named_modules():
        takes = {"input_ids", "attention_mask"} <= set(structure.arguments_of(module))
        start = f"{name}." if name else ""
        if takes and module is not skip and any(table.startswith(start) for table in tables):
            yield module
