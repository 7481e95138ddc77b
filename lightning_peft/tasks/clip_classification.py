"""One class for each image, by the names of the classes, with a two-tower model (CLIP, SigLIP)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric, MetricCollection
from transformers import AutoModel

from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.base import Dtype, Task
from lightning_peft.tasks.base_to_new import harmonic_mean
from lightning_peft.tasks.scores import CrossEntropy
from lightning_peft.towers import clip
from lightning_peft.towers.contexts import context_of


class Accuracy(Metric):
    """The share of rows whose likeliest class is right, however many classes there are."""

    full_state_update = False
    higher_is_better = True
    right: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros((), dtype=torch.long), "sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [B, C] and classes [B]."""
        self.right = self.right + (preds.argmax(1) == target).sum()
        self.rows = self.rows + len(target)

    def compute(self) -> Tensor:
        """Return the share."""
        return self.right / self.rows


class TwoTowerTask(Task):
    """A task with a two-tower model whose classes are texts. A method may put a context into the texts.

    The optimizer is SGD; the learning rate is ``warmup_lr`` in the first epochs and then falls by a cosine.

    Args:
        model: folder or hub id of the two-tower model.
        labels: names of the classes; None: those of the data.
        template: the text of a class where no method says otherwise; ``{}`` stands for its name.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of all that is trained.
        warmup_epochs: how many epochs begin with ``warmup_lr``.
        warmup_lr: learning rate of the first epochs.
        dtype: what the model is loaded in; "auto": what it was saved in.
    """

    auto = AutoModel
    what = "two-tower model"
    monitor = "val_accuracy"

    def __init__(
        self,
        model: str,
        labels: list[str] | None = None,
        template: str = "a photo of a {}.",
        lr: float = 2e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__(model, lr=lr, weight_decay=weight_decay, dtype=dtype)
        clip.class_texts([], template)
        self.template = template
        self.momentum = momentum
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        self.labels = list(labels) if labels is not None else None
        self.backbone = self.load().eval()
        if not hasattr(self.backbone, "get_text_features") or not hasattr(self.backbone, "get_image_features"):
            raise TuningError(
                f"{model!r} is a {type(self.backbone).__name__}, which has no two towers: give a CLIP or SigLIP model."
            )
        self._ids: dict[tuple[str, ...], Tensor] = {}
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._keeps = False

    def check(self, data: Any, stage: str) -> None:
        """Take the names of the classes from the data, where none are given, and see that they fit the model.

        Raises:
            TuningError: there are none, the data have others, or one is too long.
        """
        names = getattr(data, "label_names", None)
        given = self.hparams.get("labels")
        if given is None and names is None and self.labels is None:
            raise TuningError(
                f"{type(self).__name__} knows classes by their names, and the data name none: give labels=."
            )
        if given is not None and names is not None and stage != "predict" and list(names) != list(given):
            raise TuningError(
                f"the data have {len(names)} classes ({', '.join(names)}), labels= has {len(given)} "
                f"({', '.join(given)}): leave labels= out."
            )
        self.labels = list(given if given is not None else names if names is not None else self.labels)  # type: ignore[arg-type]
        self._ids.clear()
        TwoTowerTask.on_validation_end(self)
        for classes in self.sets(data).values():
            self.texts(classes)

    def sets(self, data: Any) -> dict[str, list[str]]:
        """Return the sets of classes that are tested, by name."""
        assert self.labels is not None
        return dict(getattr(data, "test_sets", None) or {"all": self.labels})

    def texts(self, names: Sequence[str], template: str | None = None) -> Tensor:
        """Return the ids of the texts of classes, [C, T], with room for the context that a method puts in.

        Args:
            names: of the classes.
            template: what is written around a name; None: what the method says, else that of the task.
        """
        key = (template or "", *names)
        if key not in self._ids:
            context = context_of(self.backbone) if template is None else None
            template = template or (context.template if context is not None else self.template)
            room = context.count if context is not None else 0
            texts = clip.class_texts(names, template)
            self._ids[key] = clip.tokenize(self.backbone, self.tokenizer, texts, names, room)
        self._ids[key] = self._ids[key].to(self.device)
        return self._ids[key]

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the image features of a batch, [B, p], which may hold them already."""
        if "image_features" in batch:
            return batch["image_features"]
        return clip.image_features(self.backbone, batch["pixel_values"])

    def text_features(self, names: Sequence[str], images: Tensor, variant: int | None = None) -> Tensor:
        """Return the features of the texts of classes; an evaluation computes them once, if images do not matter."""
        keep = self._keeps and not clip.depends_on_images(self.backbone)
        key = (variant, *names)
        if keep and key in self._kept:
            return self._kept[key]
        features = clip.text_features(self.backbone, self.texts(names), images, variant)
        if keep:
            self._kept[key] = features
        return features

    def on_validation_start(self) -> None:
        """Keep the features of texts from now on, but none of other weights."""
        self._kept.clear()
        self._keeps = True

    def on_validation_end(self) -> None:
        """Keep them no more."""
        self._kept.clear()
        self._keeps = False

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD and its schedule over the epochs.

        Raises:
            TuningError: the number of epochs is not limited.
        """
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise TuningError("the learning rate falls over the epochs, and their number has no limit: set max_epochs.")
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = SGD(trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        warmup = min(self.warmup_epochs, epochs - 1)
        factor = partial(rate_at, epochs=epochs, warmup=warmup, first=self.warmup_lr / self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "epoch"}}


class CLIPClassification(TwoTowerTask):
    """Classify images by the names of the classes: zero-shot without a method, few-shot and base-to-new with one.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` and the same for the test; where the test has base and new
    classes (`CLIPData`), ``test_base_accuracy``, ``test_new_accuracy`` and their harmonic mean. Logits are fp32.

    Args:
        model: folder or hub id of the two-tower model.
        labels: names of the classes; None: those of the data.
        cache_image_features: compute the features of the training and validation images once, before the first step;
            the image side must be frozen, its images must not change at random, and the data be `CLIPData`.
        **kwargs: as in `TwoTowerTask`.
    """

    def __init__(
        self, model: str, labels: list[str] | None = None, cache_image_features: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, labels, **kwargs)
        self.cache_image_features = cache_image_features
        self.val_scores = MetricCollection({"loss": CrossEntropy(), "accuracy": Accuracy()}, prefix="val_")
        self.test_scores = nn.ModuleDict(
            {name: self.val_scores.clone(prefix=prefix) for name, prefix in _PREFIXES.items()}
        )

    def forward(self, batch: dict[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
        """Return logits of the classes of these names, [B, C], in fp32."""
        images = self.features(batch)
        texts = self.text_features(self.labels if names is None else names, images)  # type: ignore[arg-type]
        if texts.ndim == 2 and len(texts) != len(self.labels if names is None else names):  # type: ignore[arg-type]
            raise TuningError(
                "the method makes several prompts of each class: use the task that it is for, e.g. DomainAdaptation."
            )
        return clip.similarity(self.backbone, images, texts)

    def on_fit_start(self) -> None:
        """Compute the features of the images once, if asked to.

        Raises:
            TuningError: a method changes them, or the data cannot hold them.
        """
        if not self.cache_image_features:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "encode"):
            raise TuningError("cache_image_features needs data that can hold features: give CLIPData.")
        if not clip.images_are_frozen(self.backbone):
            raise TuningError(
                "the method changes the features of images, so they cannot be kept: cache_image_features=False."
            )
        modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        data.encode(self._encode)  # type: ignore[union-attr]
        for module, mode in modes.items():
            module.training = mode

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return self._log_loss(F.cross_entropy(self(batch), batch["labels"]), len(batch["labels"]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self.val_scores.update(self(batch), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all batches."""
        self._log_scores(self.val_scores)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of a set of classes."""
        name, classes = list(self.sets(getattr(self.trainer, "datamodule", None)).items())[dataloader_idx]
        self.test_scores[name].update(self(batch, classes), batch["labels"])  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Log the scores of each set of classes, and the harmonic mean of base and new."""
        found: dict[str, Any] = {}
        for name in self.sets(getattr(self.trainer, "datamodule", None)):
            scores: Any = self.test_scores[name]
            found |= scores.compute()
            scores.reset()
        if "test_new_accuracy" in found:
            accuracies = (float(found["test_base_accuracy"]), float(found["test_new_accuracy"]))
            found["test_harmonic_mean"] = harmonic_mean(*accuracies)
        self.log_dict(found)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each image, and ``probabilities``, [B, C]."""
        probabilities = self(batch).softmax(1)
        return {"labels": [self.labels[i] for i in probabilities.argmax(1).tolist()], "probabilities": probabilities}  # type: ignore[index]

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return clip.image_features(self.backbone, pixels.to(self.device))


_PREFIXES = {"all": "test_", "base": "test_base_", "new": "test_new_"}


def rate_at(epoch: int, epochs: int, warmup: int, first: float) -> float:
    """Return the factor of the learning rate in an epoch: ``first`` in the first ones, then half a cosine.

    >>> [round(rate_at(epoch, 4, 1, 0.005), 3) for epoch in range(4)]
    [0.005, 0.854, 0.5, 0.146]
    """
    return first if epoch < warmup else 0.5 * (1 + math.cos(math.pi * epoch / epochs))
