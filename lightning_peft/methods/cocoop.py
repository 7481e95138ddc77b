"""CoCoOp: the context of the prompts is shifted by what a small network makes of the image.

v_m(x) = v_m + h(x) for m = 1 .. M, h = Linear(p, p / 16), ReLU, Linear(p / 16, d), on the normalised image feature x of
p numbers; every image then has prompts of its own, [B, C] of them.

Source: Zhou et al. 2022, arXiv 2203.05557, and its released code, which runs the images one by one: here a
batch is one pass, equal to that loop up to rounding. What the prompts of an image have in common is computed once, and
``chunk`` bounds how many are in memory. The context has the name at its end and is the same for all classes, as there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.arguments import natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.rates import SHAPES, Rates
from lightning_peft.towers.context_tokens import ContextCall, ContextTokens
from lightning_peft.towers.contexts import TextContext, graft_context, plain_layout
from lightning_peft.towers.text_towers import initial_rows, text_tower, two_towers, word_table
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

DEFAULT_LENGTH = 4


class ConditionalTokens(ContextTokens):
    """Rows of a context, and the network that shifts them by the features of an image.

    Args:
        weight: the rows, [M, d].
        call: shared with the other grafts of the method.
        features: how many numbers p an image feature has.
        reduction: how many times narrower the network is inside.
    """

    def __init__(self, weight: nn.Parameter, call: ContextCall, features: int, reduction: int) -> None:
        super().__init__(weight, call)
        inner = features // reduction
        self.meta_net = nn.Sequential(nn.Linear(features, inner), nn.ReLU(), nn.Linear(inner, weight.shape[1]))

    def shift(self, images: Tensor) -> Tensor:
        """Return the shift of the context's tokens for each image, [B, d]."""
        shift: Tensor = self.meta_net(F.normalize(images.float(), dim=-1))
        return shift


class ConditionalContext(TextContext):
    """Makes the prompts of each image. Its host is the text tower."""

    conditional = True

    def __init__(self, *args: Any, tokens: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = tokens

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the tower's output for the prompts of all images, B C rows, those of the first image first."""
        if not self.call.active:
            return super().around(forward, host, *args, **kwargs)
        if self.call.images is None:
            raise TuningError(
                "CoCoOp's prompts depend on the image: call the model with input_ids and pixel_values, or give "
                "images= to lightning_peft.towers.clip.text_features."
            )
        tokens = cast(ConditionalTokens, word_table(host).get_submodule(self.tokens))
        self.call.shift = tokens.shift(self.call.images)
        try:
            return super().around(forward, host, *args, **kwargs)
        finally:
            self.call.shift = None


class ImageListener(Graft):
    """Passes the image features of a call to the text tower. It changes nothing."""

    listens_only = True

    def __init__(self, call: ContextCall) -> None:
        super().__init__()
        self.call = call

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Keep the features till the end of the call."""
        if self.call.listens:
            self.call.images = out if isinstance(out, Tensor) else out.pooler_output
        return out


class OwnTexts(Graft):
    """Compares each image with its own prompts alone. Its host is the two-tower model."""

    listens_only = True

    def __init__(self, call: ContextCall) -> None:
        super().__init__()
        self.call = call

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output with logits of each image [B, C], where the host compares all images with all prompts."""
        if not self.call.active:
            return forward(*args, **kwargs)
        if kwargs.get("return_loss"):
            raise TuningError(
                "return_loss contrasts pairs of image and text, and CoCoOp makes each text anew for each image: "
                "compute the loss from logits_per_image."
            )
        self.call.listens = True
        try:
            out = forward(*args, **kwargs)
        finally:
            self.call.listens, self.call.images = False, None
        per_image = out.get("logits_per_image") if isinstance(out, Mapping) else None  # [B, B C]
        if per_image is None:
            raise TuningError(
                f"{type(host).__name__} changes what the two-tower model gives, so CoCoOp cannot keep the logits of "
                "each image's own prompts: keep the model as a part of yours, and do not derive from it."
            )
        size = len(per_image)
        own = torch.diagonal(per_image.unflatten(1, (size, -1)), dim1=0, dim2=1)
        out.logits_per_image, out.logits_per_text = own.t(), own
        return out


@dataclass(eq=False, kw_only=True)
class CoCoOp(Method):
    """Train a context that a small network shifts for each image, in the texts that CLIP or SigLIP reads.

    Args:
        num_virtual_tokens: length M of the context [tokens]; None: 4, or that of ``init``.
        init: words whose embeddings the context starts from, "a photo of a" in the paper; None: N(0, 0.02²).
        reduction: the network is that many times narrower inside than an image feature.
        chunk: at most that many prompts in the text tower at a time; in training they are computed again for the
            gradient, which takes a third more time. None: all.
        share_prefix: compute what texts have in common once and nothing behind their ends; False: every text in full.
        tokenizer: folder or hub id of the tokenizer of ``init``; None: that of the backbone.
    """

    num_virtual_tokens: int | None = natural(None, "is no context")
    init: str | None = "a photo of a"
    reduction: int = 16
    chunk: int | None = natural(None)
    share_prefix: bool = True
    tokenizer: str | None = None

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "a context in the texts of CLIP or SigLIP, shifted by the image"
    paper: ClassVar[str] = "Zhou et al. 2022, arXiv 2203.05557"
    advised: ClassVar[Rates] = Rates(2e-2, 1e-2, f"{SHAPES}; the paper has 2e-3", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"init", "chunk", "share_prefix", "tokenizer"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the context, and the graft that passes it the image features."""
        tower, call = text_tower(backbone, type(self).__name__), ContextCall()
        model = two_towers(backbone)
        source = structure.part(model, "visual_projection") or structure.part(model, "vision_model")
        if source is None:
            raise TuningError(f"{type(backbone).__name__} reads no images, which CoCoOp needs: give a CLIPModel.")
        features = structure.out_features_of(source) or structure.config_of(source).hidden_size
        if not 1 <= self.reduction <= features:
            raise TuningError(f"reduction={self.reduction} is out of range: an image feature has {features} numbers.")
        rows = initial_rows(
            backbone, word_table(tower), self.num_virtual_tokens, self.init, self.tokenizer, DEFAULT_LENGTH
        )
        tokens = ConditionalTokens(nn.Parameter(rows), call, features, self.reduction)
        context = ConditionalContext(
            plain_layout(len(rows)), call, share_prefix=self.share_prefix, chunk=self.chunk, tokens=self.key
        )
        graft_context(tower, tokens, context, self.key)
        attach(source, ImageListener(call), self.key)
        attach(model, OwnTexts(call), self.key)
        return ()


CoCoOpMixin = TunedBy[CoCoOp]
