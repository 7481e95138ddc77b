"""``--config``: short names, data that begin clean, and the command that lists and copies what is shipped."""

from pathlib import Path

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_peft
from lightning_peft.commands import tools
from lightning_peft.commands.config_files import ConfigFile
from lightning_peft.core import shipped
from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.instruction_files import read_instructions

TASKS = sorted((shipped.folder() / "tasks").glob("*.yaml"))
DATA = sorted((shipped.folder() / "data").glob("*.yaml"))
PAIRS = [
    (task, data)
    for task in TASKS
    for data in DATA
    if "data" in (named := yaml.safe_load(task.read_text()))
    and named["data"]["class_path"] == yaml.safe_load(data.read_text())["data"]["class_path"]
]


@pytest.fixture
def parser() -> ArgumentParser:
    assert lightning_peft.CausalLMData  # known by its short name from here on
    for name in dir(lightning_peft):
        getattr(lightning_peft, name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ConfigFile)
    parser.add_subclass_arguments(L.LightningDataModule, "data", skip={"tokenizer", "processor"})
    for name in ("model", "trainer", "method", "optimizer"):
        parser.add_argument(f"--{name}", type=dict | str)
    return parser


def test_there_are_such_pairs() -> None:
    assert len(PAIRS) >= 8


@pytest.mark.parametrize(("task", "data"), PAIRS, ids=lambda path: path.stem)
def test_data_of_a_later_file_begin_clean(task: Path, data: Path, parser: ArgumentParser) -> None:
    """Nothing of the demo's rows is left: what the later file does not say is the default of the class."""
    alone = parser.parse_args(["--config", str(data)])
    both = parser.parse_args(["--config", str(task), "--config", str(data)])
    assert both.data.as_dict() == alone.data.as_dict()
    assert both.model == parser.parse_args(["--config", str(task)]).model


def test_arguments_alone_change_the_data_before(tmp_path: Path, parser: ArgumentParser) -> None:
    (tmp_path / "small.yaml").write_text("data:\n  init_args:\n    batch_size: 2\n")
    config = parser.parse_args(["--config", "causal_lm", "--config", str(tmp_path / "small.yaml")])
    assert (config.data.init_args.batch_size, config.data.init_args.separator) == (2, " = ")


def test_the_shell_has_the_last_word(parser: ArgumentParser) -> None:
    config = parser.parse_args(["--config", "causal_lm", "--config", "prompts", "--data.init_args.max_length", "7"])
    assert (config.data.init_args.max_length, config.data.init_args.separator) == (7, " ")


@pytest.mark.parametrize("name", ["lora", "methods/lora", "configs/methods/lora.yaml", "lora.yaml"])
def test_a_shipped_file_has_short_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parser: ArgumentParser
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parser.parse_args(["--config", name]).method == "LoRA"
    own = tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("method: BitFit\n")
    assert parser.parse_args(["--config", name]).method == "BitFit"  # one's own file comes first


def test_a_name_of_no_file(parser: ArgumentParser) -> None:
    with pytest.raises(TuningError, match="--config quickstrat is no file, did you mean 'quickstart': give a path, or"):
        parser.parse_args(["--config", "quickstrat"])


def test_every_shipped_file_has_one_short_name() -> None:
    names = shipped.configurations()
    assert len(names) == len(list(shipped.folder().rglob("*.yaml")))
    assert all(shipped.find(name) == path for name, path in names.items())


def test_wordings_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_instructions("configs/prompting/opinions.yaml").templates


def test_what_trains_says_how_long() -> None:
    for task in TASKS:
        trainer = yaml.safe_load(task.read_text()).get("trainer", {})
        frozen = "Nothing trains" in task.read_text()
        assert frozen or {"max_epochs", "max_steps"} & trainer.keys(), task


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tools.run_tool("configs", [])
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped.configurations())
    tools.run_tool("configs", ["show", "lora"])
    assert capsys.readouterr().out == (shipped.folder() / "methods/lora.yaml").read_text()
    tools.run_tool("configs", ["copy", "lora"])
    assert "use it with --config lora.yaml" in capsys.readouterr().out
    assert (tmp_path / "lora.yaml").read_text() == (shipped.folder() / "methods/lora.yaml").read_text()
    with pytest.raises(TuningError, match=r"lora.yaml exists already: give another folder with --to, or remove it"):
        tools.run_tool("configs", ["copy", "lora"])
    tools.run_tool("configs", ["copy", "--to", "all"])
    assert len(list((tmp_path / "all/configs").rglob("*.yaml"))) == len(shipped.configurations())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["show"], "configs show wants the name of one: lightning-peft configs lists them"),
        (["show", "lroa"], "'lroa' is no configuration, did you mean 'lora'"),
        (["delete", "lora"], "configs delete: say configs, configs show NAME or configs copy NAME"),
    ],
)
def test_words_that_are_no_command(words: list[str], match: str) -> None:
    with pytest.raises(TuningError, match=match):
        tools.run_tool("configs", words)
