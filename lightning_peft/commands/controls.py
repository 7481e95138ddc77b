"""Controls of a comparison: what a method reaches on the same architecture without the model, and without the task.

With random weights nothing is left but what the method itself fits; with shuffled labels, nothing to generalise. Both
are trained at the learning rates that were chosen for the method.

Source: Zhang et al. 2017, arXiv 1611.03530, section 2 (random labels); Hewitt and Liang 2019, arXiv 1909.03368
(controls of what a probe fits itself).
"""

import hashlib
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_peft.core import anatomy, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.base import Task
from lightning_peft.tasks.class_scores import ClassScores

RANDOM, SHUFFLED = ", random weights", ", shuffled labels"


def controls_of(method: str) -> list[str]:
    """Return the names of the rows that control a method.

    >>> controls_of("LoRA")
    ['LoRA, random weights', 'LoRA, shuffled labels']
    """
    return [method + RANDOM, method + SHUFFLED]


def split(name: str) -> tuple[str, str]:
    """Return the method of a row, and which control it is, or ''."""
    control = next((each for each in (RANDOM, SHUFFLED) if name.endswith(each)), "")
    return name.removesuffix(control), control


def check_task(task: Task) -> None:
    """See that the labels of a task can be shuffled, and the weights of its model drawn.

    Raises:
        TuningError: they cannot.
    """
    if not isinstance(task, ClassScores) or not structure.is_pretrained(task.backbone):
        raise TuningError(
            f"--controls shuffles classes and draws the weights of transformers models, and {type(task).__name__} of a "
            f"{type(task.backbone).__name__} is not that: leave it out."
        )


def randomise(task: Task) -> None:
    """Draw the weights of the model anew, but for those of the task head, as its class does for a new model."""
    fresh, head = type(task.backbone)(task.backbone.config).state_dict(), set(anatomy.head_names(task.backbone))
    own = task.backbone.state_dict()
    task.backbone.load_state_dict({name: own[name] if name in head else fresh[name] for name in own})


class ShuffledLabels(Callback):
    """Gives each training row the label of another row of the first batch that it is in, the same in all epochs.

    Rows are told by what is in them, padding left out.
    """

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.given: dict[bytes, int] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replace the labels of the batch."""
        labels: Tensor = batch["labels"]
        other = labels[torch.randperm(len(labels), generator=self.draw)].tolist()
        rows = [_digest(batch, i) for i in range(len(labels))]
        batch["labels"] = labels.new_tensor([self.given.setdefault(*each) for each in zip(rows, other, strict=True)])


def findings(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return, for each method with controls, a sentence on how much of its score is the model's."""
    said = []
    for method, own in results.items():
        random, shuffled = (results.get(name, ()) for name in controls_of(method))
        if own and random and shuffled:
            score, without, chance = (fmean(each["test"] for each in some) for some in (own, random, shuffled))
            said.append(
                f"{method}: of {score:.3f}, {score - without:.3f} is the model's ({without:.3f} with random weights, "
                f"{chance:.3f} with shuffled labels)"
            )
    return said


def _digest(batch: Mapping[str, Any], row: int) -> bytes:
    found, mask = hashlib.blake2b(digest_size=16), batch.get("attention_mask")
    for name, value in sorted(batch.items()):
        if name == "labels" or not isinstance(value, Tensor) or not value.dim() or len(value) <= row:
            continue
        own = value[row]
        if mask is not None and own.shape == mask[row].shape:
            own = own[mask[row].bool()]
        found.update(name.encode() + own.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest()
