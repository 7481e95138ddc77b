"""Sparse differences to the weights of modules, which these read in place of their own: the grafts of diff-pruning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core.folding import Folding
from lightning_peft.core.tracing import is_traced
from lightning_peft.updates.hard_concrete import ExpectedCount, Masked, Scattered, gate, scatter, seed_of, uniform_op

_SEEDS = 2**31 - 1


class Gates(NamedTuple):
    """The gates of a difference.

    Attributes:
        alpha: their logits at the start.
        low: lower end of the interval that they are stretched to, negative.
        high: its upper end, above 1.
        structured: whether a tensor has a gate of its own beside those of its entries.
    """

    alpha: float
    low: float
    high: float
    structured: bool


def draw_seed() -> int:
    """Draw the seed of the noise of all gates in one step."""
    return int(torch.randint(_SEEDS, ()).item())


class Noise(Folding):
    """Draws, before each forward pass of the backbone in training, the seed of the noise of all gates."""

    folds = ()

    def __init__(self) -> None:
        super().__init__()
        self.value = 0
        self.seed = torch.zeros(1, dtype=torch.int64)  # the same number, for compiled graphs; no buffer, to stay on CPU
        self.is_given = False  # a Trainer gives it, the same to all processes

    def around(self, forward: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Draw a seed and run the forward pass."""
        if self.training and not self.is_given:
            if is_traced():
                self.seed = torch.randint(_SEEDS, (1,))
            else:
                self.give(draw_seed())
        return forward(*args, **kwargs)

    def give(self, value: int) -> None:
        """Set the seed."""
        self.value = value
        self.seed = torch.full((1,), value)


class SparseDifference(Folding):
    """Lets its host read ``theta_0 + delta`` in place of its own parameters.

    For a parameter ``weight`` it has, dense, ``weight_w`` and ``weight_alpha`` in its shape and ``weight_group`` [1],
    or, sparse, ``weight_values`` [n] and the flat ``weight_indices`` [n]; neither if nothing of it was kept.

    Args:
        host: the module.
        names: of the host's parameters, with their numbers in the model, which their noise depends on.
        noise: the seed.
        gates: how they start, and their interval.
    """

    noise: Noise

    def __init__(self, host: nn.Module, names: Mapping[str, int], noise: Noise, gates: Gates) -> None:
        super().__init__()
        self.weights = self.folds = tuple(names)
        self.numbers = dict(names)
        self.gates = gates
        self.refer(noise=noise)
        for name in names:
            self.make_dense(name, host.get_parameter(name))

    def make_dense(self, name: str, parameter: Tensor) -> None:
        """Give a parameter w, zero, and open gates."""
        self._forget(name)
        new = {"dtype": torch.float32, "device": parameter.device}
        shape = parameter.shape or (1,)  # a strategy may not shard what has no dimension
        self._put(name, "w", torch.zeros(shape, **new))  # type: ignore[call-overload]
        self._put(name, "alpha", torch.full(shape, self.gates.alpha, **new))  # type: ignore[call-overload]
        if self.gates.structured:
            self._put(name, "group", torch.full((1,), self.gates.alpha, **new))  # type: ignore[call-overload]

    def make_sparse(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Keep of a parameter's difference these entries alone, and train their values."""
        self._forget(name)
        if len(indices):
            self._put(name, "values", values.detach().clone())
            self.register_buffer(_key(name, "indices"), indices)

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return zeros for differences."""
        return torch.zeros_like(self.get_parameter(name)) if name.endswith(("_w", "_values")) else None

    def part(self, name: str, part: str) -> Any:
        """Return a tensor that belongs to a parameter, or None."""
        return getattr(self, _key(name, part), None)

    def is_dense(self) -> bool:
        """Tell whether gates are trained."""
        return any(self.part(name, "w") is not None for name in self.weights)

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return ``theta_0 + delta`` in the shape and dtype of ``w``."""
        dense, values = self.part(name, "w"), self.part(name, "values")
        if self.merged or (dense is None and values is None):
            return w
        if w.dim() == 0:
            return self.weight(w.reshape(1), name).reshape(())
        if values is not None:
            indices = self.part(name, "indices")
            if is_traced():
                return scatter(w, values, indices)
            return Scattered.apply(w, values, indices)
        alpha, group = self.part(name, "alpha"), self.part(name, "group")
        number = 2 * self.numbers[name]
        if is_traced():
            return self._traced(w, dense, alpha, group, self.noise.seed if self.training else None, number)
        seed = seed_of(self.noise.value, number) if self.training else None  # place(seed, 1) is that of the group
        return Masked.apply(w, dense, alpha, group, seed, self.gates.low, self.gates.high)

    def delta(self, name: str) -> Tensor | None:
        """Return the difference to a parameter as at inference, dense or as it is kept; None: there is none."""
        if self.part(name, "values") is not None:
            return self.part(name, "values")
        w, group = self.part(name, "w"), self.part(name, "group")
        if w is None:
            return None
        delta = gate(self.part(name, "alpha"), None, self.gates.low, self.gates.high).mul_(w)
        return delta if group is None else delta.mul_(gate(group, None, self.gates.low, self.gates.high))

    def expected(self, name: str) -> Tensor | None:
        """Return the expected number of entries of a parameter that differ, [1]; None: its gates are gone."""
        alpha = self.part(name, "alpha")
        if alpha is None:
            return None
        return ExpectedCount.apply(alpha, self.part(name, "group"), self.gates.low, self.gates.high)

    def keep(self, name: str, indices: Tensor) -> None:
        """Keep of a parameter's dense difference the entries at these flat indices."""
        dense = self.delta(name)
        assert dense is not None
        narrow = torch.int32 if dense.numel() <= torch.iinfo(torch.int32).max else torch.int64
        self.make_sparse(name, indices.to(narrow), dense.reshape(-1)[indices])

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Add the difference to the parameter."""
        delta = self.delta(name)
        if delta is None:
            return value
        if value.dim() == 0:
            return self.fold(name, value.reshape(1), host).reshape(())
        indices = self.part(name, "indices")
        return value.add_(delta) if indices is None else scatter(value, delta, indices)

    def _traced(
        self, w: Tensor, dense: Tensor, alpha: Tensor, group: Tensor | None, seed: Tensor | None, number: int
    ) -> Tensor:
        """Return the same in operations that a compiler sees through; it fuses them, and chooses what to keep."""
        value = dense
        for i, logits in enumerate((alpha, group)):
            if logits is not None:
                shift = logits
                if seed is not None:
                    shift = logits + uniform_op(logits.detach(), seed, number + i).logit()
                value = value * (torch.sigmoid(shift) * (self.gates.high - self.gates.low) + self.gates.low).clamp(0, 1)
        return (w + value).to(w.dtype)

    def _put(self, name: str, part: str, values: Tensor) -> None:
        self.register_parameter(_key(name, part), nn.Parameter(values))

    def _forget(self, name: str) -> None:
        for part in ("w", "alpha", "group", "values", "indices"):
            if self.part(name, part) is not None:
                delattr(self, _key(name, part))


class Twin(Folding):
    """Lets a host read a tied parameter as another host does.

    Args:
        names: name of the parameter here -> its name there.
        first: the graft of the other host.
    """

    first: SparseDifference

    def __init__(self, names: Mapping[str, str], first: SparseDifference) -> None:
        super().__init__()
        self.weights = self.folds = tuple(names)
        self.names = dict(names)
        self.refer(first=first)

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the parameter as the other graft changes it."""
        return self.first.weight(w, self.names[name])


def _key(name: str, part: str) -> str:
    return f"{name.replace('.', '_')}_{part}"
