"""A model that fills no cache of keys and values in training, where nobody reads it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.graft import Graft


class NoCache(Graft):
    """Asks its host, a transformers model, for no cache, where gradients are recorded and the caller says nothing."""

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host."""
        if torch.is_grad_enabled() and kwargs.get("use_cache") is None and cache_in(kwargs) is None:
            kwargs["use_cache"] = False
        return forward(*args, **kwargs)


def fills_cache(backbone: nn.Module) -> bool:
    """Tell whether a model takes a word about its cache."""
    return structure.is_pretrained(backbone) and "use_cache" in structure.arguments_of(backbone)
