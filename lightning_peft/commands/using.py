"""What a tuned model costs when it is used, and how much of the bare one it has kept."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_peft.core import structure, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.folding import merge
from lightning_peft.core.graft import detach, grafts
from lightning_peft.core.switching import prepare
from lightning_peft.features.frozen_part import FrozenPart, Skipped, Tap
from lightning_peft.tasks.base import Task

_LENGTH, _ROWS, _TIMES = 128, 32, 5


def lines_of(path: str | Path, option: str) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:
        TuningError: there is none.
    """
    texts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise TuningError(f"{option} {path} has no line of text: give a file with one text in a line.")
    return texts


def embedded(task: Task, texts: Sequence[str]) -> Tensor:
    """Return the means of the last hidden states of the backbone over the words of each text, [N, d].

    Raises:
        TuningError: the backbone reads no texts.
    """
    if structure.input_embeddings_of(task.backbone) is None or structure.has_two_towers(task.backbone):
        raise TuningError(f"--other is for models of text, and {type(task.backbone).__name__} is none: leave it out.")
    length = min(_LENGTH, text_structure.max_positions(task.backbone) or _LENGTH)
    with in_eval(task.backbone):
        parts = [texts[start : start + _ROWS] for start in range(0, len(texts), _ROWS)]
        return torch.cat([_embedded(task, list(part), length) for part in parts]).cpu()


def _embedded(task: Task, texts: list[str], length: int) -> Tensor:
    words = task.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    inputs = {name: words[name].to(task.device) for name in ("input_ids", "attention_mask")}
    batch = prepare(task.backbone, inputs)
    encoder = structure.encoder_of(task.backbone) if structure.is_encoder_decoder(task.backbone) else None
    seen: list[Tensor] = []
    base = encoder or structure.base_model_of(task.backbone)
    handle = base.register_forward_hook(lambda *call: seen.append(call[2][0]))
    try:
        (encoder or task.backbone)(**task.inputs(batch))  # with its head, which a cache of features waits for
    finally:
        handle.remove()
    hidden = seen[0]
    mask = task.text_columns(batch["attention_mask"], batch).unsqueeze(-1).to(hidden.dtype)
    return (task.text_columns(hidden, batch) * mask).sum(1) / mask.sum(1)


def kept(before: Tensor, after: Tensor) -> float:
    """Return the mean cosine of two embeddings of each text, [N, d] both: 1 where nothing has been forgotten.

    >>> kept(torch.eye(2), torch.eye(2))
    1.0
    """
    return float(F.cosine_similarity(before, after).mean())


def ready(task: Task) -> None:
    """Merge what can be merged, as one does for use; the rest stays beside the weights, with its costs.

    Features that were cached are forgotten: the rows of a user are new.
    """
    for place in list(grafts(task.backbone)):
        if isinstance(place.graft, (FrozenPart, Skipped, Tap)):
            detach(place.host, place.name)
    with suppress(TuningError):
        merge(task)


def seconds_a_batch(task: Task, data: LightningDataModule, device: torch.device) -> float:
    """Return the seconds that a batch of the test takes, the best of five."""
    task.to(device)
    batch, _, number = next(iter(CombinedLoader(data.test_dataloader(), "sequential")))  # a task may have several
    batch = task.transfer_batch_to_device(batch, device, number)
    with in_eval(task), torch.inference_mode():  # as the test was: its metrics hold such tensors
        return min(_timed(lambda: task.score(batch, "test"), device) for _ in range(_TIMES))


def _timed(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
