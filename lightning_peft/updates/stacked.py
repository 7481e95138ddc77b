"""Experts stacked in one tensor, ``W_e + s B_e A_e``, multiplied by the tokens of each expert without building the sum.

The tensor that a host reads poses as the changed weight. What hosts do with experts it answers by low-rank products: to
pick one by its number, to multiply the tokens of one, or grouped tokens by all of them. For anything else it becomes
the changed weight.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.updates import in_place

_GROUPED = ("grouped_mm", "grouped_mm_fallback")


class ChangedExperts(Tensor):
    """Poses as ``W + s B A`` of each expert, [E, out, in], or transposed, [E, in, out], or as one expert of them."""

    factors: tuple[Tensor, Tensor]
    scale: float
    flipped: bool

    @classmethod
    def of(cls, w: Tensor, factors: tuple[Tensor, Tensor], scale: float, flipped: bool) -> "ChangedExperts":
        """Return the tensor that poses as a changed weight.

        Args:
            w: the weight as it is stored.
            factors: A [..., r, in] and B [..., out, r].
            scale: s.
            flipped: whether the weight is [..., in, out].
        """
        self = w.as_subclass(cls)
        self.factors, self.scale, self.flipped = factors, scale, flipped
        return self

    def whole(self) -> Tensor:
        """Return the changed weight, computed in fp32."""
        a, b = self.factors
        w = self.as_subclass(Tensor)
        with in_place.without_autocast(w):
            changed = torch.add(w.mT if self.flipped else w, b @ a, alpha=self.scale)
        return (changed.mT if self.flipped else changed).to(w.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer by low-rank products where there are some, else as the changed weight."""
        kwargs = kwargs or {}
        with in_place.as_plain_tensors():
            answer = _answer(func, args, kwargs)
            if answer is not NotImplemented:
                return answer
            return func(*_whole(args), **dict(zip(kwargs, _whole(tuple(kwargs.values())), strict=True)))


def changes(w: Tensor) -> bool:
    """Tell whether a weight is a plain stack of experts, in an eager run."""
    return w.dim() == 3 and in_place.is_eager(w) and type(w) in (Tensor, torch.nn.Parameter)


def _answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else None
    name = getattr(func, "__name__", "").removesuffix(".default")
    if isinstance(first, ChangedExperts):
        if func is Tensor.__getitem__ and not isinstance(args[1], tuple):
            a, b = first.factors
            plain = first.as_subclass(Tensor)[args[1]]
            return ChangedExperts.of(plain, (a[args[1]], b[args[1]]), first.scale, first.flipped)
        if name == "transpose" and {axis % first.dim() for axis in args[1:]} == {first.dim() - 2, first.dim() - 1}:
            plain = first.as_subclass(Tensor).transpose(-2, -1)
            return ChangedExperts.of(plain, first.factors, first.scale, not first.flipped)
        if name in ("__get__", "size", "dim", "stride", "numel", "data_ptr", "is_contiguous", "element_size"):
            found = func(*args, **kwargs)
            return NotImplemented if isinstance(found, Tensor) else found
    second = args[1] if len(args) > 1 else None
    if isinstance(second, ChangedExperts) and isinstance(first, Tensor):
        if func is F.linear and second.dim() == 2 and not second.flipped:
            a, b = (factor.to(first.dtype) for factor in second.factors)
            plain = F.linear(first, second.as_subclass(Tensor), *args[2:], **kwargs)
            return torch.add(plain, F.linear(F.linear(first, a), b).to(plain.dtype), alpha=second.scale)
        if name.lstrip("_") in _GROUPED and second.flipped:
            a, b = _padded(*(factor.to(first.dtype) for factor in second.factors))
            low = func(func(first, a.mT, *args[2:], **kwargs), b.mT, *args[2:], **kwargs)
            return torch.add(func(first, second.as_subclass(Tensor), *args[2:], **kwargs), low, alpha=second.scale)
    return NotImplemented


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors whose rank is a multiple of 16 bytes, which grouped products ask for, the rest being zero."""
    rest = -a.shape[-2] % (16 // a.element_size())
    return F.pad(a, (0, 0, 0, rest)), F.pad(b, (0, rest))


def _whole(values: Any) -> Any:
    if isinstance(values, ChangedExperts):
        return values.whole()
    return type(values)(_whole(value) for value in values) if isinstance(values, (tuple, list)) else values
