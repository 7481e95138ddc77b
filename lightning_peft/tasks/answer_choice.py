"""Choices among answers that a language model could write: T-Few's losses, and scores that do not favour short answers.

Of the answers n of a question, with T_n tokens each (the end of the text is one) and right answer r:

    L_LM = -1/T_r sum_t log p(r_t)                                     what the model is to write
    L_LN = -log softmax_n(1/T_n sum_t log p(n_t))[r]                   as a choice, normalised by length
    L_UL = -sum_{n != r} sum_t log(1 - p(n_t)) / sum_{n != r} T_n      what it is not to write

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
(2205.05638), section 3.2. As in their code (r-three/t-few), means of tokens are over all of a batch, and 0.01 is added
to 1 - p, so that a wrong token of p = 1 has a finite gradient. Theirs counts log(1.01) for each padded and right token,
too, which is a constant without a gradient and is left out here. They draw one of several templates for each row, train
by Adafactor, and start IA3 from 100,000 steps on other tasks; none of this belongs to the losses. They run the encoder
once for all answers; here each answer is a row with its question, as every method expects it.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_config
from lightning_peft.core.labels import IGNORED
from lightning_peft.data.answer_choice import AnswerChoiceData
from lightning_peft.tasks.option_scores import OptionScores
from lightning_peft.tasks.seq2seq import decoded

_ADDED = 0.01
"""To 1 - p."""


class AnswerChoice(OptionScores):
    """Choose one of the answers of each question by what a language model would write (T-Few).

    The score of an answer is the sum of its tokens' log-likelihoods over the number of its tokens to the power of
    ``length_norm``. Training minimises ``L_LM + choice_loss L_LN + unlikelihood L_UL``. Logs ``train_loss``,
    ``val_loss``, which is L_LN, ``val_accuracy``, and the same for the test.

    Args:
        model: folder or hub id of an encoder-decoder or causal language model, or ``package://NAME/FOLDER`` in an
            installed package.
        choice_loss: weight of the cross-entropy over the scores of the answers.
        unlikelihood: weight of the unlikelihood of the wrong answers.
        length_norm: power of the length; 0: scores are sums, which favour short answers.
        **kwargs: as in `Task`.
    """

    not_inputs = OptionScores.not_inputs | {"right"}
    right = "right"

    def __init__(
        self,
        model: str,
        choice_loss: float = 1.0,
        unlikelihood: float = 1.0,
        length_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        for name, value in (
            ("choice_loss", choice_loss), ("unlikelihood", unlikelihood), ("length_norm", length_norm)
        ):  # fmt: skip
            if value < 0:
                raise TuningError(f"{name}={value} is out of range: take 0 or more.")
        self.choice_loss, self.unlikelihood, self.length_norm = choice_loss, unlikelihood, length_norm
        writes = load_config(self.model_name, "language model").is_encoder_decoder
        self.style = "seq2seq" if writes else "causal"
        self.auto = AutoModelForSeq2SeqLM if writes else AutoModelForCausalLM
        self.what = f"{'encoder-decoder' if writes else 'causal'} language model"
        self.backbone = self.load()
        self.score_options()

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have answers for this sort of model.

        Raises:
            TuningError: they have none, or are for the other sort.
        """
        if data is None:
            return
        if not isinstance(data, AnswerChoiceData):
            raise TuningError(f"{type(data).__name__} has no answers to choose from: use AnswerChoiceData.")
        if data.style != self.style:
            raise TuningError(
                f"the data are for a {data.style} language model, this one is {self.style}: set style={self.style!r}."
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of the answers in fp32, [B, options], -inf where a question has fewer."""
        return self._scores(*self._likelihoods(batch), batch)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return ``L_LM + choice_loss L_LN + unlikelihood L_UL``."""
        likely, counts = self._likelihoods(batch)
        right = (batch["option"] == batch["right"][batch["row"]]).unsqueeze(1)
        said = counts & right
        total = -likely[said].sum() / said.sum()
        if self.choice_loss:
            total = total + self.choice_loss * F.cross_entropy(self._scores(likely, counts, batch), batch["right"])
        if self.unlikelihood:
            wrong = likely[counts & ~right]
            total = total - self.unlikelihood * (1 + _ADDED - wrong.exp()).log().mean()
        return total

    def _likelihoods(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log p of the tokens of the answers in fp32 [N, L], and which places have one."""
        batch = self.prepared(batch)
        if self.style == "seq2seq":
            logits, tokens = decoded(self, batch), batch["labels"]
        else:
            logits = self.backbone(**self.inputs(batch), use_cache=False).logits[:, :-1]
            tokens = batch["labels"][:, 1:]
        counts = tokens != IGNORED
        cost = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
        return -cost.unflatten(0, tokens.shape), counts

    def _scores(self, likely: Tensor, counts: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return self.by_question(likely.sum(1) / counts.sum(1) ** self.length_norm, batch)
