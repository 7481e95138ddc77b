"""Two-tower models (CLIP, SigLIP) as classifiers: texts of the classes, features of both towers, logits in fp32.

The logits of a class are ``exp(s) cos(g(text), f(image))``; in bf16 numbers near 30 are 0.125 apart, so features are
compared in fp32 whatever the precision of the towers, autocast included.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.sharded import whole
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import context_of
from lightning_peft.towers.feature_adapters import FeatureAdapter, FeatureScores, image_end
from lightning_peft.towers.text_towers import positions_of, reads_end, two_towers


def class_texts(names: Sequence[str], template: str) -> list[str]:
    """Return a text for each class; ``_`` in a name stands for a space.

    >>> class_texts(["red_star"], "a photo of a {}.")
    ['a photo of a red star.']
    """
    if "{}" not in template:
        raise TuningError(f"template={template!r} has no place for the name of a class: write {{}} where it goes.")
    return [template.replace("{}", name.replace("_", " ")) for name in names]


def tokenize(model: nn.Module, tokenizer: Any, texts: Sequence[str], names: Sequence[str], room: int = 0) -> Tensor:
    """Return the ids of the texts of classes, [C, T], padded as the model was trained.

    Args:
        model: the two-tower model.
        tokenizer: its tokenizer.
        texts: a text for each class.
        names: of the classes, for error messages.
        room: how many tokens a context adds to each text.

    Raises:
        TuningError: a text is too long with its context, or two classes have the same text.
    """
    tower: nn.Module = model.text_model  # type: ignore[assignment]
    limit = positions_of(tower)
    lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
    for name, text, length in zip(names, texts, lengths, strict=True):
        if length + room > limit:
            context = f" and a context of {room}" if room else ""
            raise TuningError(
                f"class {name!r} is too long: {text!r} has {length} tokens{context}, the model reads {limit}: "
                "shorten its name."
            )
    padding: dict[str, Any] = {"padding": True} if reads_end(tower) else {"padding": "max_length", "max_length": limit}
    if tokenizer.pad_token_id is None:
        raise TuningError(f"{type(tokenizer).__name__} has no padding token: set its pad_token.")
    ids: Tensor = tokenizer(list(texts), return_tensors="pt", **padding)["input_ids"]
    if len({tuple(row) for row in ids.tolist()}) < len(ids):
        rows = [tuple(row) for row in ids.tolist()]
        twin = next(i for i, row in enumerate(rows) if row in rows[:i])
        other = rows.index(rows[twin])
        raise TuningError(
            f"classes {names[other]!r} and {names[twin]!r} are the same to the tokenizer: give them unlike names."
        )
    return ids


def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the projected features of images, [B, p]."""
    return model.get_image_features(pixel_values=pixel_values).pooler_output  # type: ignore[operator]


def text_features(
    model: nn.Module, input_ids: Tensor, images: Tensor | None = None, variant: int | None = None
) -> Tensor:
    """Return the projected features of texts, [V C, p], or [B, C, p] where texts depend on the image.

    Args:
        model: the two-tower model.
        input_ids: a text for each class, [C, T].
        images: image features, [B, p], for a context that depends on them; otherwise they do nothing.
        variant: which of the prompts that a method makes of a text; None: all.
    """
    call = _call_of(model)
    if call is None:
        return model.get_text_features(input_ids=input_ids).pooler_output  # type: ignore[operator]
    conditional = depends_on_images(model) and call.active
    call.variant, call.images = variant, images if conditional else None
    try:
        features: Tensor = model.get_text_features(input_ids=input_ids).pooler_output  # type: ignore[operator]
    finally:
        call.variant = call.images = None
    return features.unflatten(0, (len(images), -1)) if conditional and images is not None else features


def similarity(model: Any, images: Tensor, texts: Tensor) -> Tensor:
    """Return logits ``exp(s) cos(image, text)`` (SigLIP adds a bias), [B, C], in fp32 under every precision.

    Args:
        model: the two-tower model, whose temperature is used.
        images: [B, p].
        texts: [C, p], or [B, C, p].
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        cosine = images @ texts.t() if texts.ndim == 2 else torch.einsum("bp,bcp->bc", images, texts)
        logits = whole(model.logit_scale).float().exp() * cosine
        bias = getattr(model, "logit_bias", None)
        logits = logits if bias is None else logits + whole(bias).float()
        for graft in two_towers(model).children():
            if isinstance(graft, FeatureScores) and not graft.rests:
                logits = logits + graft.scores(images, logits.shape[1])
        return logits


def depends_on_images(model: nn.Module) -> bool:
    """Tell whether the texts of the model depend on the image, so that their features cannot be kept."""
    context = context_of(model)
    return context is not None and context.conditional


def images_are_frozen(model: nn.Module) -> bool:
    """Tell whether no method changes the features of an image before the last adapter of them."""
    parts = [part for n in ("vision_model", "visual_projection") if (part := structure.part(model, n)) is not None]
    added = [place.graft for part in parts for place in grafts(part) if not isinstance(place.graft, FeatureAdapter)]
    own = {id(p) for graft in _adapters(model) for p in graft.parameters()}
    trained = any(p.requires_grad and id(p) not in own for part in parts for p in part.parameters())
    return not trained and all(graft.listens_only for graft in added)


def feature_width(model: nn.Module) -> int:
    """Return the number p of a feature."""
    end = image_end(model)
    width: int = structure.out_features_of(end) or structure.config_of(end).hidden_size
    return width


def adapted(model: nn.Module, features: Tensor) -> Tensor:
    """Return features of images, [B, p], as adapters at the end of the vision tower change them."""
    for graft in _adapters(model):
        if not graft.rests:
            features = graft.adapted(features)
    return features


@contextmanager
def bare_features(model: nn.Module) -> Iterator[None]:
    """Let the vision tower give its features without these adapters, so that they can be kept."""
    found = _adapters(model)
    for graft in found:
        graft.active = False
    try:
        yield
    finally:
        for graft in found:
            graft.active = True


def _adapters(model: nn.Module) -> list[FeatureAdapter]:
    return [graft for graft in image_end(model).children() if isinstance(graft, FeatureAdapter)]


def _call_of(model: nn.Module) -> ContextCall | None:
    context = context_of(model)
    return None if context is None else context.call
