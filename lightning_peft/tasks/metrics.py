"""Metrics as sums over the rows of all processes, where torchmetrics has none that is right with unlike many rows."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score, squad
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.prompting.languages import Language
from lightning_peft.tasks.words import answer_scores, words_of

_ROUGE = ("rouge1", "rouge2", "rougeL")


class _RowMean(Metric):
    """A mean over the rows of all processes.

    Args:
        shape: of what is summed.
        dtype: of what is summed.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    rows: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=dtype), "sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), "sum")

    def compute(self) -> Any:
        """Return the mean."""
        return self.total / self.rows


class CrossEntropy(_RowMean):
    """The mean cross-entropy over the rows of all processes, summed in fp32 whatever the precision of the Trainer.

    Lightning's own mean of a logged number is off where processes have unlike many rows: it rounds the mean of their
    counts down to an integer. Rows or tokens of label -100 do not count.
    """

    higher_is_better = False

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [..., classes] and classes [...]."""
        flat = target.flatten()
        self.total = self.total + F.cross_entropy(preds.float().flatten(0, -2), flat, reduction="sum")
        self.rows = self.rows + (flat != IGNORED).sum()


class SquaredError(_RowMean):
    """The mean squared error over the rows of all processes."""

    higher_is_better = False

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add numbers [B] and the right ones [B]."""
        self.total = self.total + F.mse_loss(preds.float(), target.float(), reduction="sum")
        self.rows = self.rows + len(target)


def mean_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [..., C] over the classes [...] that are not -100; 0 where all are."""
    total = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), reduction="sum")
    return total / (classes != IGNORED).sum().clamp(min=1)


class TaskScores(Metric):
    """Cross-entropy and accuracy of each of several tasks, and of all rows; a task without rows has no score.

    Args:
        names: of the tasks, by number.
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("sums", torch.zeros(len(self.names), 3), "sum")

    def update(self, preds: Tensor, target: Tensor, tasks: Tensor) -> None:
        """Add logits [B, classes], classes [B] and the numbers of the tasks [B]."""
        losses = F.cross_entropy(preds.float(), target, reduction="none")
        columns = torch.stack([losses, (preds.argmax(1) == target).float(), torch.ones_like(losses)], 1)
        self.sums = self.sums.index_add(0, tasks, columns.to(self.sums.dtype))

    def compute(self) -> dict[str, Tensor]:
        """Return the loss over all rows, the mean accuracy of the tasks, and both of each task."""
        scores: dict[str, Tensor] = {}
        accuracies = []
        for name, (loss, right, rows) in zip(self.names, self.sums.float(), strict=True):
            if rows:
                scores |= {f"loss_{name}": loss / rows, f"accuracy_{name}": right / rows}
                accuracies.append(right / rows)
        loss, _, rows = self.sums.float().sum(0)
        return {"loss": loss / rows, "accuracy": torch.stack(accuracies).mean(), **scores}


class SpanF1(Metric):
    """Precision, recall and F1 of whole spans in BIO tags: right is a span whose ends and type are both right (CoNLL).

    The spans of a row are read by nervaluate. ``B-`` begins a span, ``I-`` goes on with one of its type, or begins one.

    Args:
        labels: names of the tags, by number.

    Raises:
        TuningError: nervaluate is not installed.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        if importlib.util.find_spec("nervaluate") is None:
            raise TuningError("nervaluate, which reads spans, is not installed: pip install 'lightning-peft[text]'.")
        self.labels = list(labels)
        self.add_state("counts", torch.zeros(3, dtype=torch.long), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [B, T, tags] and tags [B, T]; where the tag is -100 there is no word."""
        guesses = preds.argmax(-1)
        counts = [0, 0, 0]
        for row, truth in zip(guesses, target, strict=True):
            kept = truth != IGNORED
            found, true = self.spans(row[kept].tolist()), self.spans(truth[kept].tolist())
            for i, spans in enumerate((found & true, found, true)):
                counts[i] += len(spans)
        self.counts = self.counts + torch.tensor(counts, device=self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the three scores; a score of no spans is 0."""
        right, found, true = self.counts.float()
        nothing = torch.zeros_like(right)
        return {
            "precision": right / found if found else nothing,
            "recall": right / true if true else nothing,
            "f1": 2 * right / (found + true) if found + true else nothing,
        }

    def spans(self, tags: Sequence[int]) -> set[tuple[str, int, int]]:
        """Return type, first and last word of each span in a row of tags."""
        from nervaluate import collect_named_entities

        entities = collect_named_entities([self.labels[tag] for tag in tags])
        return {(entity["label"], entity["start"], entity["end"]) for entity in entities}


class Rouge(_RowMean):
    """F-measures ROUGE-1, ROUGE-2 and ROUGE-L of texts, the best over the references of each, averaged.

    The texts are scored by torchmetrics. Its own ``ROUGEScore`` keeps a list entry a text, and processes with unlike
    many texts then wait for each other forever.

    Args:
        english: whether words are what they are in the paper's code, the letters a to z and digits; else those of any
            script, and single characters where there are no blanks between words.
    """

    def __init__(self, english: bool = True) -> None:
        super().__init__(len(_ROUGE))
        self.split: dict[str, Any] = {} if english else {"normalizer": str.lower, "tokenizer": words_of}

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Add texts and the references of each."""
        scores = rouge_score(
            list(preds), [list(texts) for texts in target], rouge_keys=_ROUGE, accumulate="best", **self.split
        )
        means = torch.stack([torch.as_tensor(scores[f"{key}_fmeasure"]) for key in _ROUGE])
        self.total = self.total + means.to(self.total) * len(preds)
        self.rows = self.rows + len(preds)

    def compute(self) -> dict[str, Tensor]:
        """Return the means."""
        return dict(zip(_ROUGE, super().compute(), strict=True))


class Accuracy(_RowMean):
    """The share of rows whose likeliest class is right, however many classes there are."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.long)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [B, C] and classes [B]."""
        self.total = self.total + (preds.argmax(1) == target).sum()
        self.rows = self.rows + len(target)


class ExactMatch(_RowMean):
    """The share of texts that equal one of their references, but for white space at the ends."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.long)

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Add texts and the references of each."""
        equal = [text.strip() in {t.strip() for t in texts} for text, texts in zip(preds, target, strict=True)]
        self.total = self.total + sum(equal)
        self.rows = self.rows + len(equal)


class Answers(Metric):
    """Exact match and F1 of answers, as of SQuAD, in [0, 1]; of several windows of a context the surest one answers.

    A pair of English answers is compared by torchmetrics. Windows of one question may lie in unlike batches and
    processes.

    Args:
        language: by whose words answers are compared; None: English, as SQuAD does.
    """

    full_state_update = False
    higher_is_better = True
    found: list[Tensor]

    def __init__(self, language: Language | None = None) -> None:
        super().__init__()
        self.language = language
        self.add_state("found", [], "cat")

    def update(
        self, questions: Sequence[int], sure: Sequence[float], texts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> None:
        """Add the best answer of each window, how sure it is, and the right answers; none: the right one is empty."""
        for question, how_sure, text, right in zip(questions, sure, texts, answers, strict=True):
            row = [float(question), how_sure, *self._compared(text, list(right) or [""])]
            self.found.append(torch.tensor([row], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return the means over the questions.

        Raises:
            TuningError: there were none.
        """
        if not len(self.found):
            raise TuningError("there are no answers to score: give the split at least one question.")
        found = dim_zero_cat(self.found)
        order = found[:, 1].argsort(descending=True, stable=True)
        found = found[order[found[order, 0].argsort(stable=True)]]
        first = torch.ones(len(found), dtype=torch.bool, device=found.device)
        first[1:] = found[1:, 0] != found[:-1, 0]
        exact, f1 = found[first, 2:].mean(0).float()
        return {"exact_match": exact, "f1": f1}

    def _compared(self, text: str, right: list[str]) -> tuple[float, float]:
        if self.language is not None:
            return answer_scores(text, right, self.language)
        truth: Any = {"id": "0", "answers": {"text": right, "answer_start": [0]}}
        scores = squad({"id": "0", "prediction_text": text}, truth)
        return scores["exact_match"].item() / 100, scores["f1"].item() / 100
