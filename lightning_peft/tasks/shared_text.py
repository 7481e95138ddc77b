"""The keys and values of a text that many sequences begin with, computed once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_peft.core.cache_argument import cache_in, name_in
from lightning_peft.prompts.source_mask import reads_source


@dataclass
class Shared:
    """Keys and values of tokens that many sequences begin with, for one row."""

    cache: Any
    length: int

    def copies(self, rows: int) -> Any:
        """Return a cache with ``rows`` rows that may be added to."""
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
        return cache

    def given_to(self, model: nn.Module) -> dict[str, Any]:
        """Return the argument by which a model reads it before each row of any batch; no row adds to it."""
        cache = DynamicCache()
        cache.layers = [_ReadLayer(layer.keys, layer.values) for layer in self.cache.layers]
        return past(model, cache)


class _ReadLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Keys and values of one row [1, H, S, d], before those of each row of a batch."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return those of the layer and of the rows."""
        rows = len(key_states)
        keys, values = (own.expand(rows, -1, -1, -1) for own in (self.keys, self.values))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def prefill(model: nn.Module, ids: Sequence[int]) -> Shared | None:
    """Let a causal model read what many sequences begin with; None: its cache cannot be shared.

    A prefix language model reads the whole source at once: what begins it depends on what follows.
    """
    if reads_source(model):
        return None
    tokens = torch.tensor([list(ids)], device=_device(model))
    out = model(input_ids=tokens, use_cache=True, **keep(model, 1))
    cache = shareable(model, out)
    return None if cache is None else Shared(cache, len(ids))


def shareable(model: nn.Module, out: Mapping[str, Any]) -> DynamicCache | None:
    """Return the cache in a model's output, or None if it is more than keys and values, or the model takes none."""
    cache = cache_in(out)
    if name_in(type(model).forward) is None or not isinstance(cache, DynamicCache):
        return None
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def past(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the argument by which a model takes a cache."""
    name = name_in(type(model).forward)
    assert name is not None
    return {name: cache}


def keep(model: nn.Module, count: int) -> dict[str, int]:
    """Return the argument that asks a model for its last logits alone, where it has one."""
    return {"logits_to_keep": count} if "logits_to_keep" in arguments(model) else {}


def arguments(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments of a model."""
    return _names(type(model).forward)


@lru_cache(maxsize=64)
def _names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
