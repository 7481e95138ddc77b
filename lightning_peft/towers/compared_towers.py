"""Towers that run with their prompts and, with gradients, without them: what the penalties of `PromptSRC` compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.graft import Graft
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import TextContext
from lightning_peft.towers.text_towers import feature_of


class Features:
    """The features of the last call with gradients, and those of the frozen model, until the penalty takes them.

    Attributes:
        texts: [C, p] each.
        images: [B, p] each.
    """

    def __init__(self) -> None:
        self.texts: tuple[Tensor, Tensor] | None = None
        self.images: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: no tensor of the last call."""
        return {"texts": None, "images": None}


class Compared(Graft):
    """Runs a tower with its prompts and, with gradients, without them, on written texts or the same images.

    Args:
        call: of the prompts.
        features: where to note what comes out.
        written: put words before the names in the texts; none: the tower is that of the images.
        projection: what the tower's output goes through; None: nothing.
    """

    projection: nn.Module | None

    def __init__(
        self, call: ContextCall, features: Features, written: list[TextContext], projection: nn.Module | None
    ) -> None:
        super().__init__()
        self.call, self.features = call, features
        vars(self)["written"] = written  # no parts of the model: they put in words that it has
        self.refer(projection=projection)

    written: list[TextContext]

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the tower's output with prompts."""
        out = forward(*args, **kwargs)
        if not self.call.active or not torch.is_grad_enabled():
            return out
        feature = partial(feature_of, projection=self.projection)
        with torch.no_grad(), _without(self.call):
            if self.written:
                frozen = [feature(each.around(forward, host, *args, **kwargs)) for each in self.written]
                frozen_feature = torch.stack(frozen).mean(0)
            else:
                frozen_feature = feature(forward(*args, **kwargs))
        both = F.normalize(feature(out).float(), dim=-1), F.normalize(frozen_feature.float(), dim=-1)
        if self.written:
            self.features.texts = both
        else:
            self.features.images = both
        return out


@contextmanager
def _without(call: ContextCall) -> Iterator[None]:
    call.active = False
    try:
        yield
    finally:
        call.active = True
