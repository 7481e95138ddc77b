"""A pool of prompts in a vision transformer that is no transformers model, whose output has no hidden states.

The prompts go into the row of tokens where it is first complete. At the norm behind the last block the query is taken
in the pass without prompts; in the pass with them the mean of their outputs is put in the place of every token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.graft import Graft
from lightning_peft.core.meta_run import ran
from lightning_peft.towers.plain_vision import noting
from lightning_peft.towers.prompt_pool import PromptPool
from lightning_peft.towers.token_prompts import MorePrefixTokens
from lightning_peft.towers.vision import Tower


class RowPrompts(Graft):
    """Puts the chosen prompts before the row of tokens that goes into its host."""

    rows: Tensor | None = None
    """Set by the pool for one call, [B, N * L_p, d]."""
    embedded: Tensor | None = None
    sharing: bool = False

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the row with the prompts before it, [B, N * L_p + n + T, d]."""
        return x if self.rows is None else torch.cat((self.rows.to(x.dtype), x), dim=1)


class RowEnd(Graft):
    """Gives the pool the first token of its host's output, or makes every token the mean of the prompts' outputs."""

    asked: bool = False
    """Whether the query is taken in this call."""
    first: Tensor | None = None
    width: int = 0
    """How many tokens at the start are prompts in this call."""

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output as it is, or pooled, [B, n + T, d]."""
        x: Tensor = out[0] if isinstance(out, tuple) else out
        if self.asked:
            self.first = x[:, 0]
        if self.asked or not self.width:
            return out
        pooled = x[:, : self.width].mean(1, keepdim=True).expand(-1, x.shape[1] - self.width, -1)
        return (pooled, *out[1:]) if isinstance(out, tuple) else pooled


class PromptsUnturned(MorePrefixTokens):
    """Tells an attention that turns the tokens of patches alone of the prompts, in the pass that has them."""

    chosen: RowPrompts

    def around(self, forward: Callable[..., Any], host: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the attention."""
        if self.chosen.rows is None:
            return forward(*args, **kwargs)
        return super().around(forward, host, *args, **kwargs)


class RowPool(PromptPool):
    """A pool of prompts that meets the tokens at two modules in its host; ``end`` is the path of the second graft."""

    end: str

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what the host makes of the prompts' outputs."""
        end = self._end(host)
        end.width = self.top_n * self.prompts.shape[1]
        args, kwargs = (args, kwargs) if args else ((kwargs.pop(next(iter(kwargs))),), kwargs)
        try:
            return super().around(forward, host, *args, **kwargs)
        finally:
            end.width = 0

    def _query(self, forward: Callable[..., Any], host: nn.Module, *args: Any) -> Tensor:
        end = self._end(host)
        end.asked = True
        try:
            return super()._query(forward, host, *args)
        finally:
            end.asked, end.first = False, None

    def _first(self, host: nn.Module, out: Any) -> Tensor:
        first = self._end(host).first
        assert first is not None
        return first

    def _pooled(self, out: Any) -> Any:
        return out

    def _end(self, host: nn.Module) -> RowEnd:
        return host.get_submodule(self.end)  # type: ignore[return-value]


def end_of(found: Tower) -> nn.Module:
    """Return the norm behind the last block of a plain tower, or that block."""
    calls: list[tuple[nn.Module, torch.Size]] = []
    image = torch.empty(2, *found.image_size, dtype=found.patches.weight.dtype, device="meta")
    ran(found.module, image, each=partial(noting, calls))
    inside = set(found.blocks[-1].modules())
    last = max(i for i, (module, _) in enumerate(calls) if module in inside)
    shape = (2, found.prefix + found.tokens, found.dim)
    behind = [m for m, given in calls[last + 1 :] if given == shape and "norm" in type(m).__name__.lower()]
    return behind[0] if behind else found.blocks[-1]
