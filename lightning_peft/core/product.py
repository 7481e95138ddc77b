"""How a module multiplies its input by a parameter that is no plain matrix, such as XLNet's [width, heads, d_head]."""

import math
from typing import NamedTuple, Self

from torch import Tensor


class Product(NamedTuple):
    """A parameter as a matrix: its first dimensions are one side of it, its last ones the other.

    Attributes:
        first: how many dimensions the first side has.
        sums_first: whether the first side is summed over, so that it is the inputs.
    """

    first: int
    sums_first: bool

    @classmethod
    def in_einsum(cls, equation: str, operand: int) -> Self | None:
        """Return how an equation multiplies by its operand of this index, or None if not as by a matrix.

        Each dimension is either summed over or new; one that stays, such as that of stacked experts, is neither.

        >>> Product.in_einsum("ibh,hnd->ibnd", 1), Product.in_einsum("ibnd,hnd->ibh", 1)
        (Product(first=1, sums_first=True), Product(first=1, sums_first=False))
        >>> Product.in_einsum("ibnd,snd->ibns", 1) is None
        True
        """
        given, arrow, result = equation.replace(" ", "").partition("->")
        parts = given.split(",")
        if not arrow or not 0 <= operand < len(parts) or "." in equation:
            return None
        own, others = parts[operand], "".join(parts[:operand] + parts[operand + 1 :])
        summed = [letter in others and letter not in result for letter in own]
        new = [letter in result and letter not in others for letter in own]
        first = next((i for i, is_summed in enumerate(summed) if is_summed != summed[0]), 0)
        if not first or new != [not each for each in summed] or len(set(summed[first:])) > 1:
            return None
        return cls(first, summed[0])

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the parameter as [out, in], a view of it where it lies in one piece."""
        rows = weight.reshape(math.prod(weight.shape[: self.first]), -1)
        return rows.t() if self.sums_first else rows

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return a matrix [out, in] in the shape of the parameter."""
        return (matrix.t() if self.sums_first else matrix).reshape(like.shape)
