"""The base class of tasks that train nothing, and read rows as they are."""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.data.fields import as_fields
from lightning_peft.data.protocols import LabelledRows, Reencodable, Rows
from lightning_peft.tasks.base import Task


class FrozenTask(Task):
    """A task that trains nothing; it runs under ``validate``, ``test`` and ``predict``.

    The data module gives its rows as they are (`lightning_peft.data.fields`), whichever it is; batches of any other
    loader need a list of rows, mappings from columns to values, under ``fields``.

    Args:
        **kwargs: as in `Task`.
    """

    def configure_callbacks(self) -> list[L.Callback]:
        """Ask the data module for rows as they are, before it reads them."""
        if isinstance(self.data, Reencodable):
            self.data.encode_as(self._fields_of)
        return list(super().configure_callbacks())

    def needed(self, split: str) -> list[list[str]]:
        """Return groups of columns: of each, one column of a row must have something in it."""
        return []

    def _fields_of(self, rows: Any, split: str) -> Any:
        assert isinstance(self.data, Rows)
        return as_fields(self.data, self.needed(split), rows, split)

    def setup(self, stage: str) -> None:
        """Check that the data are for this task.

        Raises:
            TuningError: something is to be trained, or as `check_data` says.
        """
        if stage == "fit":
            raise TuningError(f"{type(self).__name__} trains nothing: run validate, test or predict.")
        # Prompts are written before a batch is moved, by this module and not by the data, which Lightning warns of.
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
        self.check_data(self.data, stage)

    def teardown(self, stage: str) -> None:
        """Let the data module encode its rows itself again."""
        if isinstance(self.data, Reencodable):
            self.data.encode_as(None)

    def loss(self, batch: Any) -> Tensor:
        """Refuse: nothing trains."""
        raise TuningError(f"{type(self).__name__} trains nothing: run validate, test or predict.")

    def rows_of(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a batch.

        Raises:
            TuningError: it has none.
        """
        if "fields" not in batch:
            raise TuningError(
                f"a batch with {', '.join(map(str, batch))} has no rows as text: take a data module of this package, "
                "or give batches a list of rows under 'fields'."
            )
        rows: list[dict[str, Any]] = batch["fields"]
        return rows

    def training_rows(self, what: str) -> Any:
        """Return the training rows of the data module; ``what`` they are for.

        Raises:
            TuningError: there are none.
        """
        rows = None
        if isinstance(self.data, Reencodable):
            rows = self.data.usable("train")
        elif isinstance(self.data, Rows):
            rows = self.data.rows("train")
        if rows is None:
            raise TuningError(f"{what} come from training rows, and the data have none: give a train split.")
        return rows

    def labelled(self) -> LabelledRows:
        """Return the data module, whose rows have classes.

        Raises:
            TuningError: it has no classes.
        """
        if not isinstance(self.data, LabelledRows):
            raise TuningError("demonstrations need labelled training rows: give a data module with classes.")
        return self.data
