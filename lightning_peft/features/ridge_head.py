"""A head on random features whose weight is ridge regression on all rows that it has been told of."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.gathering import rows_in_turn
from lightning_peft.core.graft import Graft
from lightning_peft.core.placement import device_of
from lightning_peft.core.private_torch import times_written
from lightning_peft.core.sharded import like
from lightning_peft.updates.in_place import without_autocast

HELD = 5
"""Each row of this number is held out to choose lambda by."""
RIDGES = [10.0**n for n in range(-8, 9)]


class RandomHead(Graft):
    """Gives the logits in place of its host, from random features of its input, and sums over the rows it is told of.

    Args:
        host: the layer that gave the logits.
        width: M.
        ridge: lambda; None: some rows are summed apart to choose it.
    """

    hides = ("weight", "bias")
    directions: Tensor
    rows: Tensor
    labels: Tensor | None = None
    """Set for one call, whose rows are added to the sums, [B]."""

    def __init__(self, host: nn.Linear, width: int, ridge: float | None) -> None:
        super().__init__()
        device, classes = device_of(host), host.out_features
        self.ridge = ridge
        self.names = ("fitted", "held") if ridge is None else ("fitted",)
        self.register_buffer("directions", torch.randn(host.in_features, width, device=device))
        self.register_buffer("rows", torch.zeros(1, dtype=torch.long, device=device))
        for name in self.names:
            for what, size in (("products", width), ("targets", classes)):
                sums = torch.zeros(width, size, dtype=torch.float64, device=device)
                self.register_buffer(f"{name}_{what}", sums)
        self.weight = nn.Parameter(torch.zeros(classes, width, device=device))
        self.register_state_dict_pre_hook(_solve_first)
        self._chosen: tuple[tuple[int, int], float] = (0, 0), 0.0

    def around(self, forward: Callable[..., Any], host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``ReLU(x R) Wᵀ``, [B, C]."""
        labels, self.labels = self.labels, None
        with without_autocast(x):
            hidden = (x.float() @ self.directions).relu()
            if labels is not None:
                self.add(hidden.detach(), labels)
            return F.linear(hidden, self.weight).to(x.dtype)

    def add(self, hidden: Tensor, labels: Tensor) -> None:
        """Add the rows of all processes to the sums.

        Raises:
            TuningError: there is not one label for each row.
        """
        if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
            raise TuningError(
                f"labels of shape {list(labels.shape)} are not one for each of the rows {list(hidden.shape)}: RanPAC "
                "is for classes of whole rows."
            )
        hidden, labels = rows_in_turn(hidden).double(), rows_in_turn(labels)
        targets = F.one_hot(labels, len(self.weight)).double()
        number = self.rows + torch.arange(len(hidden), device=hidden.device)
        held = (number % HELD == HELD - 1).double().unsqueeze(1) * (len(self.names) - 1)
        for name, share in zip(self.names, (1 - held, held), strict=False):
            self.get_buffer(f"{name}_products").add_((share * hidden).t() @ hidden)
            self.get_buffer(f"{name}_targets").add_((share * hidden).t() @ targets)
        self.rows.add_(len(hidden))

    @torch.no_grad()
    def solve(self) -> None:
        """Give W the values for all rows so far, if they are enough."""
        if int(self.rows) < self.least:
            return
        products, targets = self._total("products"), self._total("targets")
        products.diagonal().add_(self._lambda())
        found = torch.linalg.solve(products, targets)
        self.weight.copy_(like(self.weight, found.t().to(self.weight.dtype)))

    @property
    def least(self) -> int:
        """How many rows there must be to solve for W."""
        return HELD if self.ridge is None else 1

    def chosen(self) -> float:
        """Return the lambda of least squared error on the rows held out, W being that of the others."""
        found = self.get_buffer("fitted_products"), self.get_buffer("fitted_targets")
        products, targets = self.get_buffer("held_products"), self.get_buffer("held_targets")
        values, vectors = torch.linalg.eigh(found[0])
        turned, inside, held = vectors.t() @ found[1], vectors.t() @ products @ vectors, vectors.t() @ targets
        errors = []
        for ridge in RIDGES:  # |h W - y|² over the rows held out, without what does not depend on W
            weight = turned / (values.clamp(min=0) + ridge).unsqueeze(1)
            errors.append((weight * (inside @ weight - 2 * held)).sum())
        return RIDGES[int(torch.stack(errors).argmin())]

    def _lambda(self) -> float:
        """Return lambda; it is chosen anew where the sums have changed."""
        if self.ridge is not None:
            return self.ridge
        held = self.get_buffer("held_products")
        key = id(held), times_written(held)
        if key != self._chosen[0]:
            self._chosen = key, self.chosen()
        return self._chosen[1]

    def _total(self, what: str) -> Tensor:
        return torch.stack([self.get_buffer(f"{name}_{what}") for name in self.names]).sum(0)


def _solve_first(graft: nn.Module, *_: Any) -> None:
    """Let what is saved be W for all rows so far."""
    assert isinstance(graft, RandomHead)
    graft.solve()
