"""What several deltas of one method on one backbone have in common: they are applied, removed and saved together."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.core import arguments, select
from lightning_peft.core.delta import save_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.streams import Stream
from lightning_peft.core.tuning import Tuning
from lightning_peft.training.method import Method


@dataclass(eq=False)
class Members(Method):
    """Deltas of one method, named NAME_0, NAME_1 ..., of which one computes at a time.

    Args:
        method: what each of them is.
    """

    method: Method

    shards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Take over where the backbone is, and its mode."""
        self.backbone, self.backbone_mode = self.method.backbone, self.method.backbone_mode
        self.keep_fp32 = self.method.keep_fp32

    @cached_property
    def members(self) -> list[Method]:
        """The methods of the members."""
        raise NotImplementedError

    @cached_property
    def streams(self) -> list[Stream]:
        """Where each member draws its random numbers from."""
        return [Stream(number) for number in range(len(self.members))]

    @property
    def names(self) -> list[str]:
        """The names of the members."""
        return [member.delta for member in self.members]

    @property
    def keys(self) -> frozenset[str]:
        """The names of the methods of the members in the backbone's record."""
        return frozenset(member.key for member in self.members)

    def apply(self, model: nn.Module) -> None:
        """Add the members, each with the initial values of its seed; all rest. On any error nothing has changed.

        Raises:
            TuningError: the members do not fit the backbone, or are such themselves.
        """
        arguments.check_arguments(self)
        if isinstance(self.method, Members):
            kind, own = type(self).__name__, type(self.method).__name__
            raise TuningError(f"a {kind} of a {own} has no members to train: give it a method, such as LoRA.")
        backbone = select.backbone_of(model, self.backbone)
        tuning = Tuning.of(backbone)
        before = frozenset() if tuning is None else tuning.switch.off
        done: list[Method] = []
        try:
            for member, stream in zip(self.members, self.streams, strict=True):
                if (tuning := Tuning.of(backbone)) is not None:
                    tuning.rest(backbone, frozenset(tuning.methods))
                with stream:
                    member.apply(model)
                done.append(member)
        except BaseException:
            for member in done:
                member.remove(model)
            if (left := Tuning.of(backbone)) is not None:
                left.rest(backbone, before)
            raise
        tuning = Tuning.of(backbone)
        assert tuning is not None
        tuning.rest(backbone, before | self.keys)
        tuning.apart |= self.keys

    def remove(self, model: nn.Module) -> None:
        """Remove all members."""
        for member in self.members:
            member.remove(model)

    def applied(self, module: nn.Module) -> Self | None:
        """Return this, if all members are applied."""
        return self if all(member.is_applied(module) for member in self.members) else None

    def save(self, model: nn.Module, folder: str | Path) -> list[Path]:
        """Write each member to a file of its name and return the paths."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [save_delta(model, Path(folder) / f"{name}.safetensors", name) for name in self.names]

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return the sum of the members' penalties."""
        found = [p for member in self.members if (p := member.penalty(module)) is not None]
        return torch.stack([p.reshape(()) for p in found]).sum() if found else None

    def parameters_of(self, module: nn.Module, member: Method) -> dict[str, nn.Parameter]:
        """Return what a member trains, by name below the backbone."""
        places = grafts(self._tuned(module), member.key)
        return {f"{place.full_name}.{name}": p for place in places for name, p in place.graft.named_parameters()}

    def let_compute(self, module: nn.Module, member: Method | None) -> None:
        """Let one member compute, and the others rest; None: all rest."""
        backbone = self._tuned(module)
        tuning = Tuning.of(backbone)
        if tuning is not None:
            own = frozenset() if member is None else member.keys
            tuning.rest(backbone, (tuning.switch.off | self.keys) - own)

    def state_dict(self) -> dict[str, Any]:
        """Return where the random numbers are."""
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` has returned."""
        for stream, state in zip(self.streams, state_dict["streams"], strict=True):
            stream.load_state_dict(state)
