"""How a module has the matrices that it reads itself."""

from typing import NamedTuple, Self

from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.product import Product
from lightning_peft.core.reads import products_of


class Layout(NamedTuple):
    """Where the outputs and the inputs of a parameter lie.

    Attributes:
        transposed: whether its last dimensions are [in, out].
        product: how it is multiplied by, if it is a matrix of more than two dimensions.
    """

    transposed: bool
    product: Product | None

    @classmethod
    def of(cls, host: nn.Module, name: str) -> Self:
        """Return the layout of a parameter of a module."""
        return cls(structure.is_transposed(host), products_of(host).get(name))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as [out, in], of stacked experts as [E, out, in]."""
        if self.product is not None:
            return self.product.matrix(weight)
        return weight.mT if self.transposed else weight

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return a matrix in the shape of the parameter."""
        if self.product is not None:
            return self.product.stored(matrix, like)
        return matrix.mT if self.transposed else matrix
