"""Data for multi-task text classification: rows of several tasks, each with the number of its task."""

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from datasets import Dataset, concatenate_datasets

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.batches import Batches, TaskBatches
from lightning_peft.data.module import SPLITS
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.data.token_data import TokenData


class MultiTaskData(TokenData):
    """Texts of several tasks, each with classes of its own.

    A batch has ``task_ids`` [B], the number of the task of each row in the order of ``tasks``, and ``labels`` [B], the
    number of the class among those of its task.

    >>> data = MultiTaskData(
    ...     tokenizer="bert-base-uncased",
    ...     tasks={"polarity": {"train": "reviews.csv"}, "topic": {"train": "news.csv", "text": "title"}},
    ... )
    >>> list(data.parts)
    ['polarity', 'topic']

    Args:
        tasks: name of a task -> the arguments of its `TextClassificationData`, but for those that all tasks share.
        cap: the most rows of a task in an epoch; an epoch has ``min(rows, cap)`` rows of each, drawn anew.
        mixed: whether a batch has rows of several tasks; else every batch is of one.
        **kwargs: as in `TokenData`, shared by the tasks.
    """

    def __init__(
        self, tasks: dict[str, dict[str, Any]], cap: int | None = 3000, mixed: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not tasks:
            raise TuningError(
                "tasks={} leaves nothing to learn: name one task or more, with the arguments of its data."
            )
        if cap is not None and cap < 1:
            raise TuningError(f"cap={cap} leaves no rows: take 1 or more, or None for all.")
        self.cap = cap
        self.mixed = mixed
        shared = {"tokenizer": self.tokenizer_name, "max_length": self.max_length, "seed": self.seed}
        self.parts = {name: _part(name, arguments, shared) for name, arguments in tasks.items()}

    @cached_property
    def label_names(self) -> dict[str, list[str]]:
        """The names of the classes of each task."""
        return {name: part.label_names for name, part in self.parts.items()}

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits of all tasks.

        Raises:
            TuningError: some tasks have a split and others have not, or rows of a task are wrong.
        """
        for split in SPLITS[stage]:
            if split in self._encoded:
                continue
            found = {name: part.rows(split) for name, part in self.parts.items()}
            without = [name for name, rows in found.items() if rows is None]
            if without and len(without) < len(found):
                raise TuningError(f"task {without[0]!r} has no {split} split, others have: give it one.")
            if not without:
                self._encoded[split] = self._join(found, split)
        self.check_loaders(stage)

    def batches(self, split: str, shuffle: bool, **share: Any) -> Batches:
        """Return which rows make which batch, with the share and the cap of each task."""
        rows = self._split(split).with_format("numpy")
        return TaskBatches(
            rows["length"][:],
            self.batch_size,
            shuffle,
            self.bucket,
            self.seed,
            tasks=rows["task_ids"][:],
            cap=self.cap,
            mixed=self.mixed,
            **share,
        )

    def _join(self, found: Mapping[str, Any], split: str) -> Dataset:
        encoded = []
        for number, (name, part) in enumerate(self.parts.items()):
            try:
                rows = part._encode(found[name], split).with_format(None)
            except TuningError as error:
                raise TuningError(f"task {name!r}: {error}") from None
            encoded.append(rows.add_column("task_ids", [number] * len(rows)))
        joined = concatenate_datasets(encoded)
        return joined.with_format(None, columns=[name for name in joined.column_names if name != "length"])


def _part(name: str, arguments: Mapping[str, Any], shared: Mapping[str, Any]) -> TextClassificationData:
    known = {
        argument
        for kind in TextClassificationData.__mro__
        if issubclass(kind, TokenData)
        for argument in inspect.signature(kind.__init__).parameters
    }
    own = known - {"self", "kwargs", *inspect.signature(TokenData.__init__).parameters}
    for argument in arguments:
        if argument not in own:
            raise TuningError(f"task {name!r} has the argument {argument!r}, its data have not{near(argument, own)}.")
    return TextClassificationData(**shared, **arguments)
