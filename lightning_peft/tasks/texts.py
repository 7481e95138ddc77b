"""What a tuned model says of texts that someone types, without a Trainer and without data."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core import text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.data.padding import Padder

if TYPE_CHECKING:
    from lightning_peft.tasks.base import Task

_ENDLESS = 2**31
"""More tokens than any model reads."""


def predict(task: "Task", texts: Sequence[str], batch_size: int, max_length: int | None) -> list[dict[str, Any]]:
    """Return what the model says of each text, in eval mode; the module is left in the mode that it was in."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise TuningError(f"texts={str(texts)[:60]!r} is no list of texts: give e.g. ['a text', 'another'].")
    if batch_size < 1:
        raise TuningError(f"batch_size={batch_size} is out of range: take 1 or more.")
    limit = text_structure.max_positions(task.backbone)
    known = (max_length, limit, task.tokenizer.model_max_length)  # a tokenizer that knows no limit says 1e30
    length = min((n for n in known if n is not None and n < _ENDLESS), default=None)
    with in_eval(task):
        starts = range(0, len(texts), batch_size)
        return [row for i in starts for row in _rows(task, texts[i : i + batch_size], length)]


def _rows(task: "Task", texts: Sequence[str], length: int | None) -> list[dict[str, Any]]:
    encoded = dict(task.tokenizer(list(texts), truncation=length is not None, max_length=length))
    batch = Padder.of(task.tokenizer, side=task.padding_side)(encoded)
    device = next(task.backbone.parameters()).device
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    said = task.predict_step(batch, 0)
    names = {"labels": "label", "text": "written"}
    columns = {names.get(name, name): values for name, values in plain(said, task).items()}
    return [{"text": text, **dict(zip(columns, row, strict=True))}
            for text, *row in zip(texts, *columns.values(), strict=True)]  # fmt: skip


def plain(said: Mapping[str, Any], task: Any, digits: int = 6) -> dict[str, list[Any]]:
    """Return the columns of a prediction as lists; scores are rounded, probabilities go by the names of the classes.

    Args:
        said: what ``predict_step`` returned.
        task: the module; its ``labels`` name the classes, in order.
        digits: after the point.
    """
    columns = {name: v.float().tolist() if isinstance(v, Tensor) else list(v) for name, v in said.items()}
    columns = {name: [_rounded(value, digits) for value in values] for name, values in columns.items()}
    names = vars(task).get("labels")
    if isinstance(names, list) and "probabilities" in columns:
        rows = columns["probabilities"]
        if all(isinstance(row, list) and len(row) == len(names) for row in rows):
            columns["probabilities"] = [dict(zip(names, row, strict=True)) for row in rows]
    return columns


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    return round(value, digits) if isinstance(value, float) else value
