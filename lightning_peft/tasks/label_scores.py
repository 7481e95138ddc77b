"""How likely a language model finds the labels of a verbalizer in prompts: run, combined, calibrated."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.prompting.encoding import Style, mask_id, sentinel_id
from lightning_peft.prompting.template import Mask, Template
from lightning_peft.prompting.verbalizer import Verbalizer
from lightning_peft.tasks import scoring
from lightning_peft.tasks.class_prompts import NULL, Key, Prompt

Normalise = Literal["sum", "mean", "pmi"]


class LabelScores:
    """Scores the labels in the prompts of a batch; what depends on the template alone is kept until `forget`.

    Args:
        tokenizer: of the model.
        lm: what sort of language model it is.
        templates: those that the prompts are made of.
        verbalizer: the words of the labels.
        normalise: what makes the score of a word of those of its tokens.
        calibrate: whether labels are divided by what content-free inputs give.
        decoding: how a masked model fills several masks.
        share_prefix: compute the keys and values of demonstrations once.
        at_once: how many prompts the model is fed together.
    """

    def __init__(
        self,
        tokenizer: Any,
        lm: Style,
        templates: Sequence[Template],
        verbalizer: Verbalizer,
        normalise: Normalise,
        calibrate: bool,
        decoding: scoring.Decoding,
        share_prefix: bool,
        at_once: int,
    ) -> None:
        self.tokenizer, self.lm, self.templates, self.verbalizer = tokenizer, lm, templates, verbalizer
        self.normalise, self.calibrate, self.decoding = normalise, calibrate, decoding
        self.share_prefix, self.at_once = share_prefix, at_once
        self.forget()

    def forget(self) -> None:
        """Forget what was computed of prompts without content, and of prefixes: it depends on the weights."""
        self.without_row: dict[Key, Tensor] = {}
        """Log p of the words after PMI's empty input, and of the labels after the inputs that calibrate."""
        self._shared: dict[tuple[int, ...], scoring.Shared | None] = {}

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
            self.without_row[key] = scoring.content_free_prior(labels)
        scores = [self._calibrated(*found[key], key[1]) for key in sorted(found)]
        return torch.stack(scores).unflatten(0, (-1, len(self.templates)))

    def _words(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return log p of the words of each prompt, summed or averaged over their tokens."""
        prompts: list[Prompt] = batch["prompts"]
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        alike: dict[Any, list[int]] = {}
        for i, prompt in enumerate(prompts):
            same = tuple(map(tuple, prompt.words)) if self.lm == "masked" else ()
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
        if self.lm == "masked":
            inputs = {"input_ids": ids, "attention_mask": mask}
            return scoring.masked_scores(model, inputs, mask_id(self.tokenizer), words[0], self.decoding)
        if self.lm == "seq2seq":
            template = self.templates[first.template]
            gap = template.slot is not None and isinstance(template.parts[template.slot], Mask)
            opening = [sentinel_id(self.tokenizer)] if gap else []
            return scoring.seq2seq_scores(model, ids, mask, words, opening)
        shared = self._read(model, first.shared) if first.shared and self.share_prefix else None
        if self.share_prefix and (shared is not None or not first.shared):
            return scoring.causal_scores(model, ids, mask, words, shared)
        return scoring.recomputed_scores(model, ids, mask, words, first.shared)

    def _read(self, model: nn.Module, front: tuple[int, ...]) -> scoring.Shared | None:
        """Return the keys and values of demonstrations; those of the last few are kept."""
        if front not in self._shared:
            while len(self._shared) > len(self.templates):
                self._shared.pop(next(iter(self._shared)))
            self._shared[front] = scoring.read(model, front)
        return self._shared[front]

    def _labels(self, words: Tensor, template: int) -> Tensor:
        if self.normalise == "pmi":
            words = words - self.without_row[template, None]
        return scoring.combined(words, self.verbalizer.owners, self.verbalizer.combine)

    def _calibrated(self, words: Tensor, front: str, template: int) -> Tensor:
        scores = self._labels(words, template)
        return (
            scoring.calibrated(scores, self.without_row[template, front]) if self.calibrate else scores.log_softmax(-1)
        )


def grouped(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the numbers of prompts of the same row, template and input together: they score unlike words."""
    groups: dict[tuple[int, int, int, str], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.row, prompt.template, prompt.free, prompt.front.text), []).append(i)
    return list(groups.values())
