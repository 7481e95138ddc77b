"""Every YAML file under configs/ is accepted by the command line, alone or with what it says that it needs."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
import yaml

from tests.models import save_tokenizer, tiny

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "prompting"
)


def parsed(*arguments: str) -> dict:
    """Return the whole configuration that ``fit`` would run with."""
    from lightning_peft.commands.trainer import run

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["lightning-peft", "fit", *arguments, "--print_config"])
        with pytest.raises(SystemExit) as ended:
            run()
    assert ended.value.code == 0
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("file", FILES)
def test_parses(file: str) -> None:
    base = ["--config", str(ROOT / "configs/quickstart.yaml")]
    config = parsed(*base, "--config", str(ROOT / file))
    given = yaml.safe_load((ROOT / file).read_text())
    for name in given:
        if name == "method":
            method = given["method"]
            wanted = method if isinstance(method, str) else method["class_path"]
            assert config["method"]["class_path"].rpartition(".")[2] == wanted


def test_each_method_has_a_config() -> None:
    methods = {path.stem for path in (ROOT / "lightning_peft/methods").glob("[a-z]*.py")}
    assert {path.stem for path in (ROOT / "configs/methods").glob("*.yaml")} == methods


def test_tasks_and_data_build(tmp_path: Path) -> None:
    """Build what the files of configs/tasks and configs/data describe, on a tiny model and local rows."""
    import lightning_peft
    from lightning_peft import TextClassification

    save_tokenizer(tmp_path / "model")
    tiny("bert").save_pretrained(tmp_path / "model")
    (tmp_path / "train.csv").write_text("text,label\n" + "good film,a\nbad film,b\n" * 20)
    task = yaml.safe_load((ROOT / "configs/tasks/text_classification.yaml").read_text())["model"]
    for name in ("stdlib_docstrings", "files"):
        entry = yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())["data"]
        arguments = dict(entry["init_args"])
        if "train" in arguments:
            arguments["train"] = str(tmp_path / arguments["train"])
        data = getattr(lightning_peft, entry["class_path"])(
            tokenizer=str(tmp_path / "model"), **arguments | {"max_length": 16}
        )
        module = TextClassification(model=str(tmp_path / "model"), labels=data.label_names, **task.get("init_args", {}))
        assert module.labels == data.label_names
