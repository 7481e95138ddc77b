"""A soft prompt before the text of a causal model, computed once for all rows of a batch.

What stands before the text does not see it: the prompt's keys and values are the same for every row. So they are
computed at batch size 1, forward and backward, and all rows attend to them. The outputs are those of the text's tokens,
up to rounding as if the prompt had been in the input and its outputs cut off. ``generate`` puts the prompt into its
cache.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import cache_argument, structure, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.host_copy import ask
from lightning_peft.core.labels import IGNORED
from lightning_peft.core.sharded import is_part
from lightning_peft.core.tracing import is_traced
from lightning_peft.prompts.packed_mask import holds_several, packed_mask
from lightning_peft.prompts.prefix import positions_of
from lightning_peft.prompts.virtual_tokens import PromptRows


class PromptCall:
    """What the grafts of one method tell each other in a call: whether the last output of the prompt is wanted."""

    last = False


class PromptLoss(Graft):
    """Lets the prompt learn to say the first token of the text. Its host is the language model.

    The last virtual token says that token, whatever the architecture; PEFT and a prompt in the input count it, too. So
    the labels of a call get one more in front, and the logits, from which the model computes its loss, as well.

    Args:
        call: shared with the prompt.
        host: the language model, whose arguments are looked up by name.
    """

    def __init__(self, call: PromptCall, host: nn.Module) -> None:
        super().__init__()
        self.call = call
        self._names = tuple(inspect.signature(host.forward).parameters)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output for the text, with a loss that counts its first token."""
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        text = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or not isinstance(text, Tensor) or labels.shape != text.shape[:2]:
            return forward(*args, **kwargs)
        self.call.last = True
        try:
            out = forward(**inputs | {"labels": F.pad(labels, (1, 0), value=IGNORED)})
        finally:
            self.call.last = False
        if isinstance(out, tuple):
            return (out[0], out[1][:, 1:], *out[2:])
        out.logits = out.logits[:, 1:]
        return out


class SharedPrompt(PromptRows):
    """Runs the decoder, its host, with a prompt before the text.

    Args:
        weight: the rows of the prompt, [P, d], or a module that computes them.
        count: P.
        host: the decoder, whose arguments are looked up by name.
        call: shared with the language model; None: there is none.
    """

    spares_mask = True

    def __init__(
        self, weight: nn.Parameter | nn.Module, count: int, host: nn.Module, call: PromptCall | None = None
    ) -> None:
        super().__init__(weight)
        self.count, self.call = count, call or PromptCall()
        self._names = tuple(inspect.signature(host.forward).parameters)
        name = cache_argument.name_in(host.forward)
        assert name is not None
        self._cache = name

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs of the text with the prompt before it, [B, N, d].

        Raises:
            TuningError: the mask has four dimensions, or the cache has a fixed size.
        """
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        text = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        assert isinstance(text, Tensor)
        cache = cache_argument.cache_in(inputs)
        inputs = cache_argument.with_cache(inputs, self._cache, cache)
        cached = cache.get_seq_length() if cache is not None else 0
        texts = None if cached else _texts_of(inputs)
        self._widen_mask(inputs, text, cached or self.count)
        if cached:
            return forward(**inputs)
        alone = is_traced() or _is_checkpointed(host) or _is_sharded(host)  # none of them takes a cache
        if texts is not None:
            inputs["attention_mask"] = packed_mask(texts, self.count, host, _dtype(host), whole=alone)
        if alone:
            return self._in_front(forward, host, inputs)
        cache, last = self._computed(forward, host, text.shape[0], cache)
        out = forward(**inputs | {self._cache: cache})
        if self.call.last:
            out.last_hidden_state = torch.cat((last.expand(text.shape[0], -1, -1), out.last_hidden_state), 1)
        if inputs.get("use_cache") is False:  # generate() would take it for its own and go on from it
            setattr(out, self._cache, None)
        return out

    def _widen_mask(self, inputs: dict[str, Any], text: Tensor, cached: int) -> None:
        """Let the mask cover the prompt, and the positions that were given come after it."""
        mask = inputs.get("attention_mask")
        if mask is not None:
            if mask.ndim != 2:
                raise TuningError(
                    f"a soft prompt is put before the text with a mask [B, T], this one has {mask.ndim} dimensions: "
                    "give that of the tokenizer, and to generate() no cache of fixed size."
                )
            if not is_traced() and ask(mask, _is_full):  # none says the same, and asks nothing of the GPU
                inputs["attention_mask"] = None
            elif mask.shape[1] == cached + text.shape[1] - self.count:
                inputs["attention_mask"] = torch.cat((mask.new_ones(mask.shape[0], self.count), mask), 1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.count
        else:  # with padding before a text, its first token comes right after the prompt all the same
            inputs["position_ids"] = positions_of(inputs.get("attention_mask"), text.shape[1])

    def _computed(self, forward: Callable[..., Any], host: nn.Module, rows: int, cache: Any) -> tuple[Any, Tensor]:
        """Return a cache with the prompt's keys and values for each row, [B, H, P, d_k], and its last output."""
        from transformers import DynamicCache

        if cache is not None and not isinstance(cache, DynamicCache):
            raise TuningError(
                f"a soft prompt needs room in the cache, which {type(cache).__name__} of fixed size has not: "
                "use the default cache of generate()."
            )
        prompt = self._embedded(host)[None].clone()  # CTRL multiplies what it is given in place
        once = forward(inputs_embeds=prompt, use_cache=True, return_dict=True)
        cache = DynamicCache() if cache is None else cache
        for i, layer in enumerate(cache_argument.cache_in(once).layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
        return cache, once.last_hidden_state[:, -1:]

    def _in_front(self, forward: Callable[..., Any], host: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Run the prompt in each row before the text, and cut its outputs off."""
        count, inputs = self.count, dict(inputs)
        ids = inputs.pop("input_ids", None)
        text = host.get_input_embeddings()(ids) if ids is not None else inputs["inputs_embeds"]  # type: ignore[operator]
        prompt = self._embedded(host).expand(text.shape[0], -1, -1)
        inputs["inputs_embeds"] = torch.cat((prompt, text), 1)
        if inputs.get("position_ids") is not None:
            before = torch.arange(count, device=text.device).expand(inputs["position_ids"].shape[0], -1)
            inputs["position_ids"] = torch.cat((before, inputs["position_ids"]), 1)
        out = forward(**inputs)
        out.last_hidden_state = out.last_hidden_state[:, count - self.call.last :]
        if out.hidden_states is not None:
            out.hidden_states = tuple(hidden[:, count:] for hidden in out.hidden_states)
        return out

    def _embedded(self, host: nn.Module) -> Tensor:
        return self.rows().to(_dtype(host))


def _dtype(host: nn.Module) -> torch.dtype:
    """Return the dtype of a decoder's embeddings."""
    table: nn.Module = host.get_input_embeddings()  # type: ignore[operator]
    return table.weight.dtype  # type: ignore[return-value]


def decoder_of(backbone: nn.Module) -> nn.Module | None:
    """Return the decoder before whose text a prompt can be shared, or None.

    It must be causal, take embeddings and a cache of keys and values, and attend to all that came before.
    """
    decoder = text_structure.text_decoder_of(backbone)
    if decoder is None or cache_argument.name_in(decoder.forward) is None:
        return None
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    for config in (structure.config_of(backbone), structure.config_of(decoder)):  # of images and text, and of text
        parts = set(structure.setting(config, "layer_types") or ()) - {"full_attention"}
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or structure.setting(config, "sliding_window") or parts:
            return None
    return decoder


def _texts_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the positions [B, T] of rows that hold several texts, by which transformers tells these apart, or None."""
    positions = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    return positions if holds_several(positions) else None


def _is_full(mask: Tensor) -> bool:
    return bool((mask != 0).all())


def _is_checkpointed(host: nn.Module) -> bool:
    """Tell whether activations are computed anew in the backward pass, by transformers or by torch's wrapper."""
    wrapped = any(type(module).__name__ == "CheckpointWrapper" for module in host.modules())
    return host.training and bool(wrapped or structure.recomputing(host))


def _is_sharded(host: nn.Module) -> bool:
    """Tell whether FSDP2 has parted the weights, which it gathers for a layer once on the way back."""
    return any(is_part(parameter) for parameter in host.parameters())
