"""Multi-task text classification on one backbone, with a head for each task."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.prompt import PromptMethod
from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.routing import routed
from lightning_peft.core.tuning import Tuning
from lightning_peft.data.protocols import Labelled
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.metrics import TaskScores
from lightning_peft.tasks.pooling import Pool, PoolingTask


class MultiTask(PoolingTask):
    """Classify texts of several tasks; a row's ``task_ids`` says by which head.

    The heads are one matrix, of which a row sees the classes of its own task: a batch may mix tasks, and every row has
    the logits that it has in a batch of its task alone.

    Deltas that go by the names of tasks, such as ``LoRA(name="form")`` and ``BitFit(name="topic")`` as callbacks,
    compute for the rows of their task alone, and are trained by these; rows of a task without one see the bare
    backbone.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` (the mean over the tasks), ``val_loss_NAME`` and
    ``val_accuracy_NAME`` of each task, and the same for the test.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: name of a task -> names of its classes.
        pool: which token is classified: the first ([CLS]), the last that is no padding, or the mean of all of the text;
            None: the first of an encoder, the last of a decoder.
        dropout: before the heads.
        **kwargs: as in `Task`.
    """

    monitor = "val_accuracy"
    owner: Tensor
    start: Tensor

    def __init__(
        self,
        model: str,
        labels: dict[str, list[str]],
        pool: Pool | None = None,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if not labels or any(len(names) < 2 for names in labels.values()):
            raise TuningError(f"labels={labels!r} leaves a task without a choice: name two classes or more of each.")
        if any(not name.isidentifier() for name in labels):
            raise TuningError(f"tasks {list(labels)} name scores: use letters, digits and _ alone.")
        self.labels = {name: list(names) for name, names in labels.items()}
        self.backbone = self._load_base()
        config: Any = self.backbone.config
        if config.is_encoder_decoder:
            raise TuningError(f"{model} is an encoder-decoder: multi-task heads need an encoder or a decoder alone.")
        self.pool = pool or ("first" if structure.is_encoder(self.backbone) else "last")
        counts = [len(names) for names in self.labels.values()]
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.Linear(config.hidden_size, sum(counts))
        nn.init.normal_(self.heads.weight, std=structure.initializer_range(self.backbone))
        nn.init.zeros_(self.heads.bias)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("start", torch.tensor([0, *counts]).cumsum(0)[:-1], persistent=False)
        self.score_by({"tasks": TaskScores(list(labels))})

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits in fp32, [B, classes of all tasks]; those of other tasks than the row's are -inf.

        Raises:
            TuningError: a task id is out of range, or deltas of tasks and others are at work.
        """
        tasks = batch["task_ids"]
        if bool(((tasks < 0) | (tasks >= len(self.labels))).any()):
            raise TuningError(
                f"task id {int(tasks.max()) if int(tasks.min()) >= 0 else int(tasks.min())} is out of range: "
                f"the tasks are 0 to {len(self.labels) - 1} ({', '.join(self.labels)})."
            )
        names = self._routes(tasks)
        with nullcontext() if names is None else routed(self.backbone, names):
            states = self.backbone(**self.inputs(batch)).last_hidden_state
        hidden = self._pooled(states, batch)
        logits: Tensor = self.heads(self.dropout(hidden.to(self.heads.weight.dtype))).float()
        return logits.masked_fill(self.owner != tasks.unsqueeze(1), -torch.inf)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have the tasks and classes of the model.

        Raises:
            TuningError: they have others.
        """
        if stage == "predict" or not isinstance(data, Labelled):
            return
        names = data.label_names
        if names != self.labels or list(names) != list(self.labels):
            raise TuningError(f"the data have the tasks {names}, the model {self.labels}: build it with these labels.")

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy, the mean over the rows."""
        return F.cross_entropy(self(batch), self._targets(batch))

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics of its tasks."""
        for scores in self.metrics(split):
            scores.update(self(batch), self._targets(batch), batch["task_ids"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``task`` and ``labels``, the name of a row's task and of its likeliest class."""
        guesses = (self(batch).argmax(1) - self.start[batch["task_ids"]]).tolist()
        names = list(self.labels)
        tasks = [names[task] for task in batch["task_ids"].tolist()]
        labels = [self.labels[task][guess] for task, guess in zip(tasks, guesses, strict=True)]
        return {"task": tasks, "labels": labels}

    def _routes(self, tasks: Tensor) -> list[str | None] | None:
        """Return the delta of each row, where deltas go by the names of tasks; None: all rows have the same ones."""
        tuning = Tuning.of(self.backbone)
        if tuning is None:
            return None
        active = {method.delta: method for key, method in tuning.methods.items() if key not in tuning.switch.off}
        own = active.keys() & self.labels.keys()
        if not own:
            return None
        if others := sorted(active.keys() - own):
            raise TuningError(
                f"{sorted(own)[0]} is the delta of a task, whose rows it computes alone, and {others[0]} of none: name "
                f"it after one of {', '.join(self.labels)}, or activate the others without it."
            )
        if prompts := [name for name, method in active.items() if isinstance(method, PromptMethod)]:
            raise TuningError(
                f"{prompts[0]} is a soft prompt, which is in each row of a batch: take one PromptTuning(num_prompts="
                f"{len(self.labels)}), of which each task has its own."
            )
        names = list(self.labels)
        return [names[task] if names[task] in own else None for task in tasks.tolist()]

    def _targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the classes, numbered through all tasks, [B]."""
        return batch["labels"] + self.start[batch["task_ids"]]
