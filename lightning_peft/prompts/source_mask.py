"""The mask of a prefix language model: all of the source is seen from everywhere, of the target what came before."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.labels import IGNORED
from lightning_peft.prompts.virtual_tokens import SOURCE


class SourceMask(Graft):
    """Gives its host, a whole model, the mask of its source and target.

    Which tokens are source says the argument ``source_mask`` [B, T]; without it, ``labels`` that run along the ids:
    what comes before the first target. Without either, all of a text is source, which is what `generate` starts from
    and what a text without a target is. Tokens after those in a cache of keys and values are target.
    """

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its mask.

        Raises:
            TuningError: there is a mask for each pair of tokens already.
        """
        names = structure.arguments_of(host)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        source, cache = inputs.pop(SOURCE, None), cache_in(inputs)
        if cache is not None and cache.get_seq_length() > 0:
            return forward(**inputs)
        tokens: Tensor = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        given = inputs.get("attention_mask")
        if given is not None and given.ndim != 2:
            raise TuningError(
                f"the attention mask has {given.ndim} dimensions, and PrefixLM makes the mask of pairs itself: give "
                "one of [B, T], and generate() a dynamic cache."
            )
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if given is None else given > 0
        if source is None:
            labels = inputs.get("labels")
            along = isinstance(labels, Tensor) and labels.shape == real.shape
            source = source_of(labels) if along else torch.ones_like(real)  # type: ignore[arg-type]
        dtype = next(p.dtype for p in host.parameters() if p.is_floating_point())
        inputs["attention_mask"] = pairs(real, source.bool(), dtype)
        if "position_ids" in names and inputs.get("position_ids") is None:
            inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)  # some models count them by the mask
        return forward(**inputs)


def source_of(labels: Tensor) -> Tensor:
    """Return which tokens come before the first target, all where there is none, [B, T]."""
    return (labels != IGNORED).cumsum(1) == 0


def with_source(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with ``source_mask`` [B, T], where its labels run along the ids and tell source from target."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
        return batch
    return {**batch, SOURCE: source_of(labels).to(ids.dtype)}


def pairs(real: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of attention, 0 where a query sees a key, [B, 1, T, T].

    Padding sees itself alone, so that no row of the softmax is empty.
    """
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    seen = (causal | source.unsqueeze(1)) & real.unsqueeze(1) | torch.eye(length, dtype=torch.bool, device=real.device)
    added = torch.zeros(seen.shape, dtype=dtype, device=real.device)
    return added.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def reads_source(model: nn.Module) -> bool:
    """Tell whether a model is a prefix language model by a graft on it."""
    return any(isinstance(child, SourceMask) for child in model.children())


def source_argument(model: nn.Module, source: Tensor) -> dict[str, Tensor]:
    """Return the argument that tells a model which tokens are source, [B, T], if it takes it."""
    return {SOURCE: source} if reads_source(model) else {}
