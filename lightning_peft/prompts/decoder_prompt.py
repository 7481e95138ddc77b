"""A soft prompt before what a decoder writes, in an encoder-decoder whose source is no text: Whisper, TrOCR and others.

The ids that the decoder reads get those of virtual tokens in front, which its word table gives their rows, and the
outputs of these are cut off. The target is said after the prompt, as a text after what went before it, so that labels
and what ``generate`` returns are as without it; the cache of ``generate`` holds the prompt.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import cache_argument
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft

_OF_TOKENS = ("last_hidden_state", "logits")
_OF_QUERIES = ("attentions", "cross_attentions")


class DecoderPrompt(Graft):
    """Runs the decoder, its host, with virtual tokens before the target.

    Args:
        count: how many, P.
        host: the decoder, whose arguments are looked up by name.
    """

    def __init__(self, count: int, host: nn.Module) -> None:
        super().__init__()
        self.count = count
        self._names = tuple(inspect.signature(host.forward).parameters)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what the decoder gives for the target, [B, T, ...].

        Raises:
            TuningError: it is given embeddings.
        """
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise TuningError(
                f"{type(host).__name__} is given embeddings, before which its prompt has no place: give it "
                "decoder_input_ids or labels."
            )
        cache = cache_argument.cache_in(inputs)
        before = cache.get_seq_length() if cache is not None else 0
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == max(before - self.count, 0) + ids.shape[1]:
            inputs["attention_mask"] = torch.cat((mask.new_ones(len(mask), self.count), mask), 1)
        if isinstance(positions, Tensor):
            inputs["position_ids"] = positions + self.count
        if before:  # the prompt is in the cache
            return forward(**inputs)
        virtual = -1 - torch.arange(self.count, device=ids.device).expand(len(ids), -1)
        inputs["input_ids"] = torch.cat((virtual.to(ids.dtype), ids), 1)
        if isinstance(positions, Tensor):
            first = torch.arange(self.count, device=ids.device).expand(len(positions), -1)
            inputs["position_ids"] = torch.cat((first, inputs["position_ids"]), 1)
        return self._cut(forward(**inputs))

    def _cut(self, out: Any) -> Any:
        """Return the output without that of the prompt."""
        if isinstance(out, tuple):
            return (out[0][:, self.count :], *out[1:])
        for name in _OF_TOKENS:
            if out.get(name) is not None:
                setattr(out, name, out[name][:, self.count :])
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(hidden[:, self.count :] for hidden in out.hidden_states)
        for name in _OF_QUERIES:
            if out.get(name) is not None:
                setattr(out, name, tuple(None if one is None else one[:, :, self.count :] for one in out[name]))
        return out
