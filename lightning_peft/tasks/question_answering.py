"""Extractive question answering with any ``AutoModelForQuestionAnswering``."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from lightning_peft.core.errors import TuningError
from lightning_peft.data.protocols import Windows
from lightning_peft.prompting.languages import language_of
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.metrics import Answers, CrossEntropy


class QuestionAnswering(Task):
    """Find the answer to a question in a context (SQuAD, with or without questions that it does not answer).

    Logs ``train_loss``, ``val_loss`` (of the first and last token, mean), ``val_exact_match`` and ``val_f1`` in [0, 1],
    and the same for the test. Of all windows of a context the surest one answers. Positions are columns of the text:
    virtual tokens that a method adds do not count.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        longest: the most tokens of an answer.
        language: by whose words answers are compared: a code of `lightning_peft.prompting.languages`, such as "zh", or
            the path of a YAML file.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForQuestionAnswering
    what = "extractive question answerer"
    not_inputs = Task.not_inputs | {"start_positions", "end_positions", "question"}
    monitor = "val_f1"

    def __init__(self, model: str, longest: int = 30, language: str = "en", **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if longest < 1:
            raise TuningError(f"longest={longest} leaves no answer: take 1 token or more.")
        self.longest = longest
        self.backbone = self.load()
        self.score_by({"loss": CrossEntropy(), "answers": Answers(None if language == "en" else language_of(language))})

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the logits of the first and of the last token of the answer, in fp32, [B, N] each."""
        batch = self.prepared(batch)
        out = self.backbone(**self.inputs(batch))
        first, last = (self.text_columns(logits, batch).float() for logits in (out.start_logits, out.end_logits))
        mask = batch.get("attention_mask")
        if mask is None:
            return first, last
        hidden = self.text_columns(mask, batch) == 0
        lowest = torch.finfo(torch.float32).min
        return first.masked_fill(hidden, lowest), last.masked_fill(hidden, lowest)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data tell which tokens are of the context.

        Raises:
            TuningError: they do not.
        """
        if data is not None and not isinstance(data, Windows):
            raise TuningError(f"{type(data).__name__} has no windows of contexts: use QuestionAnsweringData.")

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the cross-entropy, the mean of that of the first and that of the last token."""
        (first, last), (start, end) = self(batch), self._places(batch)
        return (F.cross_entropy(first, start) + F.cross_entropy(last, end)) / 2

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add the windows of a batch to the metrics."""
        (first, last), (start, end) = self(batch), self._places(batch)
        (scores,) = self.metrics(split)
        scores["loss"].update(first, start)
        scores["loss"].update(last, end)
        texts, sure = self._answers(first, last, batch)
        scores["answers"].update(batch["question"].tolist(), sure, texts, batch["answers"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``question`` (its number), ``answer`` and ``score`` of each window: the highest score counts."""
        first, last = self(batch)
        texts, scores = self._answers(first, last, batch)
        return {"question": batch["question"].tolist(), "answer": texts, "score": scores}

    def _places(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the columns of the text where the answers begin and end, [B] each."""
        virtual = (batch["input_ids"] < 0).cumsum(1)
        start, end = batch["start_positions"], batch["end_positions"]
        before = virtual.gather(1, torch.stack([start, end], 1))
        return start - before[:, 0], end - before[:, 1]

    def _answers(self, first: Tensor, last: Tensor, batch: Mapping[str, Any]) -> tuple[list[str], list[float]]:
        """Return the text of the best span of each window, and its score less that of no answer."""
        is_context = torch.zeros_like(first, dtype=torch.bool)
        for row, offsets in zip(is_context, batch["offsets"], strict=True):
            row[: len(offsets)] = torch.tensor([bool(span) for span in offsets], device=first.device)
        width = first.shape[1]
        spans = first.unsqueeze(2) + last.unsqueeze(1)
        legal = torch.ones(width, width, dtype=torch.bool, device=first.device).triu().tril(self.longest - 1)
        legal = legal & is_context.unsqueeze(2) & is_context.unsqueeze(1)
        best, places = spans.masked_fill(~legal, -torch.inf).flatten(1).max(1)
        # No answer is the span of [CLS], which is the first token that is no padding and not of the context.
        nowhere = (~is_context & (first > torch.finfo(torch.float32).min)).int().argmax(1, keepdim=True)
        none = (first.gather(1, nowhere) + last.gather(1, nowhere)).squeeze(1)
        texts = [
            _text(context, offsets, place // width, place % width) if better else ""
            for context, offsets, place, better in zip(
                batch["context"], batch["offsets"], places.tolist(), (best > none).tolist(), strict=True
            )
        ]
        return texts, (best - none).clamp(min=torch.finfo(torch.float32).min).tolist()


def _text(context: str, offsets: Sequence[Sequence[int]], first: int, last: int) -> str:
    return context[offsets[first][0] : offsets[last][1]]
