"""One class for each text, by any ``AutoModelForSequenceClassification``."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from lightning_peft import select
from lightning_peft.errors import TuningError
from lightning_peft.files import quiet_loading, resolve
from lightning_peft.mixin import MethodMixin


class CrossEntropy(Metric):
    """The mean cross-entropy over the rows of all processes, summed in fp32 whatever the precision of the Trainer.

    Lightning's own mean of a logged number is off where processes have unlike many rows: it rounds the mean of their
    counts down to an integer.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), "sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits [B, classes] and classes [B]."""
        self.total = self.total + F.cross_entropy(preds.float(), target, reduction="sum")
        self.rows = self.rows + len(target)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.rows


class TextClassification(MethodMixin, L.LightningModule):
    """Classify texts with a pretrained model and a head for the classes at hand.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test; F1 is the mean over the
    classes. The optimizer is AdamW; the learning rate rises linearly from 0 and then falls linearly to 0.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        labels: names of the classes; None: those that the model was trained for.
        lr: learning rate of the delta, that is of all that is trained but the head.
        head_lr: learning rate of the head; None: ``lr``.
        weight_decay: of matrices; biases, norms and other vectors have none.
        warmup: share of the steps in which the learning rate rises.
        dtype: what the model is loaded in; "auto": what it was saved in.
    """

    def __init__(
        self,
        model: str,
        labels: list[str] | None = None,
        lr: float = 2e-3,
        head_lr: float | None = 1e-2,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.head_lr = lr if head_lr is None else head_lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.backbone = _pretrained(resolve(model), labels, dtype)
        self.labels: list[str] = list(self.backbone.config.id2label.values())
        count = len(self.labels)
        scores = {
            "loss": CrossEntropy(),
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "f1": MulticlassF1Score(count, average="macro"),
        }
        self.val_scores = MetricCollection(scores, prefix="val_")  # type: ignore[arg-type]
        self.test_scores = self.val_scores.clone(prefix="test_")
        self.confusion = MulticlassConfusionMatrix(count)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits, [B, classes], in fp32."""
        logits: Tensor = self.backbone(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits.float()

    def setup(self, stage: str) -> None:
        """See that the data fit the model, before the first batch.

        Raises:
            TuningError: other classes, or texts that may be longer than the model's positions.
        """
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "label_names", self.labels) if stage != "predict" else self.labels
        if list(names) != self.labels:
            raise TuningError(
                f"the data have {len(names)} classes ({', '.join(names)}), the model {len(self.labels)} "
                f"({', '.join(self.labels)}): build it with labels=data.label_names."
            )
        limit = select.max_positions(self.backbone)
        length = getattr(data, "max_length", 0)
        if limit is not None and length > limit:
            raise TuningError(
                f"max_length={length} of the data is beyond the {limit} positions of the model: lower it."
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self._score(self.val_scores, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch and count its confusions."""
        logits = self._score(self.test_scores, batch)
        self.confusion.update(logits, batch["labels"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each text, and ``probabilities``, [B, classes]."""
        probabilities = self(batch).softmax(1)
        labels = [self.labels[i] for i in probabilities.argmax(1).tolist()]
        return {"labels": labels, "probabilities": probabilities}

    def on_test_start(self) -> None:
        """Forget the confusions of an earlier test."""
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Sum the confusions over all processes."""
        self.confusion.compute()

    def confusion_matrix(self) -> Tensor:
        """Return how often texts of class i were taken for class j in the last test, [i, j].

        Raises:
            TuningError: there has been no test.
        """
        if not self.confusion.update_called:
            raise TuningError("there is no confusion matrix before a test: run trainer.test first.")
        matrix: Tensor = self.confusion.compute()
        return matrix

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, with groups for head and delta, with and without weight decay, and the schedule of its steps.

        Raises:
            TuningError: the number of steps is not limited, so that the schedule has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 0:
            raise TuningError("the learning rate falls to 0 in the last step, and there is none: set max_epochs.")
        groups = self._groups()
        fused = all(_can_fuse(p) for group in groups for p in group["params"]) and self.trainer.precision != "16-mixed"
        optimizer = AdamW(groups, lr=self.lr, fused=fused)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        head = set(select.head_names(self.backbone))
        groups = []
        for part, lr in (("delta", self.lr), ("head", self.head_lr)):
            for decays in (True, False):
                parameters = [
                    parameter
                    for name, parameter in self.backbone.named_parameters()
                    if parameter.requires_grad and (name in head) == (part == "head") and (parameter.ndim > 1) == decays
                ]
                if parameters:
                    name = part if decays else f"{part} without decay"
                    decay = self.weight_decay if decays else 0.0
                    groups.append({"params": parameters, "name": name, "lr": lr, "weight_decay": decay})
        return groups

    def _score(self, scores: MetricCollection, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self(batch)
        labels = batch["labels"]
        scores.update(logits, labels)
        self.log_dict(scores, prog_bar=True, batch_size=len(labels))
        return logits


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")


def _pretrained(name: str, labels: list[str] | None, dtype: str) -> Any:
    """Load the model with a head for these classes, in training mode."""
    classes: dict[str, Any] = {}
    if labels is not None:
        classes = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        with quiet_loading():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **classes
            )
    except (OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise TuningError(f"no text classifier can be made of {name!r} ({why}): give a folder or hub id.") from None
    _warn_of_missing(model, name, info)
    model.config.problem_type = "single_label_classification"
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _padding(name, model.config)
    return model.train()


def _warn_of_missing(model: nn.Module, name: str, info: Mapping[str, Any]) -> None:
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    missing = sorted((set(info["missing_keys"]) | mismatched) - set(select.head_names(model)))
    if missing:
        rank_zero_warn(
            f"{name} has no weights for {len(missing)} tensors of {type(model).__name__} outside of its head, e.g. "
            f"{missing[0]}: they are random, so name them in also_train= of the method, or take another model."
        )


def _padding(name: str, config: Any) -> int | None:
    """Return the id of the tokenizer's padding token, or where it has none, of its end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        end = config.eos_token_id
        return end[0] if isinstance(end, list) else end
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
