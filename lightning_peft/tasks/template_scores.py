"""The scores of each of several templates, and their mean and spread."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchmetrics import MetricCollection

from lightning_peft.prompting.instructions import over_templates


class TemplateScores(nn.ModuleList):
    """One collection of metrics for each template.

    Args:
        names: of the templates.
        scores: name -> metric.
        headline: the metric that is told of each template.
    """

    def __init__(self, names: Sequence[str], scores: Mapping[str, Any], headline: str) -> None:
        super().__init__(MetricCollection(dict(scores), compute_groups=False).clone() for _ in names)
        self.names, self.scores, self.headline = list(names), list(scores), headline

    @property
    def collections(self) -> list[MetricCollection]:
        """The metrics of each template."""
        return list(self)  # type: ignore[arg-type]

    def add(self, template: int, preds: Any, target: Any) -> None:
        """Add rows to the scores of a template."""
        self.collections[template].update(preds, target)

    def of_each(self) -> dict[str, dict[str, float]]:
        """Return name of a template -> name of a score -> its value, over all processes."""
        values = [{name: value.item() for name, value in own.compute().items()} for own in self.collections]
        return dict(zip(self.names, values, strict=True))

    def summary(self) -> dict[str, float]:
        """Return the scores, means over the templates; of several also ``_std``, ``_min``, ``_max`` and ``/NAME``."""
        each, found = self.of_each(), dict[str, float]()
        for name in self.scores:
            over = over_templates([own[name] for own in each.values()])
            found[name] = over.mean
            if len(each) > 1:
                found |= {f"{name}_std": over.std, f"{name}_min": over.min, f"{name}_max": over.max}
        if len(each) > 1:
            found |= {f"{self.headline}/{template}": own[self.headline] for template, own in each.items()}
        return found
