"""Adapters of the projected features of a two-tower model (CLIP, SigLIP), behind all that is frozen.

Since nothing in front of them changes, a task may compute the features of its images once (`clip.bare_features`), and
let the adapters change what it has kept (`clip.adapted`).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.features.side import with_fields
from lightning_peft.towers.text_towers import two_towers
from lightning_peft.updates.in_place import without_autocast


class FeatureAdapter(Graft):
    """Changes the features that its host gives, a projection or a tower without one."""

    active = True
    """Whether it computes; a task switches it off to keep bare features."""

    def adapted(self, features: Tensor) -> Tensor:
        """Return the changed features, [B, p]."""
        raise NotImplementedError

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output with the changed features."""
        if not self.active:
            return out
        if isinstance(out, Tensor):
            return self.adapted(out)
        return with_fields(out, {"pooler_output": self.adapted(out.pooler_output)})


def image_end(model: nn.Module) -> nn.Module:
    """Return the module of a two-tower model that gives the features of images."""
    return _end(model, "visual_projection", "vision_model")


def text_end(model: nn.Module) -> nn.Module:
    """Return the module of a two-tower model that gives the features of texts."""
    return _end(model, "text_projection", "text_model")


def _end(model: nn.Module, projection: str, tower: str) -> nn.Module:
    towers = two_towers(model)
    return structure.part(towers, projection) or towers.get_submodule(tower)


class FeatureScores(Graft):
    """Adds scores of its own to the logits of classes; its host is the two-tower model."""

    def scores(self, images: Tensor, classes: int) -> Tensor:
        """Return what is added for normalised features [B, p] of fp32, [B, C]."""
        raise NotImplementedError

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output with the scores in its logits."""
        if isinstance(out, tuple):
            raise TuningError(f"{type(host).__name__} gives a tuple without names: call it with return_dict=True.")
        logits: Tensor = out.logits_per_image
        with without_autocast(logits):
            logits = (logits + self.scores(F.normalize(out.image_embeds.float(), dim=-1), logits.shape[1])).to(
                logits.dtype
            )
        return with_fields(out, {"logits_per_image": logits, "logits_per_text": logits.t()})
