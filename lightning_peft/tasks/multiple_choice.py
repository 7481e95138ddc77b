"""Multiple choice with any ``AutoModelForMultipleChoice``: a head gives each option one score."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from transformers import AutoModelForMultipleChoice

from lightning_peft.core.errors import TuningError
from lightning_peft.data.multiple_choice import MultipleChoiceData
from lightning_peft.tasks.option_scores import OptionScores


class MultipleChoice(OptionScores):
    """Choose one of the options of each question (COPA, SWAG, RACE).

    The options are the rows of a batch, so every method sees texts of [N, T] as in other tasks. Questions of a batch
    may have unlike many options. Logs ``train_loss``, ``val_loss``, ``val_accuracy``, and the same for the test.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForMultipleChoice
    what = "model for multiple choice"

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load()
        self.score_options()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of the options in fp32, [B, options], -inf where a question has fewer."""
        inputs = {name: value.unsqueeze(1) for name, value in self.inputs(batch).items()}
        return self.by_question(self.backbone(**inputs).logits.flatten().float(), batch)

    def check_data(self, data: L.LightningDataModule | None, stage: str) -> None:
        """See that the data have options.

        Raises:
            TuningError: they have none.
        """
        if data is not None and not isinstance(data, MultipleChoiceData):
            raise TuningError(f"{type(data).__name__} has no options to choose from: use MultipleChoiceData.")
