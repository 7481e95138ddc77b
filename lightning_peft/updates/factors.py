"""The parameters of one low-rank update, and what is computed from them alone."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_peft.core.gathering import of_the_first
from lightning_peft.core.private_torch import Movable, times_written
from lightning_peft.core.sharded import like
from lightning_peft.updates.in_place import without_autocast
from lightning_peft.updates.low_rank_init import OF_THE_WEIGHT, Init, factors_of, zero_update

_CHUNK = 2**24
_TINY = torch.finfo(torch.float32).tiny


class Factors(Movable):
    """The parameters of an update, in fp32: A [..., r, in], B [..., out, r] and, for DoRA, magnitudes m [..., out].

    Args:
        weight: gives, when called, the weight as a matrix [..., out, in].
        shape: of that weight; of a convolution [out, in, *kernel].
        device: of the new parameters.
        r: rank of the update.
        scale: s.
        use_dora: train magnitudes too.
        init: see `low_rank_init`.
        iterations: of a randomised singular value decomposition; None: the exact one.
    """

    m: nn.Parameter | None
    A0: Tensor | None
    B0: Tensor | None
    rank_axes: tuple[int, int] = (-2, -1)
    """The dimension of A and that of B which is the rank."""

    def __init__(
        self,
        weight: Callable[[], Tensor],
        shape: tuple[int, ...],
        device: torch.device,
        r: int,
        scale: float,
        use_dora: bool = False,
        init: Init = "kaiming",
        iterations: int | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.use_dora = use_dora
        self.subtracts_start = init in OF_THE_WEIGHT
        self._kept: dict[str, tuple[tuple[Any, ...], Any, tuple[Tensor, ...]]] = {}
        self.register_load_state_dict_pre_hook(_forget)
        shape_a, shape_b = self.shapes(shape, r)
        self.A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32, device=device))
        self.reset_parameters(init)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        if self.subtracts_start:
            a, b = factors_of(init, weight(), r, scale, iterations)  # type: ignore[arg-type]
            self.A0, self.B0 = a.reshape(shape_a).contiguous(), b.reshape(shape_b).contiguous()
            with torch.no_grad():
                self.A.copy_(self.A0)
                self.B.copy_(self.B0)
        norms = self.as_magnitude(_norms(weight())) if use_dora else None
        self.register_parameter("m", None if norms is None else nn.Parameter(norms))

    def shapes(self, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for a weight of ``shape``."""
        *stack, out_features, in_features = shape
        return (*stack, r, in_features), (*stack, out_features, r)

    def as_magnitude(self, norms: Tensor) -> Tensor:
        """Return norms [..., out] in the shape of m, which is the one of HF PEFT."""
        return norms

    def reset_parameters(self, init: Init) -> None:
        """Give A and B values whose product is zero."""
        zero_update(init, self.A, self.B, self.A.shape[-1], self.rank)

    @torch.no_grad()
    def begin(self, rows: Tensor) -> None:
        """Start from these rows of A [r', in], those of the first process; the others, and B, are zero."""
        whole_a = torch.zeros(self.A.shape, device=rows.device)
        whole_a[: len(rows)] = rows
        self.A.copy_(like(self.A, of_the_first(whole_a)))
        self.B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the whole update ``scale B A``: those of training, or of rank 2r where it has A₀ and B₀."""
        if not self.subtracts_start:
            return self.A, self.B
        assert self.A0 is not None
        assert self.B0 is not None
        along_a, along_b = self.rank_axes
        return torch.cat([self.A, self.A - self.A0], along_a), torch.cat([self.B - self.B0, self.B0], along_b)

    @property
    def rank(self) -> int:
        """The rank of A and B."""
        return int(self.A.shape[self.rank_axes[0]])

    @property
    def of_kernels(self) -> bool:
        """Whether the update is one of a convolution's kernels."""
        return self.rank_axes == (0, 1)

    def neutral_of(self, name: str, weight: Tensor) -> Tensor | None:
        """Return zeros for B and B₀, the norms of the rows of the weight for m, and None for A and A₀."""
        if name in ("B", "B0"):
            return torch.zeros_like(self.B)
        return self.as_magnitude(_norms(weight)) if name == "m" else None

    @torch.no_grad()
    def norm(self, weight: Tensor, keep: bool = False) -> Tensor:
        """Return ``‖W + s B A‖`` of each output, [out], in fp32, without building the sum.

        It is ``‖W‖² + 2 s (A Wᵀ ∘ Bᵀ) + s² (A Aᵀ Bᵀ ∘ Bᵀ)``, all products of which lead with the rank.

        Args:
            weight: W, [out, in].
            keep: use the norms of W that were kept, or keep them; it is frozen.
        """
        with without_autocast(self.A):
            a, b = (factor.detach().flatten(1) for factor in self.factors())
            weight = weight.detach()
            square, least = self.kept("norms", (weight,), lambda: _squares(weight)) if keep else _squares(weight)
            mixed = _product(a, weight)
            mixed = mixed.addmm_(torch.mm(a, a.t()), b.t(), beta=2 * self.scale, alpha=self.scale**2)
            # ‖W‖² + the sum over the rank of b ∘ mixed, in one kernel: a product of a row and a column for each output.
            moved = torch.baddbmm(square.view(-1, 1, 1), b.unsqueeze(1), mixed.t().unsqueeze(2))
            return torch.maximum(moved.flatten(), least).sqrt_()

    def kept(self, name: str, inputs: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """Return the cached result of ``compute``, unless an input is another tensor now or was written to.

        Writing through ``.data`` goes unseen: nothing is kept beyond a change of mode, of device or of state.
        """
        if any(tensor.is_inference() for tensor in inputs):  # which does not count what is written to it
            return compute()
        key = (torch.is_inference_mode_enabled(), *((_address(t), times_written(t), t.dtype, t.shape) for t in inputs))
        if name not in self._kept or self._kept[name][0] != key:
            # The inputs are held, too: the memory of one that is gone, as of a weight that another method computes at
            # each call, would be given to the next one, which then looks the same.
            self._kept[name] = key, compute(), inputs
        return self._kept[name][1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode and clear the cache."""
        self._kept.clear()
        return super().train(mode)

    def moving(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Clear the cache."""
        self._kept.clear()
        return super().moving(fn)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}}


def _forget(factors: Factors, *_: Any) -> None:
    factors._kept.clear()


def row_ratio(m: Tensor, weight: Tensor) -> Tensor:
    """Return by what to multiply the rows of a weight [..., out, in] to give them the norms m [..., out]."""
    return (m / _norms(weight).clamp_(min=_TINY)).unsqueeze(-1)


def _norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, in fp32, of a weight [..., out, in]."""
    weight = weight.detach()
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.promote_types(weight.dtype, torch.float32)).float()


def _squares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square of the norm of each row, and the least that it may become by an update.

    Rounding must not make a square negative; a row of zeros has no direction, and m is 0 there.
    """
    square = _norms(weight).square()
    return square, (1e-7 * square).clamp_(min=_TINY)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _product(a: Tensor, weight: Tensor) -> Tensor:
    """Return ``a Wᵀ``, [r, out], in the dtype of a; a W of half precision is cast in parts."""
    if weight.dtype == a.dtype:
        return torch.mm(a, weight.t())
    parts = [torch.mm(a, part.to(a.dtype).t()) for part in weight.split(max(1, _CHUNK // weight.shape[1]))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
