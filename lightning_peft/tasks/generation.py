"""Texts that a model writes: how they are generated, and how they are scored."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.text import CHRFScore, Perplexity, SacreBLEUScore

from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.base import Task
from lightning_peft.tasks.scores import IGNORED, CrossEntropy, ExactMatch, Rouge

Generate = Literal["never", "test", "validation and test"]


class WritingTask(Task):
    """A task whose model writes texts.

    Logs ``train_loss``, ``val_loss``, ``val_perplexity``; where texts are generated, ``val_bleu`` (sacreBLEU with the
    13a tokens), ``val_chrf``, ``val_rouge1``, ``val_rouge2``, ``val_rougeL``, ``val_exact_match``, all in [0, 1]; the
    same for the test.

    Args:
        generate: where texts are generated and scored, which takes far longer than the loss.
        max_new_tokens: where a text is cut [tokens].
        num_beams: beams of the search; 1: greedy.
        length_penalty: above 0 favours long texts, of several beams.
        **kwargs: as in `Task`.
    """

    def __init__(
        self,
        model: str,
        generate: Generate = "validation and test",
        max_new_tokens: int = 64,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if value < 1:
                raise TuningError(f"{name}={value} is out of range: take 1 or more.")
        self.generate_in = {"never": (), "test": ("test",), "validation and test": ("val", "test")}[generate]
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.length_penalty = length_penalty
        self.backbone = self.load()
        scores = {"loss": CrossEntropy(), "perplexity": Perplexity(ignore_index=IGNORED)}
        texts = {"bleu": SacreBLEUScore(), "chrf": CHRFScore(), "rouge": Rouge(), "exact_match": ExactMatch()}
        self.val_scores, self.val_texts = _collection(scores, "val_"), _collection(texts, "val_")
        self.test_scores, self.test_texts = _collection(scores, "test_"), _collection(texts, "test_")
        if "val" in self.generate_in:
            self.monitor = "val_bleu"

    def predictions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits [B, T, V] and the tokens that they guess [B, T], -100 where there is none."""
        raise NotImplementedError

    def prompts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what of a batch the model is fed to write from."""
        raise NotImplementedError

    def write(self, inputs: dict[str, Tensor]) -> list[str]:
        """Return the text that the model writes for each row."""
        beams = {"num_beams": self.num_beams, "length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        with torch.no_grad():
            ids: Tensor = self.backbone.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                **beams,
            )
        if not self.backbone.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the cross-entropy, the mean over the tokens of the targets."""
        logits, tokens = self.predictions(batch)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        return self._log_loss(loss, len(tokens))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch."""
        self._score("val", self.val_scores, self.val_texts, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log("val", self.val_scores, self.val_texts)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch."""
        self._score("test", self.test_scores, self.test_texts, batch)

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log("test", self.test_scores, self.test_texts)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``text``, what the model writes for each row."""
        return {"text": self.write(self.inputs(batch))}

    def _score(self, stage: str, scores: MetricCollection, texts: MetricCollection, batch: Mapping[str, Any]) -> None:
        logits, tokens = self.predictions(batch)
        scores.update(logits.float(), tokens)
        if stage in self.generate_in:
            references: Sequence[Sequence[str]] = batch["references"]
            texts.update(self.write(self.prompts(batch)), references)

    def _log(self, stage: str, scores: MetricCollection, texts: MetricCollection) -> None:
        self._log_scores(scores)
        if stage in self.generate_in:
            self._log_scores(texts)


def _collection(scores: Mapping[str, Any], prefix: str) -> MetricCollection:
    return MetricCollection(dict(scores), prefix=prefix, compute_groups=False).clone()
