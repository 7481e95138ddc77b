"""Keys and values of an attention that neither uses transformers' interface nor fills a cache (MPNet, DeBERTa ...).

Such an attention is a product of queries and keys, one softmax, and a product with the values. While it runs, these
three are watched: what the queries say of more keys goes into the softmax, and their values into the result,
``softmax([q P_k / s; scores]) [P_v; v]``, where s is what the model divides its own products by. Masks, positions and
relative biases of its tokens stay as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, overrides

_PRODUCTS = ("matmul", "bmm", "__matmul__", "__rmatmul__")
_TIMES, _BY = ("mul", "__mul__", "mul_", "__rmul__", "__imul__"), ("div", "__truediv__", "div_", "true_divide")
Rows = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class AddedScores(Graft):
    """Lets the grafts of an attention, its host, add keys and values by the joint `key_value`.

    Args:
        heads: how many heads it has.
        key_dim: the size of its keys.
        value_dim: that of its values.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.shape = (heads, key_dim, value_dim)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the attention over its own columns and over those that grafts add.

        Raises:
            TuningError: it computes something else than when it was probed.
        """
        at_work = [child for child in host.children() if isinstance(child, Graft) and not child.rests]
        routes = [child for child in at_work if isinstance(child, AddedScores)]
        added = [child for child in at_work if overrides(child, "key_value")]
        if self is not routes[0] or not added:
            return forward(*args, **kwargs)
        heads, key_dim, value_dim = self.shape

        def rows(like: Tensor, batch: int) -> tuple[Tensor, Tensor]:
            key, value = like.new_empty(batch, heads, 0, key_dim), like.new_empty(batch, heads, 0, value_dim)
            for graft in added:
                key, value = graft("key_value", key, value)
            return key, value

        with Watching(rows) as watching:
            out = forward(*args, **kwargs)
        if watching.value_dim is None:
            raise TuningError(
                f"{type(host).__name__} attends in another way than when the prefix was attached: run it on inputs "
                "of the kind it was made for, or tune it by LoRA."
            )
        return out


class Watching(TorchFunctionMode):
    """Puts columns into the first attention that is computed inside of it.

    Args:
        rows: gives keys [B, H, P, d_k] and values [B, H, P, d_v] for queries and a batch size.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.heads = self.key_dim = self.value_dim = None
        self._batch, self._length = None, 0
        self._factors: dict[int, tuple[Tensor, Any]] = {}
        self._scores: Tensor | None = None
        self._values: Tensor | None = None
        self._shares: tuple[Tensor, Tensor] | None = None
        self._dropout = (0.0, False)

    heads: int | None
    key_dim: int | None
    value_dim: int | None
    _batch: int | None
    _length: int

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if self._batch is None and tensors and tensors[0].ndim == 3:
            self._batch, self._length = tensors[0].shape[0], tensors[0].shape[1]
        if name in _PRODUCTS and len(tensors) == 2 and tensors[0].ndim in (3, 4):
            return self._product(func(*args, **kwargs), *tensors)
        if name == "softmax" and self._scores is not None and self._shares is None and self._is_of_text(tensors[0]):
            return self._softmax(func, tensors[0], args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and tensors:
            source = next((t for t in tensors if id(t) in self._factors), tensors[0])
            self._follow(name, source, out, args, kwargs)
        return out

    def _is_of_text(self, x: Tensor) -> bool:
        """Tell whether scores are of every token for every token, and come from the product."""
        known = id(x) in self._factors and self._factors[id(x)][1] is not None and self.value_dim is None
        return known and x.shape[-2:] == (self._length, self._length)

    def _factor(self, tensor: Tensor) -> Any:
        return self._factors[id(tensor)][1] if id(tensor) in self._factors else 1.0

    def _follow(self, name: str, source: Tensor, out: Tensor, args: Any, kwargs: Any) -> None:
        """Note what a tensor has been multiplied by on its way."""
        factor = self._factor(source)
        other = next((value for value in args[1:2] if _is_number(value)), None)
        if other is not None and name in _TIMES:
            factor = factor * other
        elif other is not None and name in _BY:
            factor = factor / other
        elif name == "dropout" and self._shares is not None and source is self._shares[0]:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
            self._dropout = (given.get("p", 0.5), given.get("training", True))
        self._factors[id(out)] = (out, factor)
        if self._shares is not None and source is self._shares[0]:
            self._shares = (out, self._shares[1])

    def _product(self, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Note the product of queries and keys, or add the values to that of shares and values."""
        if self._shares is not None and left is self._shares[0] and self._values is not None:
            shares = F.dropout(self._shares[1], *self._dropout).to(out.dtype)
            self.value_dim = out.shape[-1]
            added = shares.reshape(*out.shape[:-1], -1) @ self._values.reshape(*out.shape[:-2], -1, out.shape[-1])
            self._shares = None
            return out + added
        if self._scores is None and out.shape[-2:] == (self._length, self._length) and self._batch:
            self.heads, self.key_dim = left.shape[:-2].numel() // self._batch, left.shape[-1]
            keys, self._values = self.rows(left, self._batch)
            keys = keys.to(left.dtype).reshape(*left.shape[:-2], -1, self.key_dim)
            self._scores = left @ keys.transpose(-1, -2) * self._factor(right)
            self._factors[id(out)] = (out, 1.0)
        return out

    def _softmax(self, func: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Return the shares of the text's columns, [.., N, S], with those of the added ones kept for the values."""
        assert self._scores is not None
        scores = (self._scores * self._factor(x)).to(x.dtype).reshape(*x.shape[:-1], -1)
        count = scores.shape[-1]
        both = torch.cat((scores, x), dim=-1)
        rest = {name: value for name, value in kwargs.items() if value is not x}
        out: Tensor = func(both, *args[1:], **rest)
        own = out[..., count:]
        self._shares = (own, out[..., :count])
        self._factors[id(own)] = (own, None)
        return own


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
