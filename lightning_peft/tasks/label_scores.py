"""Scores the labels of a verbalizer with a language model: log-likelihoods, combined and calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.prompting.encoding import mask_id, sentinel_id
from lightning_peft.prompting.template_parts import Mask
from lightning_peft.tasks import likelihoods
from lightning_peft.tasks.class_prompts import NULL, ClassPrompts, Key, Prompt
from lightning_peft.tasks.shared_text import Shared, prefill

Normalise = Literal["sum", "mean", "pmi"]


@dataclass
class LabelScores:
    """Scores the labels in the prompts of a batch; what depends on the template alone is kept until `forget`.

    Args:
        prompts: what wrote them.
        normalise: what makes the score of a word of those of its tokens.
        decoding: how a masked model fills several masks.
        share_prefix: compute the keys and values of demonstrations once.
        at_once: how many prompts the model is fed together.
        content_free_mean: how the probabilities after inputs without content are averaged.
    """

    prompts: ClassPrompts
    normalise: Normalise
    decoding: likelihoods.Decoding
    share_prefix: bool
    at_once: int
    content_free_mean: likelihoods.ContentFreeMean = "raw"

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget what was computed of prompts without content, and of prefixes: it depends on the weights."""
        self.without_row: dict[Key, Tensor] = {}
        """Log p of the words after PMI's empty input, and of the labels after the inputs that calibrate."""
        self._shared: dict[tuple[int, ...], Shared | None] = {}

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return log p of the labels, for each row and template, [B, templates, C]."""
        prompts: list[Prompt] = batch["prompts"]
        words = self._words(model, batch)
        found: dict[tuple[int, int], tuple[Tensor, str]] = {}
        free: dict[tuple[int, str], list[Tensor]] = {}
        for group in grouped(prompts):
            first = prompts[group[0]]
            order = torch.tensor([word for i in group for word in prompts[i].which]).argsort()
            score = torch.cat([words[i] for i in group])[order]
            if first.row >= 0:
                found[first.row, first.template] = score, first.front.text
            elif first.free == NULL:
                self.without_row[first.template, None] = score
            else:
                free.setdefault((first.template, first.front.text), []).append(score)
        for key, scores in free.items():
            labels = torch.stack([self._labels(score, key[0]) for score in scores])
            self.without_row[key] = likelihoods.content_free_prior(labels, self.content_free_mean)
        scores = [self._calibrated(*found[key], key[1]) for key in sorted(found)]
        return torch.stack(scores).unflatten(0, (-1, len(self.prompts.templates)))

    def _words(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return log p of the words of each prompt, summed or averaged over their tokens."""
        prompts: list[Prompt] = batch["prompts"]
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        alike: dict[Any, list[int]] = {}
        for i, prompt in enumerate(prompts):
            same = tuple(map(tuple, prompt.words)) if self.prompts.lm == "masked" else ()
            alike.setdefault((prompt.shared, same, prompt.template), []).append(i)
        for group in alike.values():
            for start in range(0, len(group), self.at_once):
                part = group[start : start + self.at_once]
                for i, score in zip(part, self._run(model, batch, part), strict=True):
                    lengths = torch.tensor([len(word) for word in prompts[i].words], device=score.device)
                    found[i] = score / lengths if self.normalise == "mean" else score
        return found

    def _run(self, model: nn.Module, batch: Mapping[str, Any], rows: list[int]) -> Tensor:
        """Return log p of the words of some prompts, [rows, words]."""
        ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
        used = mask.any(0)
        ids, mask = ids[:, used], mask[:, used]
        first: Prompt = batch["prompts"][rows[0]]
        words = [batch["prompts"][i].words for i in rows]
        if self.prompts.lm == "masked":
            inputs = {"input_ids": ids, "attention_mask": mask}
            return likelihoods.masked_scores(model, inputs, mask_id(self.prompts.tokenizer), words[0], self.decoding)
        if self.prompts.lm == "seq2seq":
            template = self.prompts.templates[first.template]
            gap = template.slot is not None and isinstance(template.parts[template.slot], Mask)
            opening = [sentinel_id(self.prompts.tokenizer)] if gap else []
            return likelihoods.seq2seq_scores(model, ids, mask, words, opening)
        shared = self._read(model, first.shared) if first.shared and self.share_prefix else None
        if self.share_prefix and (shared is not None or not first.shared):
            return likelihoods.causal_scores(model, ids, mask, words, shared)
        return likelihoods.recomputed_scores(model, ids, mask, words, first.shared)

    def _read(self, model: nn.Module, front: tuple[int, ...]) -> Shared | None:
        """Return the keys and values of demonstrations; those of the last few are kept."""
        if front not in self._shared:
            while len(self._shared) > len(self.prompts.templates):
                self._shared.pop(next(iter(self._shared)))
            self._shared[front] = prefill(model, front)
        return self._shared[front]

    def _labels(self, words: Tensor, template: int) -> Tensor:
        if self.normalise == "pmi":
            words = words - self.without_row[template, None]
        verbalizer = self.prompts.verbalizer
        return likelihoods.combined(words, verbalizer.owners, verbalizer.combine)

    def _calibrated(self, words: Tensor, front: str, template: int) -> Tensor:
        scores = self._labels(words, template)
        if not self.prompts.content_free:
            return scores.log_softmax(-1)
        return likelihoods.calibrated(scores, self.without_row[template, front])


def grouped(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the numbers of prompts of the same row, template and input together: they score unlike words."""
    groups: dict[tuple[int, int, int, str], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.row, prompt.template, prompt.free, prompt.front.text), []).append(i)
    return list(groups.values())
