"""Prefix language model: one stack that reads the source in both directions and writes the target from left to right.

A query sees key k where k is source or comes no later: ``M[q, k] = 0 if k in source or k <= q else -inf``. With an
empty source that is a causal model, without a target one that sees all, as an encoder does. Any decoder is made one, or
an encoder with a language-model head; what is trained is up to the method beside it: `FullFineTuning` to adapt the
model to its new mask, LoRA, a prompt. The prompt of a batch's ``labels`` is its source, what `generate` is given is
source, and the options of a scored prompt are targets.

Source: Dong et al. 2019, arXiv 1905.03197 (UniLM), section 2.3, sequence-to-sequence; Raffel et al. 2020, arXiv
1910.10683, section 3.2.1, which finds it as good as an encoder-decoder with half the parameters. UniLM masks target
tokens and fills them in; here a decoder says the next token, and an encoder what stands at the labels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_peft.core import structure, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach, grafts
from lightning_peft.core.rates import Rates
from lightning_peft.prompts.shared_prompt import SharedPrompt
from lightning_peft.prompts.source_mask import SourceMask, with_source
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class PrefixLM(Method):
    """Let a language model read its source in both directions; it has nothing to train itself."""

    kind: ClassVar[str] = "mask"
    trains: ClassVar[str] = "nothing: the source is read in both directions, whatever is trained beside it"
    paper: ClassVar[str] = "Dong et al. 2019, arXiv 1905.03197"
    advised: ClassVar[Rates] = Rates(2e-3, 1e-2, "it trains nothing: LoRA's, for what is beside it")

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the mask to the model."""
        name = type(backbone).__name__
        if structure.is_encoder_decoder(backbone):
            raise TuningError(f"the encoder of {name} reads the source in both directions already: leave PrefixLM out.")
        if structure.output_embeddings_of(backbone) is None or "attention_mask" not in structure.arguments_of(backbone):
            raise TuningError(f"{name} is no language model with a mask: load it with its language-model head.")
        window = text_structure.window_of(backbone)
        if window is not None:
            raise TuningError(
                f"some layers of {name} see {window} tokens back, and a mask of the whole source would take that from "
                "them: take a model with full attention."
            )
        if any(isinstance(place.graft, SharedPrompt) for place in grafts(backbone)):
            raise TuningError(
                "the prompt before the text was made for a causal model, and does not see the source: apply PrefixLM "
                "before the method of the prompt."
            )
        attach(backbone, SourceMask(), self.key)
        return ()

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with ``source_mask`` [B, T], where its labels tell source from target."""
        return with_source(batch)


PrefixLMMixin = TunedBy[PrefixLM]
