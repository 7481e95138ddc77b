"""The base class of tasks with a two-tower model (CLIP, SigLIP), whose classes are texts."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModel

from lightning_peft.core.errors import TuningError
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.rates import RECIPE, Rates
from lightning_peft.core.tuning import Tuning
from lightning_peft.data.protocols import ClassSets, Labelled, Worded
from lightning_peft.tasks.base import Dtype, Task
from lightning_peft.towers import clip
from lightning_peft.towers.contexts import context_of

_TEMPLATE = "a photo of a {}."


class TwoTowerTask(Task):
    """A task with a two-tower model whose classes are texts. A method may put a context into the texts.

    The optimizer is SGD, as CoOp's authors have it; the learning rate is ``warmup_lr`` in the first epochs and then
    falls by a cosine.

    Args:
        model: folder or hub id of the two-tower model.
        labels: names of the classes; None: those of the data.
        template: the text of a class where no method says otherwise; ``{}`` stands for its name. None: that of the
            data, else "a photo of a {}.".
        lr: learning rate; None: what the methods recommend for SGD, the smallest of several.
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
        template: str | None = None,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__(model, lr=lr, weight_decay=weight_decay, dtype=dtype)
        self.template = template if template is not None else _TEMPLATE
        clip.class_texts([], self.template)
        self.momentum = momentum
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        self.labels = list(labels) if labels is not None else None
        self.backbone = self.load().eval()
        if not {"get_text_features", "get_image_features"} <= set(dir(self.backbone)):
            raise TuningError(
                f"{model!r} is a {type(self.backbone).__name__}, which has no two towers: give a CLIP or SigLIP model."
            )
        self._ids: dict[tuple[Any, ...], Tensor] = {}
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._keeps = False

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """Take the names of the classes from the data, where none are given, and see that they fit the model.

        Raises:
            TuningError: there are none, the data have others, or one is too long.
        """
        names = list(data.label_names) if isinstance(data, Labelled) else None
        given = self.hparams.get("labels")
        if given is not None and names is not None and stage != "predict" and names != list(given):
            raise TuningError(
                f"the data have {len(names)} classes ({', '.join(names)}), labels= has {len(given)} "
                f"({', '.join(given)}): leave labels= out."
            )
        known = [one for one in (given, names, self.labels) if one is not None]
        if not known:
            raise TuningError(
                f"{type(self).__name__} knows classes by their names, and the data name none: give labels=."
            )
        self.labels = list(known[0])
        if self.hparams.get("template") is None and isinstance(data, Worded):
            self.template = data.template or _TEMPLATE
        self._ids.clear()
        TwoTowerTask.on_validation_end(self)
        for classes in self.sets(data).values():
            self.texts(classes)

    def sets(self, data: L.LightningDataModule | None) -> Mapping[str, Sequence[str]]:
        """Return the sets of classes that are tested, by name."""
        return data.test_sets if isinstance(data, ClassSets) else {"all": self.classes}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, which are known when a stage begins."""
        assert self.labels is not None
        return self.labels

    def texts(self, names: Sequence[str], template: str | None = None, bare: bool = False) -> Tensor:
        """Return the ids of the texts of classes, [C, T], with room for the context that a method puts in.

        Args:
            names: of the classes.
            template: what is written around a name; None: what the method says, else that of the task.
            bare: whether the texts are for the model without the context, and need no room for it.
        """
        key = (bare, template, *names)
        if key not in self._ids:
            context = None if bare else context_of(self.backbone)
            template = template or (context.template if context is not None else self.template)
            room = context.count if context is not None else 0
            texts = clip.class_texts(names, template)
            self._ids[key] = clip.tokenize(self.backbone, self.tokenizer, texts, names, room)
        self._ids[key] = self._ids[key].to(self.device)
        return self._ids[key]

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the image features of a batch, [B, p], which may hold them already."""
        if "image_features" in batch:
            return clip.adapted(self.backbone, batch["image_features"])
        return clip.image_features(self.backbone, batch["pixel_values"])

    def text_features(
        self, names: Sequence[str], images: Tensor, variant: int | None = None, template: str | None = None
    ) -> Tensor:
        """Return the features of the texts of classes; an evaluation computes them once, if images do not matter."""
        keep = self._keeps and not clip.depends_on_images(self.backbone)
        key = (variant, template, *names)
        if keep and key in self._kept:
            return self._kept[key]
        features = clip.text_features(self.backbone, self.texts(names, template), images, variant)
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

    def advised(self, method: TuningMethod, backbone: nn.Module) -> Rates:
        """Return the rates that a method recommends for SGD, or those of CoOp."""
        advice = method.advice()
        return advice if advice.optimizer == "SGD" else RECIPE

    @property
    def rate(self) -> float:
        """The learning rate that is given, or else the smallest that a method recommends."""
        tuning = Tuning.of(self.backbone)
        methods = tuning.methods.values() if tuning is not None else ()
        recommended = min((self.advised(method, self.backbone).delta for method in methods), default=RECIPE.delta)
        return self.lr if self.lr is not None else recommended

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD and its schedule over the epochs.

        Raises:
            TuningError: the number of epochs is not limited.
        """
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise TuningError("the learning rate falls over the epochs, and their number has no limit: set max_epochs.")
        trained = [p for p in self.parameters() if p.requires_grad]
        rate = self.rate * self.rate_scale
        optimizer = SGD(
            [{"params": trained, "name": "delta"}], lr=rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        warmup = min(self.warmup_epochs, epochs - 1)
        factor = partial(rate_at, epochs=epochs, warmup=warmup, first=self.warmup_lr / rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "epoch"}}


def rate_at(epoch: int, epochs: int, warmup: int, first: float) -> float:
    """Return the factor of the learning rate in an epoch: ``first`` in the first ones, then half a cosine.

    >>> [round(rate_at(epoch, 4, 1, 0.005), 3) for epoch in range(4)]
    [0.005, 0.854, 0.5, 0.146]
    """
    return first if epoch < warmup else 0.5 * (1 + math.cos(math.pi * epoch / epochs))
