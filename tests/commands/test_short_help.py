"""``fit --help`` is one screen with the arguments of the classes at hand, which suggestions come from, too."""

import pytest

from lightning_peft import BitFit
from lightning_peft.cli import main
from lightning_peft.commands.known_names import names_at_hand, with_place
from lightning_peft.commands.parameters import arguments_of
from lightning_peft.commands.short_help import classes_named, is_asked
from lightning_peft.commands.wording import ALIASES, one_sentence, unknown_word
from lightning_peft.methods import every_method

UNKNOWN = "Option '{}' is not accepted"


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["lightning-peft", *words])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "check", "search"])
def test_one_screen(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It fits 60 lines of 80 columns with the classes of a configuration, and each method is named."""
    text = printed(monkeypatch, capsys, command, "--config", "quickstart", "--help")
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert all(name in text for name in every_method())
    assert "r=8, alpha=16.0" in text
    assert "head_lr=null" in text  # which the task hands on to its parent
    assert f"lightning-peft {command} --help all" in text


def test_the_classes_of_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "quickstart", "--method=BitFit", "--data", "TextClassificationData"]
    assert classes_named(words) == {"model": "TextClassification", "data": "TextClassificationData", "method": "BitFit"}
    text = printed(monkeypatch, capsys, "fit", *words, "-h")
    assert "the method BitFit, each as --method.NAME VALUE" in text
    assert "name a task, by --config or --model" in printed(monkeypatch, capsys, "fit", "--help")


def test_all_is_the_parsers() -> None:
    assert is_asked(["--config", "x", "--help"])
    assert not is_asked(["--help", "all"])
    assert not is_asked(["--model.help", "x"])


@pytest.mark.parametrize(
    ("option", "word", "meant"),
    [
        ("--method.rank", "rank", "r"),
        ("--model.learning_rate=1", "learning_rate", "lr"),
        ("--method.init_args.lora_alpha", "lora_alpha", "alpha"),
        ("--data.batchsize", "batchsize", "batch_size"),
        ("--trainer.epochs", "trainer.epochs", "trainer.max_epochs"),
    ],
)
def test_what_others_call_it(option: str, word: str, meant: str) -> None:
    """The suggestion is an argument of the class that the option names."""
    words = ["--config", "quickstart", option, "4"]
    said = one_sentence(UNKNOWN.format(word), names_at_hand(word, words))
    assert said == f"the argument {word!r} is not accepted. Did you mean {meant!r}?"


def test_an_argument_without_its_place_is_said_with_it() -> None:
    words = [
        "--config",
        "quickstart",
        "--config",
        "files",
        "--method",
        "LoRA",
        "--lr",
        "1e-3",
        "--learning_rate=1",
        "--rank",
    ]
    assert with_place("lr", words) == with_place("learning_rate", words) == "model.lr"
    assert with_place("rank", words) == "method.r"
    assert with_place("batch_size", [*words, "--batch_size", "4"]) == "data.batch_size"
    assert with_place("batch_size", words) == with_place("nothing", [*words, "--nothing"]) == ""


def test_no_class_at_hand_has_it() -> None:
    assert one_sentence(UNKNOWN.format("rank"), list(arguments_of(BitFit))).endswith("--help shows those that are.")
    assert unknown_word("something else") == ""
    assert {"rank", "learning_rate"} <= ALIASES.keys()
