"""Prompts among the tokens of a vision transformer: in its input, in its blocks, and out of its output again."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.graft import Graft
from lightning_peft.towers.window_prompts import ImagePrompts, RoomForPrompts


class TokenPrompt(ImagePrompts):
    """Puts prompts after the first n tokens, or in the place of those that stand there.

    Args:
        weight: the prompts, [P, dp]; None: those of an earlier block go through.
        projection: from dp to d, shared between blocks; None: dp is d.
        dropout: of the prompts.
        start: n.
        width: P.
        insert: whether the sequence has no prompts yet.
    """

    def __init__(
        self,
        weight: nn.Parameter | None,
        projection: nn.Linear | None,
        dropout: float,
        start: int,
        width: int,
        insert: bool,
    ) -> None:
        super().__init__(weight, projection, dropout)
        self.start = start
        self.width = width
        self.insert = insert

    def joined(self, x: Tensor) -> Tensor:
        """Return the tokens with the prompts among them, [B, n + P + N, d]."""
        if self.weight is None:
            return x
        rest = self.start if self.insert else self.start + self.width
        return torch.cat((x[:, : self.start], self.rows(x), x[:, rest:]), dim=1)

    def stripped(self, out: Any) -> Any:
        """Return the output of a block without prompts, [B, n + N, d]."""
        x = out[0] if isinstance(out, tuple) else out
        x = torch.cat((x[:, : self.start], x[:, self.start + self.width :]), dim=1)
        return (x, *out[1:]) if isinstance(out, tuple) else x


class EmbeddedPrompt(TokenPrompt):
    """Adds prompts to the output of the embeddings, so that the stack builds its mask for the longer sequence."""

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings of the image with the prompts among them."""
        return self.joined(out)


class BlockPrompt(TokenPrompt):
    """Puts prompts into the input of a block."""

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's input with prompts of its own."""
        return self.joined(x)


class LastBlockPrompt(BlockPrompt):
    """A `BlockPrompt` of the last block, which removes the prompts again: norm, pooling and head do not know them."""

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output without the prompts."""
        return self.stripped(out)


class WiderMask(RoomForPrompts):
    """Lets the tokens of a block see the prompts that stand before them, where the block is given a mask."""

    def around(
        self,
        forward: Callable[..., Any],
        host: nn.Module,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the block with the mask [B, 1, T, T], true or 0 for what is seen, grown by the prompts."""
        if attention_mask is not None:
            seen = 1.0 if attention_mask.dtype is torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (self.width, 0), value=seen)
            if attention_mask.shape[-2] > 1:  # a prompt sees what the first token sees
                rows = attention_mask[..., :1, :].expand(*attention_mask.shape[:-2], self.width, -1)
                attention_mask = torch.cat((rows, attention_mask), dim=-2)
        return forward(x, attention_mask, *args, **kwargs)


class MorePrefixTokens(RoomForPrompts):
    """Tells an attention that turns the tokens of patches alone that the prompts stand before these, too."""

    def around(self, forward: Callable[..., Any], host: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the attention."""
        host.num_prefix_tokens += self.width
        try:
            return forward(*args, **kwargs)
        finally:
            host.num_prefix_tokens -= self.width


class Pooled(Graft):
    """Sets every token of the last hidden state to the vector that the head reads, however it pools.

    Args:
        pool: 'cls' for the first token, 'mean' for the mean over the patches.
        prefix: number of tokens before the patches.
    """

    def __init__(self, pool: str, prefix: int) -> None:
        super().__init__()
        self.pool = pool
        self.prefix = prefix

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the tower, its last hidden state pooled, [B, n + N, d]."""
        x: Tensor = out[0]
        pooled = x[:, :1] if self.pool == "cls" else x[:, self.prefix :].mean(1, keepdim=True)
        pooled = pooled.expand_as(x)
        if isinstance(out, tuple):
            return (pooled, *out[1:])
        out.last_hidden_state = pooled
        return out


class FoldedPrompt(Graft):
    """Keys and values that an attention computed from its prompts, kept in their place.

    Args:
        key: [1, H, P, d_h].
        value: [1, H, P, d_h].
    """

    key: Tensor
    value: Tensor

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.columns = key.shape[2]
        self.register_buffer("key", key.clone())
        self.register_buffer("value", value.clone())

    def key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values with those of the prompts on their left."""
        added = [t.to(key.dtype).expand(key.shape[0], -1, -1, -1) for t in (self.key, self.value)]
        return torch.cat((added[0], key), dim=2), torch.cat((added[1], value), dim=2)
