"""Domain adaptation of a two-tower model: pseudo labels stand for those of the target domain."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.class_scores import likeliest
from lightning_peft.tasks.metrics import Accuracy, CrossEntropy
from lightning_peft.tasks.two_towers import TwoTowerTask
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
        domain_templates: what is written around the name of a class in the source and in the target, behind the context
            of a method, e.g. ``["{}, a drawing.", "{}, a photo."]``; None: the same in both. With two texts of each
            class there are 2 K columns whatever the method.
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
        domain_templates: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, labels, **kwargs)
        if contrast not in ("all", "own"):
            raise TuningError(f"contrast={contrast!r} is no set of prompts: take 'all' or 'own'.")
        if temperature <= 0 or weight < 0 or threshold < 0:
            raise TuningError(
                f"threshold={threshold}, temperature={temperature} and weight={weight} are out of range: "
                "give a temperature above 0, the others 0 or more."
            )
        if domain_templates is not None and len(domain_templates) != 2:
            raise TuningError(
                f"domain_templates={domain_templates} has {len(domain_templates)} entries: give one for the source and "
                "one for the target."
            )
        for one in domain_templates or ():
            clip.class_texts([], one)
        self.domain_templates = domain_templates
        self.contrast = contrast
        self.threshold = threshold
        self.temperature = temperature
        self.weight = weight
        self.score_by({"loss": CrossEntropy(), "accuracy": Accuracy()})

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that data and method are for adaptation.

        Raises:
            TuningError: the data are of one domain, or a method changes the model that gives the pseudo labels.
        """
        super().check_data(data, stage)
        for template in self.domain_templates or ():
            self.texts(self.classes, template)
        classes = MulticlassAccuracy(len(self.classes), average="macro")
        self.test_scores.add_metrics({"class_accuracy": classes})
        self.coverage, self.pseudo_accuracy = MeanMetric(), Accuracy()
        prompts = [place.graft for place in grafts(self.backbone) if hasattr(place.graft, "call")]
        own = {id(p) for graft in prompts for p in graft.parameters()}
        others = [name for name, p in self.backbone.named_parameters() if p.requires_grad and id(p) not in own]
        if stage == "fit" and self.weight and others:
            raise TuningError(
                f"{others[0]} is trained in the model whose frozen form gives the pseudo labels: use a method of "
                "prompts, such as DAPL, or weight=0."
            )

    def loss(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the loss of both domains, and log its parts.

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
        logged = {"train_source_loss": source_loss, "train_target_loss": target_loss, "train_coverage": coverage}
        means = {name: value.detach() for name, value in logged.items()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=self.rows_in(batch))
        return source_loss + self.weight * target_loss

    def rows_in(self, batch: Mapping[str, Mapping[str, Tensor]]) -> int:
        """Return how many rows of the source a training batch has."""
        return len(batch["source"]["labels"])

    def pseudo_labels(self, batch: Mapping[str, Tensor], features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the likeliest class of each image by the frozen model, and whether it is sure enough, [B] each."""
        with torch.no_grad(), frozen(self.backbone):
            if features is None or not clip.images_are_frozen(self.backbone):
                features = self.features(batch)
            if _NAIVE not in self._kept:
                texts = self.texts(self.classes, self.template, bare=True)
                self._kept[_NAIVE] = clip.text_features(self.backbone, texts)
            logits = clip.similarity(self.backbone, features, self._kept[_NAIVE])
        sure, classes = (logits / self.temperature).softmax(1).max(1)
        return classes, sure >= self.threshold

    def score(self, batch: Mapping[str, Tensor], split: Split) -> None:
        """Add a batch to the metrics: of the source in validation, of the target and its pseudo labels in the test."""
        images = self.features(batch)
        for scores in self.metrics(split):
            scores.update(self._of_domain(images, int(split == "test")), batch["labels"])
        if split == "test":
            classes, sure = self.pseudo_labels(batch, images)
            self.coverage.update(sure.float())
            if bool(sure.any()):
                one_hot = F.one_hot(classes[sure], len(self.classes))
                self.pseudo_accuracy.update(one_hot, batch["labels"][sure])

    def log_scores(self, split: Split) -> None:
        """Log the scores of all batches, and in the test those of the pseudo labels."""
        super().log_scores(split)
        if split == "test":
            self.log("test_coverage", self.coverage.compute())
            self.log("test_pseudo_accuracy", torch.nan_to_num(self.pseudo_accuracy.compute()))
            self.coverage.reset()
            self.pseudo_accuracy.reset()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each image, and ``probabilities``, [B, K]."""
        return likeliest(self._of_domain(self.features(batch), 1), self.classes)

    def _target_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the images that have a pseudo label, zero if none has, and their share."""
        images = self.features(batch)
        classes, sure = self.pseudo_labels(batch, images)
        logits = self._logits(images, 1)
        if logits.shape[1] > len(self.classes):
            classes = classes + len(self.classes)
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
        """Return the logits of the prompts of one domain, [B, K], or of all, [B, 2 K]."""
        if self.domain_templates is None:
            texts = self.text_features(self.classes, images, variant)
            return clip.similarity(self.backbone, images, texts)
        domains = range(2) if variant is None else [variant]
        prompted = self._contexts() > 1
        texts = torch.cat(
            [
                self.text_features(self.classes, images, i if prompted else None, self.domain_templates[i])
                for i in domains
            ],
            dim=-2,
        )
        return clip.similarity(self.backbone, images, texts)

    def _variants(self) -> int:
        return self._contexts() if self.domain_templates is None else 2

    def _contexts(self) -> int:
        context = context_of(self.backbone)
        return 1 if context is None else context.variants
