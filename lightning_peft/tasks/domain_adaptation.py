"""From a labelled domain of images to an unlabelled one, by the names of the classes, with a two-tower model."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.tasks.clip_classification import Accuracy, TwoTowerTask
from lightning_peft.tasks.scores import CrossEntropy
from lightning_peft.towers import clip
from lightning_peft.towers.contexts import context_of, frozen

_NAIVE = ("naive",)


class DomainAdaptation(TwoTowerTask):
    """Train on a labelled source domain and pseudo labels of a target domain; data come from `DomainData`.

    The loss is that of the source images plus ``weight`` times that of the target images whose pseudo label is sure
    enough; where none is, the second is zero. Pseudo labels are those of the frozen model with the text ``template``:
    the likeliest class, if its probability is at least ``threshold``.

    A method with prompts of both domains (`DAPL`) has K columns of the source and K of the target. The paper (Ge et al.
    2022, arXiv 2202.06687) contrasts an image with all 2 K, the released code with the K of its own domain.

    Logs ``train_loss``, ``train_source_loss``, ``train_target_loss`` and ``train_coverage``, the share of target images
    with a pseudo label; ``val_loss`` and ``val_accuracy`` are those of the source, so that no epoch is chosen by labels
    of the target; in the test on the target ``test_loss``, ``test_accuracy`` over all images, ``test_class_accuracy``,
    the mean over the classes, and ``test_coverage`` and ``test_pseudo_accuracy`` of the pseudo labels. The released
    code chooses its "best" epoch by the test.

    Args:
        model: folder or hub id of the two-tower model.
        labels: names of the classes; None: those of the data.
        contrast: 'all' prompts of both domains, or those of the 'own' domain.
        threshold: the least probability of a pseudo label.
        temperature: the logits of pseudo labels are divided by it.
        weight: of the target loss; 0: the source alone.
        **kwargs: as in `TwoTowerTask`.
    """

    def __init__(
        self,
        model: str,
        labels: list[str] | None = None,
        contrast: Literal["all", "own"] = "all",
        threshold: float = 0.5,
        temperature: float = 1.0,
        weight: float = 1.0,
        lr: float = 3e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, labels, lr=lr, **kwargs)
        if contrast not in ("all", "own"):
            raise TuningError(f"contrast={contrast!r} is no set of prompts: take 'all' or 'own'.")
        if temperature <= 0 or weight < 0 or threshold < 0:
            raise TuningError(
                f"threshold={threshold}, temperature={temperature} and weight={weight} are out of range: "
                "give a temperature above 0, the others 0 or more."
            )
        self.contrast = contrast
        self.threshold = threshold
        self.temperature = temperature
        self.weight = weight
        self.val_scores = MetricCollection({"loss": CrossEntropy(), "accuracy": Accuracy()}, prefix="val_")

    def check(self, data: Any, stage: str) -> None:
        """See that data and method are for adaptation.

        Raises:
            TuningError: the data are of one domain, or a method changes the model that gives the pseudo labels.
        """
        super().check(data, stage)
        assert self.labels is not None
        classes = MulticlassAccuracy(len(self.labels), average="macro")
        scores = {"loss": CrossEntropy(), "accuracy": Accuracy(), "class_accuracy": classes}
        self.test_scores = MetricCollection(scores, prefix="test_")  # type: ignore[arg-type]
        self.coverage, self.pseudo_accuracy = MeanMetric(), Accuracy()
        prompts = [place.graft for place in grafts(self.backbone) if hasattr(place.graft, "call")]
        own = {id(p) for graft in prompts for p in graft.parameters()}
        others = [name for name, p in self.backbone.named_parameters() if p.requires_grad and id(p) not in own]
        if stage == "fit" and self.weight and others:
            raise TuningError(
                f"{others[0]} is trained in the model whose frozen form gives the pseudo labels: use a method of "
                "prompts, such as DAPL, or weight=0."
            )

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Return the loss of both domains.

        Raises:
            TuningError: the batch is not of two domains, or has labels of the target.
        """
        if not {"source", "target"} <= batch.keys():
            raise TuningError(
                f"a batch of two domains has 'source' and 'target', this one {', '.join(batch)}: give DomainData."
            )
        source, target = batch["source"], batch["target"]
        if "labels" in target:
            raise TuningError(
                "the target domain has labels in training, which would leak: leave them out, as DomainData does."
            )
        images = self.features(source)
        source_loss = F.cross_entropy(self._logits(images, 0), source["labels"])
        target_loss, coverage = self._target_loss(target) if self.weight else (source_loss.new_zeros(()),) * 2
        loss = source_loss + self.weight * target_loss
        rows = len(source["labels"])
        logged = {"train_source_loss": source_loss, "train_target_loss": target_loss, "train_coverage": coverage}
        means = {name: value.detach() for name, value in logged.items()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=rows)
        return self._log_loss(loss, rows)

    def pseudo_labels(self, batch: dict[str, Tensor], features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the likeliest class of each image by the frozen model, and whether it is sure enough, [B] each."""
        with torch.no_grad(), frozen(self.backbone):
            if features is None or not clip.images_are_frozen(self.backbone):
                features = self.features(batch)
            if _NAIVE not in self._kept:
                texts = self.texts(self.labels, self.template)  # type: ignore[arg-type]
                self._kept[_NAIVE] = clip.text_features(self.backbone, texts)
            logits = clip.similarity(self.backbone, features, self._kept[_NAIVE])
        sure, classes = (logits / self.temperature).softmax(1).max(1)
        return classes, sure >= self.threshold

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch of the source."""
        self.val_scores.update(self._of_domain(self.features(batch), 0), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all batches."""
        self._log_scores(self.val_scores)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score one batch of the target, and its pseudo labels."""
        images = self.features(batch)
        self.test_scores.update(self._of_domain(images, 1), batch["labels"])
        classes, sure = self.pseudo_labels(batch, images)
        self.coverage.update(sure.float())
        if bool(sure.any()):
            one_hot = F.one_hot(classes[sure], len(self.labels))  # type: ignore[arg-type]
            self.pseudo_accuracy.update(one_hot, batch["labels"][sure])

    def on_test_epoch_end(self) -> None:
        """Log the scores of all batches."""
        self._log_scores(self.test_scores)
        self.log("test_coverage", self.coverage.compute())
        right = self.pseudo_accuracy.compute()
        self.log("test_pseudo_accuracy", torch.nan_to_num(right))
        self.coverage.reset()
        self.pseudo_accuracy.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each image, and ``probabilities``, [B, K]."""
        probabilities = self._of_domain(self.features(batch), 1).softmax(1)
        return {"labels": [self.labels[i] for i in probabilities.argmax(1).tolist()], "probabilities": probabilities}  # type: ignore[index]

    def _target_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the images that have a pseudo label, zero if none has, and their share."""
        images = self.features(batch)
        classes, sure = self.pseudo_labels(batch, images)
        logits = self._logits(images, 1)
        if logits.shape[1] > len(self.labels):  # type: ignore[arg-type]
            classes = classes + len(self.labels)  # type: ignore[arg-type]
        losses = F.cross_entropy(logits, classes, reduction="none")
        return (losses * sure).sum() / sure.sum().clamp(min=1), sure.float().mean()

    def _logits(self, images: Tensor, domain: int) -> Tensor:
        """Return what an image of a domain is contrasted with in training: [B, 2 K] or [B, K]."""
        if self.contrast == "own" or self._variants() == 1:
            return self._of_domain(images, domain)
        return self._of(images, None)

    def _of_domain(self, images: Tensor, domain: int) -> Tensor:
        """Return the logits of the K classes in a domain."""
        return self._of(images, domain if self._variants() > 1 else None)

    def _of(self, images: Tensor, variant: int | None) -> Tensor:
        texts = self.text_features(self.labels, images, variant)  # type: ignore[arg-type]
        return clip.similarity(self.backbone, images, texts)

    def _variants(self) -> int:
        context = context_of(self.backbone)
        return 1 if context is None else context.variants
