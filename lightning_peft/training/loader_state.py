"""What a pass through a data loader begins from, and wrappers of loaders that are still the loader that they wrap."""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch

from lightning_peft.training import signals
from lightning_peft.training.random_states import (
    own_states,
    plain,
    random_state,
    set_own_states,
    set_random_state,
    snapshot,
)
from lightning_peft.training.record import Life

_FEW = 64


class SameLoader:
    """A wrapper of a loader that forwards reading and writing of attributes to it, and is an instance of its class."""

    loader: Any = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the loader: ``trainer.train_dataloader`` stays a ``DataLoader``."""
        return type(self.loader)

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is of this class here and all else on the loader, such as Lightning's ``worker_init_fn``."""
        if hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.loader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),), vars(self)


class ValidationLoader(SameLoader):
    """Any loader, which remembers what a validation begins from.

    Args:
        loader: what Lightning is about to read.
        trainer: whose fit validates.
    """

    trainer: Any = None
    began: Any = None
    number = 0

    def __init__(self, loader: Any, trainer: L.Trainer) -> None:
        super().__init__(loader)
        life = Life.of(trainer.lightning_module)
        self.trainer, self.number = trainer, len(life.validation_loaders)
        life.validation_loaders.append(self)

    def __iter__(self) -> Iterator[Any]:
        if self.trainer.training:  # Lightning counts a validation that is done without reading it
            return iter(())
        life = Life.of(self.trainer.lightning_module)
        if self.number < len(life.validation_states) and not self.trainer.sanity_checking:
            go_on_from(self.loader, life.validation_states[self.number] or {})
            life.validation_states[self.number] = None
        self.began = state_of(self.loader)
        if life.validation_random is None:
            life.validation_random = random_state()
        with signals.held_back():  # worker processes are started here
            return iter(self.loader)


def state_of(loader: Any) -> dict[str, Any]:
    """Return what the next pass through a loader begins from, beside the random state of this process."""
    return {"generators": own_states(loader), "goes_on": goes_on(loader)}


def go_on_from(loader: Any, state: Mapping[str, Any]) -> None:
    """Make the next pass through a loader begin from what `state_of` returned."""
    if state.get("goes_on") and not goes_on(loader):
        before = snapshot()
        with signals.held_back():
            iter(loader)  # what follows is no first pass, for which workers are started with a seed that is drawn
        set_random_state(plain(before))
    set_own_states(loader, state.get("generators", ()))


def goes_on(loader: Any) -> bool:
    """Tell whether a loader has worker processes that have served a pass and serve the next one.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/data/dataloader.py
    """
    return isinstance(loader, torch.utils.data.DataLoader) and loader._iterator is not None


def sample_of(batch: Any) -> int:
    """Return a checksum of a few values of each tensor of a batch, in some microseconds."""
    if isinstance(batch, torch.Tensor):
        if batch.layout is not torch.strided or batch.is_quantized:
            return 0
        flat = batch.detach().reshape(-1)
        few = flat[:: max(1, len(flat) // _FEW)][:_FEW].cpu().contiguous().view(torch.uint8)
        return zlib.crc32(few.numpy().tobytes(), zlib.crc32(str(tuple(batch.shape)).encode()))
    if isinstance(batch, Mapping):
        return sum((1 + i) * sample_of(value) for i, value in enumerate(batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum((1 + i) * sample_of(value) for i, value in enumerate(batch[:_FEW]))
    return zlib.crc32(repr(batch).encode()) if isinstance(batch, (str, int, float, bytes)) else 0
