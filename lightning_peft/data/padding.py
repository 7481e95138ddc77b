"""Collates rows of unlike length into a padded batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lightning_peft.core.labels import IGNORED


class Padder:
    """Makes a batch of rows: what has a fill value becomes a padded tensor, numbers a tensor, all else stays a list.

    Columns of one fill group need not be of one length: the labels of a decoder are padded to their own longest row.

    >>> Padder({"input_ids": 0})([{"input_ids": [5, 6], "n": 1, "name": "a"}, {"input_ids": [7], "n": 2, "name": "b"}])
    {'input_ids': tensor([[5, 6],
            [7, 0]]), 'n': tensor([1, 2]), 'name': ['a', 'b']}

    Args:
        fills: column -> what a padded place of it holds.
        side: where the padding is.
        multiple: round the width of a batch up to a multiple.
    """

    def __init__(
        self, fills: Mapping[str, int], side: Literal["left", "right"] = "right", multiple: int | None = None
    ) -> None:
        self.fills = dict(fills)
        self.side = side
        self.multiple = multiple or 1

    @classmethod
    def of(cls, tokenizer: Any, side: Literal["left", "right"] | None = None, multiple: int | None = None) -> "Padder":
        """Return the padder for what a tokenizer gives, and for labels."""
        fills = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "labels": IGNORED,
            "position_ids": 0,
        }
        return cls(fills, side or tokenizer.padding_side, multiple)

    def __call__(self, rows: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of a list of rows, or of a mapping of columns."""
        return {name: self._column(name, values) for name, values in columns_of(rows).items()}

    def _column(self, name: str, values: Sequence[Any]) -> Any:
        if name in self.fills and isinstance(values[0], list):
            width = -(-max(len(value) for value in values) // self.multiple) * self.multiple
            fill = [self.fills[name]]
            padding = [fill * (width - len(value)) for value in values]
            left = self.side == "left"
            return torch.tensor([p + v if left else v + p for v, p in zip(values, padding, strict=True)])
        if isinstance(values[0], (int, float)):
            return torch.tensor(values)
        return list(values)


def columns_of(rows: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[Any]]:
    """Return rows, which are a list of them or columns already, as columns."""
    return rows if isinstance(rows, Mapping) else {name: [row[name] for row in rows] for name in rows[0]}
