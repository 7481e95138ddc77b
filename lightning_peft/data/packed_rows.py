"""Puts texts end to end in rows of one length, so that nothing is padding."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.core.labels import IGNORED
from lightning_peft.data.checked_rows import CheckedRows
from lightning_peft.data.padding import Padder


class PackedRows(CheckedRows):
    """Texts that a causal model goes on with, whose rows may be packed.

    Args:
        packing: put rows end to end, for training and validation.
        **kwargs: as in `CheckedRows`.
    """

    def __init__(self, packing: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.packing = packing

    def padder(self, split: str) -> Callable[..., dict[str, Any]]:
        """Return what makes a batch of rows: training pads on the right, prompts to go on from end at the right."""
        return Padder.of(self.tokenizer, "left" if split == "predict" else "right", self.pad_to_multiple_of)

    def finished(self, encoded: Dataset, split: str) -> Dataset:
        """Pack the rows, if asked."""
        if not self.packing or split not in ("train", "validation"):
            return encoded
        return packed(encoded, self.max_length, self.tokenizer.pad_token_id, f"Packing {split}")


def packed(rows: Dataset, max_length: int, pad: int, what: str) -> Dataset:
    """Return the rows packed; ``what`` is being done, for the bar that shows how far it is."""
    how = {"max_length": max_length, "pad": pad}
    return rows.map(_packed, batched=True, fn_kwargs=how, remove_columns=rows.column_names, desc=what)


def _packed(rows: Mapping[str, list[Any]], max_length: int, pad: int) -> dict[str, list[Any]]:
    return pack(rows["input_ids"], rows["labels"], max_length, pad)


def pack(ids: Sequence[list[int]], labels: Sequence[list[int]], max_length: int, pad: int) -> dict[str, list[Any]]:
    """Return rows of ``max_length`` tokens, each of whole texts as they come; the rest of a row is padding.

    ``position_ids`` begin anew with each text, by which transformers keeps the texts of a row from seeing each other.
    """
    packed: list[dict[str, list[int]]] = []
    for own, targets in zip(ids, labels, strict=True):
        if not packed or len(packed[-1]["input_ids"]) + len(own) > max_length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += own
        # Nothing of a text is guessed from the one before it.
        packed[-1]["labels"] += [IGNORED, *targets[1:]]
        packed[-1]["position_ids"] += range(len(own))
    for row in packed:
        rest = max_length - len(row["input_ids"])
        row["input_ids"] += [pad] * rest
        row["labels"] += [IGNORED] * rest
        row["position_ids"] += range(rest)
    return {name: [row[name] for row in packed] for name in packed[0]} | {"length": [max_length] * len(packed)}
