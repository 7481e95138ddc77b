"""A shell completes words, and mistakes that are made while one begins are said with what was meant."""

import subprocess
from pathlib import Path

import pytest
from datasets import Dataset
from lightning_utilities.core.imports import RequirementCache

from lightning_peft import TuningError
from lightning_peft.cli import _COMMANDS
from lightning_peft.commands import lightning_words
from lightning_peft.commands.completing import completion
from lightning_peft.commands.wording import one_sentence
from lightning_peft.data.classes import check_columns


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["comp"], {"compare", "completion"}),
        (["fit", "--method", "LoR"], {"LoRA", "LoReFT"}),
        (["fit", "--config", "quick"], {"quickstart"}),
        (["fit", "--model", "TextC"], {"TextClassification"}),
        (["fit", "--data", "ChatD"], {"ChatData"}),
        (["fit", "--trainer.max_e"], {"--trainer.max_epochs"}),
        (["fit", "rows"], set()),
        (["fit", "--config", "=", "quick"], {"quickstart"}),
        (["compare", "--methods", "BitFit", "LoR"], {"LoRA", "LoReFT"}),
        (["configs", "show", "lor"], {"lora", "loreft"}),
    ],
)
def test_a_shell_completes_words(words: list[str], found: set[str]) -> None:
    script = completion("bash", _COMMANDS)
    asked = f"COMP_WORDS=(lightning-peft {' '.join(words)}); COMP_CWORD={len(words)}; _lightning_peft; "
    command = ["bash", "-uc", script + asked + 'echo "${COMPREPLY[@]:-}"']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(printed.split()) == found


def test_there_are_lines_for_two_shells() -> None:
    assert completion("zsh", _COMMANDS).endswith(completion("bash", _COMMANDS))
    with pytest.raises(TuningError, match=r"completion fish: there are lines for bash and for zsh\.$"):
        completion("fish", _COMMANDS)


def test_a_missing_package_is_named() -> None:
    cause = ModuleNotFoundError(str(RequirementCache("surely-not-there>=1.0")))
    assert "needs the package surely-not-there, which is not installed: pip install surely-not-there" in str(
        lightning_words.said(cause)
    )
    cause = ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing either.")
    assert "TensorBoardLogger needs the package tensorboard" in str(lightning_words.said(cause))
    logger = Path(pytest.importorskip("lightning.fabric.loggers.tensorboard").__file__).read_text()
    assert "Neither `tensorboard` nor `tensorboardX` is available" in logger


def test_rows_of_conversations_are_known_by_their_column() -> None:
    said = one_sentence("unrecognized arguments: --data.messages", ["text", "label"])
    assert said == "the argument 'data.messages' is not accepted: rows with messages are those of --data ChatData."
    rows = Dataset.from_list([{"messages": "x"}])
    with pytest.raises(TuningError, match=r"'label'; it has e\.g\. messages: such rows are those of ChatData\.$"):
        check_columns(rows, "train", ["label"])
