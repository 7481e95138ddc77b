"""Cloze classification: classes as words that a language model puts into a gap, without a head."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from lightning_peft.core.errors import TuningError
from lightning_peft.data.protocols import MaskedGaps, StyledGaps
from lightning_peft.prompting.encoding import verbalizer_ids
from lightning_peft.prompting.verbalizer import Combine, Verbalizer
from lightning_peft.tasks.base import Task
from lightning_peft.tasks.class_scores import ClassScores
from lightning_peft.tasks.likelihoods import combined, masked_scores

LMStyle = Literal["masked", "causal"]
ClozeLoss = Literal["cross_entropy", "hinge"]


class GapTask(Task):
    """A task whose rows have a gap that the model fills: the masks of a masked model, the end of a causal one's prompt.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        lm: 'masked' or 'causal'; None: masked if the tokenizer has a mask.
        lead: the blank in front of the answer in the template, or nothing.
        **kwargs: as in `Task`.
    """

    def __init__(self, model: str, lm: LMStyle | None = None, lead: str = " ", **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if lm is None:
            lm = "causal" if self.tokenizer.mask_token_id is None else "masked"
        self.style = lm
        self.lead = lead
        self.auto = AutoModelForMaskedLM if lm == "masked" else AutoModelForCausalLM
        self.what = f"{lm} language model"
        self.backbone = self.load()

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have gaps for this model.

        Raises:
            TuningError: they are for the other style.
        """
        if isinstance(data, StyledGaps) and data.style != self.style:
            raise TuningError(
                f"the data are for a {data.style} language model, this one is {self.style}: give both a style."
            )

    def gap_logits(self, batch: Mapping[str, Tensor], masks: int) -> Tensor:
        """Return the logits in the gap in fp32, [B, masks, V]; a causal model's are those of the next token, [B, 1, V].

        Raises:
            TuningError: a row has another number of masks.
        """
        logits: Tensor = self.backbone(**self.inputs(batch)).logits
        if self.style == "causal":
            return logits.gather(1, _last(batch).view(-1, 1, 1).expand(-1, 1, logits.shape[2])).float()
        where = self._masks(batch, masks)
        return logits[where].unflatten(0, (len(logits), masks)).float()

    def _masks(self, batch: Mapping[str, Tensor], masks: int) -> Tensor:
        where = batch["input_ids"].eq(self.tokenizer.mask_token_id)
        counts = where.sum(1)
        if bool((counts != masks).any()):
            raise TuningError(f"a row has {int(counts[counts != masks][0])} masks, the words have {masks} tokens.")
        return where


class ClozeClassification(GapTask, ClassScores):
    """Classify by the words that a language model says in a template (PET without its ensemble).

    The score of a word is the sum of its tokens' log-likelihoods in the gap, that of a label is made of its words'
    scores, and training minimises a ``loss`` of the labels' scores. Nothing is added to the model. A word of
    several tokens has as many masks in the gap: in training, where the longest word says how many there are, all are
    guessed in one pass; in scoring the gap is as long as the word, and ``fill`` says in which order it is filled.
    PET's further loss, of words that are masked in unlabelled texts (weight 0.0001), is not here.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``val_f1`` and the same for the test.

    Source: Schick and Schütze 2020, arXiv 2001.07676, section 3; words of several tokens: arXiv 2009.07118, section 3.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        words: label -> its word or words (the ``verbalizer`` of the data).
        labels: the labels in the order of their numbers; None: in that of ``words``.
        combine: how the scores of words make that of their label: 'mean', 'max', or the 'sum' of likelihoods.
        fill: of a masked model: 'parallel' scores all tokens of a word in one pass, 'confident' puts in the token that
            is surest, and looks again.
        **kwargs: as in `GapTask` and `Task`.
    """

    def __init__(
        self,
        model: str,
        words: dict[str, list[str]],
        labels: list[str] | None = None,
        combine: Combine = "mean",
        fill: Literal["parallel", "confident"] = "confident",
        loss: ClozeLoss = "cross_entropy",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if loss not in get_args(ClozeLoss):
            raise TuningError(f"loss={loss!r} is no loss of a cloze: take {' or '.join(get_args(ClozeLoss))}.")
        self.hinged = loss == "hinge"
        self.verbalizer = Verbalizer(words, combine).ordered(labels or words)
        self.fill = fill
        self.tokens_of = verbalizer_ids(self.verbalizer, self.tokenizer, self.lead, multi_token=True)
        self.masks = max(map(len, self.tokens_of))
        self.score_classes(self.verbalizer.labels)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have the labels and gaps for these words.

        Raises:
            TuningError: they have others.
        """
        GapTask.check_data(self, data, stage)
        ClassScores.check_data(self, data, stage)
        if isinstance(data, MaskedGaps) and data.masks != self.masks:
            raise TuningError(
                f"the gap of the data has {data.masks} tokens, the longest word {self.masks}: use one verbalizer."
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of the labels in fp32, [B, labels]."""
        return combined(self.word_scores(self.prepared(batch)), self.verbalizer.owners, self.verbalizer.combine)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy, or the hinge, of the labels' scores."""
        return hinge(self(batch), batch["labels"]) if self.hinged else super().loss(batch)

    def counted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return how many gaps a batch has, one a row."""
        return batch["labels"].new_tensor(len(batch["labels"]))

    def word_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-likelihood of each word in the gap, [B, words]."""
        if self.style == "causal":
            return self._continuations(batch)
        if self.training or self.masks == 1:
            return _likelihoods(self.gap_logits(batch, self.masks), self.tokens_of)
        scores: list[Tensor] = [torch.empty(0)] * len(self.tokens_of)
        for length in sorted(set(map(len, self.tokens_of))):
            numbers = [i for i, word in enumerate(self.tokens_of) if len(word) == length]
            short = self._shorter(batch, length)
            words = [self.tokens_of[i] for i in numbers]
            found = masked_scores(self.backbone, short, self.tokenizer.mask_token_id, words, self.fill).unbind(1)
            for i, score in zip(numbers, found, strict=True):
                scores[i] = score
        return torch.stack(scores, 1)

    def _shorter(self, batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        """Return the batch with ``length`` masks in each gap."""
        where = self._masks(batch, self.masks)
        keep = ~(where & (where.cumsum(1) > length))
        shape = batch["input_ids"].shape
        return {
            name: value[keep].unflatten(0, (shape[0], -1)) if value.shape[:2] == shape else value
            for name, value in self.inputs(batch).items()
        }

    def _continuations(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-likelihood of each word after the prompt; words of one token share a pass, [B, words]."""
        first = self.gap_logits(batch, 1)[:, 0].log_softmax(1)
        if self.masks == 1:
            return first[:, [word[0] for word in self.tokens_of]]
        return torch.stack(
            [first[:, w[0]] if len(w) == 1 else first[:, w[0]] + self._rest(batch, w) for w in self.tokens_of], 1
        )

    def _rest(self, batch: Mapping[str, Tensor], word: Sequence[int]) -> Tensor:
        """Return the log-likelihood of a word's second and further tokens after its prompt, [B]."""
        inputs, count = self.inputs(batch), len(word) - 1
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        end = _last(batch).unsqueeze(1) + 1 + torch.arange(count, device=ids.device)
        wide = F.pad(ids, (0, count), value=self.tokenizer.pad_token_id or 0)
        wide = wide.scatter(1, end, torch.tensor(word[:-1], device=ids.device).expand(len(ids), -1))
        inputs |= {"input_ids": wide, "attention_mask": F.pad(mask, (0, count)).scatter(1, end, 1)}
        if "position_ids" in inputs:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits: Tensor = self.backbone(**inputs).logits
        own = logits.gather(1, end.unsqueeze(2).expand(-1, -1, logits.shape[2])).float().log_softmax(2)
        return own.gather(2, torch.tensor(word[1:], device=ids.device).view(1, -1, 1).expand(len(ids), -1, 1)).sum(
            (1, 2)
        )


def hinge(scores: Tensor, labels: Tensor) -> Tensor:
    """Return ``sum over y' != y of max(0, 1 - s(y) + s(y'))`` of scores [B, C] and labels y [B], the mean over rows."""
    right = scores.gather(1, labels.unsqueeze(1))
    return (1 - right + scores).clamp(min=0).scatter(1, labels.unsqueeze(1), 0).sum(1).mean()


def _last(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the column of the last token of each prompt, [B]."""
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return (mask.cumsum(1) * (mask > 0)).argmax(1)


def _likelihoods(gap: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-likelihood of words from the logits [B, masks, V] of all places of the gap, [B, words]."""
    gap = gap.log_softmax(2)
    return torch.stack([gap[:, torch.arange(len(w)), list(w)].sum(1) for w in words], 1)
