"""The base class of tasks whose model generates texts: decoding, and metrics of texts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.text import CHRFScore, Perplexity, SacreBLEUScore

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.prompting.languages import language_of
from lightning_peft.prompts.virtual_tokens import real_length
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.metrics import CrossEntropy, ExactMatch, Rouge, mean_cross_entropy

Generate = Literal["never", "test", "validation and test"]
_AT_ONCE = 512
"""How many tokens' logits metrics are given at once, or those of one row."""


class WritingTask(Task):
    """A task whose model writes texts.

    Logs ``train_loss``, ``val_loss``, ``val_perplexity``; where texts are generated, ``val_bleu`` (sacreBLEU with the
    tokens of the language: 13a, or zh, ja-mecab, ko-mecab), ``val_chrf``, ``val_rouge1``, ``val_rouge2``,
    ``val_rougeL``, ``val_exact_match``, all in [0, 1]; the same for the test.

    Args:
        generate: where texts are generated and scored, which takes far longer than the loss.
        max_new_tokens: where a text is cut [tokens].
        num_beams: beams of the search; 1: greedy.
        length_penalty: above 0 favours long texts, of several beams.
        language: by whose words texts are scored: a code of `lightning_peft.prompting.languages`, such as "zh", or the
            path of a YAML file.
        **kwargs: as in `Task`.
    """

    def __init__(
        self,
        model: str,
        generate: Generate = "validation and test",
        max_new_tokens: int = 64,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        language: str = "en",
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
        self.score_by({"loss": CrossEntropy(), "perplexity": Perplexity(ignore_index=IGNORED)})
        texts = {"bleu": _bleu(language_of(language).bleu), "chrf": CHRFScore(), "rouge": Rouge(language == "en")}
        texts["exact_match"] = ExactMatch()
        self.val_texts = MetricCollection(texts, prefix="val_", compute_groups=False)  # type: ignore[arg-type]
        self.test_texts = self.val_texts.clone(prefix="test_")
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
            ids = ids[:, real_length(inputs["input_ids"]) :]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def metrics(self, split: Split) -> Sequence[MetricCollection]:
        """Return the metrics of logits, and of texts where they are generated."""
        texts = self.val_texts if split == "val" else self.test_texts
        return [*super().metrics(split), *([texts] if split in self.generate_in else [])]

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the tokens that `predictions` guesses [B, T], -100 where there is none."""
        targets: Tensor = batch["labels"]
        return targets

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the cross-entropy, the mean over the tokens of the targets."""
        logits, tokens = self.predictions(batch)
        return mean_cross_entropy(logits.float(), tokens)

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        """Return how many tokens of targets a batch has."""
        return (self.targets(batch) != IGNORED).sum()

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add the logits of a batch to the metrics, and the texts that the model writes.

        Raises:
            TuningError: texts are to be written for rows that are packed.
        """
        logits, tokens = self.predictions(batch)
        scores, *texts = self.metrics(split)
        if texts and "references" not in batch:
            raise TuningError(
                "the model cannot write from packed rows, which hold several texts: set packing=false, or "
                "generate=test, since the test is not packed."
            )
        rows = max(1, _AT_ONCE // max(1, logits.shape[1]))  # what metrics copy is as wide as a vocabulary
        for some, right in zip(logits.split(rows), tokens.split(rows), strict=True):
            scores.update(some.float(), right)
        for written in texts:
            written.update(self.write(self.prompts(batch)), batch["references"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``text``, what the model writes for each row."""
        return {"text": self.write(self.inputs(batch))}


def _bleu(tokens: Any) -> SacreBLEUScore:
    try:
        return SacreBLEUScore(tokenize=tokens)
    except (ModuleNotFoundError, ValueError) as error:
        raise TuningError(
            f"BLEU cannot split texts by {tokens!r}: {error} Or give a language file with bleu: char."
        ) from None
