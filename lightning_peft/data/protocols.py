"""What a task asks of a data module; any `LightningDataModule` that has these members will do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Truncated(Protocol):
    """Texts of at most ``max_length`` tokens."""

    max_length: int


@runtime_checkable
class Labelled(Protocol):
    """Rows of named classes; of several tasks: task -> names."""

    label_names: Sequence[str] | Mapping[str, Sequence[str]]


@runtime_checkable
class StyledGaps(Protocol):
    """Rows with a gap for a 'masked' or 'causal' language model."""

    style: str


@runtime_checkable
class MaskedGaps(Protocol):
    """Rows with a gap of ``masks`` tokens."""

    masks: int


@runtime_checkable
class Candidates(Protocol):
    """Rows with a gap that one of these words fills."""

    candidates: Sequence[str]


@runtime_checkable
class ScoredPairs(Protocol):
    """Pairs of texts, with scores or without."""

    is_scored: bool


@runtime_checkable
class Windows(Protocol):
    """Contexts cut into windows that share ``stride`` tokens."""

    stride: int


@runtime_checkable
class ClassSets(Protocol):
    """Images whose test scores these sets of classes apart."""

    test_sets: Mapping[str, Sequence[str]]


@runtime_checkable
class FeatureStore(Protocol):
    """Images that can be replaced by their features."""

    def encode(self, encoder: Callable[[Tensor], Tensor]) -> None:
        """Let batches hold features in place of pixels."""


@runtime_checkable
class TaskSequence(Protocol):
    """Rows of classes that come one task after another."""

    task_classes: list[list[int]]
    epochs_per_task: int

    def task_at(self, epoch: int) -> int:
        """Return the number of the task that an epoch trains."""


@runtime_checkable
class Rows(Protocol):
    """Rows of columns."""

    def rows(self, split: str) -> Any:
        """Return the rows of a split, or None."""


@runtime_checkable
class Worded(Protocol):
    """Classes that may have a text of their own, in which ``{}`` stands for the name."""

    template: str | None


@runtime_checkable
class LabelledRows(Rows, Labelled, Protocol):
    """Rows whose column ``label`` holds the class."""

    label: str


@runtime_checkable
class TextColumns(Protocol):
    """Rows whose columns ``text`` hold the text."""

    text: Sequence[str]


@runtime_checkable
class Reencodable(Protocol):
    """Rows that another may encode."""

    def encode_as(self, encoding: Any) -> None:
        """Let ``encoding`` encode the rows; None: as the data module does itself."""

    def usable(self, split: str) -> Any:
        """Return the rows of a split without those that are left out, or None."""
