"""Generates texts with a frozen model: greedily, or several samples of a prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from lightning_peft.prompting.encoding import Style
from lightning_peft.prompts.virtual_tokens import real_length


@dataclass(slots=True)
class Written:
    """What a model wrote for one prompt.

    Args:
        ids: its tokens, without those after the end.
        score: the mean log-likelihood of a token.
    """

    ids: list[int]
    score: float


@dataclass
class Sampler:
    """Lets a model write.

    Args:
        tokenizer: of the model.
        lm: 'causal' or 'seq2seq'.
        temperature: of sampling; 0: the likeliest token each time.
        top_k: sample from so many of the likeliest tokens; 0: from all.
        top_p: sample from the likeliest tokens of this share together.
        repetition_penalty: by which the logit of a token that was written already falls; 1: not.
        stop: a text ends before these words.
    """

    tokenizer: Any
    lm: Style
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop: str | None

    def write(self, model: Any, ids: Tensor, mask: Tensor, most: int, paths: int) -> list[Written]:
        """Return what the model writes after each row, at most ``most`` tokens: ``paths`` sampled texts; 0: one."""
        how: dict[str, Any] = {"do_sample": False, "num_return_sequences": 1}
        if self.temperature > 0 and paths:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            how["num_return_sequences"] = paths
        if self.repetition_penalty > 1:
            # Of what is written alone: the padding of a prompt is the end of a text in many vocabularies.
            prompt = ids.shape[1] if self.lm == "causal" else 1
            punish = RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty), prompt_ignore_length=prompt)
            how["logits_processor"] = LogitsProcessorList([punish])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **how,
        )
        new = out.sequences[:, real_length(ids) :] if self.lm == "causal" else out.sequences[:, 1:]
        ends = model.generation_config.eos_token_id
        return _written(new, out.logits, {*ends} if isinstance(ends, list) else {ends})

    def text(self, path: Written) -> str:
        """Return what was written, up to the words that end it."""
        text: str = self.tokenizer.decode(path.ids, skip_special_tokens=True)
        return text.split(self.stop)[0] if self.stop else text


def _written(new: Tensor, logits: tuple[Tensor, ...], ends: set[int | None]) -> list[Written]:
    """Return the tokens [B, T] up to the first that ends a text, and their mean log-likelihood, that of the end too."""
    likely = torch.stack(logits, 1).float().log_softmax(-1)
    likely = likely.gather(2, new[:, : likely.shape[1]].unsqueeze(2)).squeeze(2)
    found = []
    for row, own in zip(new.tolist(), likely, strict=True):
        count = next((i for i, token in enumerate(row) if token in ends), len(row))
        counted = max(1, min(count + 1, len(own)))
        found.append(Written(row[:count], own[:counted].mean().item()))
    return found
