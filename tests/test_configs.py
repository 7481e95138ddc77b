"""Every YAML file under configs/ is accepted by the command line, alone or with what it says that it needs."""

import contextlib
import io
import json
import os
import subprocess
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
    from lightning_peft.commands.running import run

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["lightning-peft", "fit", *arguments, "--print_config"])
        with pytest.raises(SystemExit) as ended:
            run()
    assert ended.value.code == 0
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("file", FILES)
def test_parses(file: str) -> None:
    alone = file.startswith("configs/recipes")
    base = [] if alone else ["--config", str(ROOT / "configs/quickstart.yaml")]
    config = parsed(*base, "--config", str(ROOT / file))
    given = yaml.safe_load((ROOT / file).read_text())
    for name in given:
        if name == "method":
            method = given["method"]
            wanted = method if isinstance(method, str) else method["class_path"]
            assert config["method"]["class_path"].rpartition(".")[2] == wanted
    if alone:
        assert config["method"]["init_args"]["target_modules"] == "all-linear"
        assert ("BitsandbytesPrecision" in str(config["trainer"]["plugins"])) == ("qlora" in file)
        assert (config["trainer"]["devices"] == 1) == ("several" not in file)


def test_a_task_leaves_the_learning_rate_to_the_method() -> None:
    for path in (ROOT / "configs/tasks").glob("*.yaml"):
        given = yaml.safe_load(path.read_text())["model"].get("init_args", {})
        assert not given.keys() & {"lr", "head_lr"}, path.name


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat_lora", "chat_lora_several_gpus"])
def test_a_recipe_trains_a_tiny_llama(name: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")
    tiny("llama").save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad film"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    template = (
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    given = ["--model.model", "model", "--data.template", template, "--data.max_length", "32", "--trainer.devices", "1"]
    given += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    ]
    if "several" in name:
        given += ["--trainer.strategy.init_args.process_group_backend", "gloo"]
    program = "import sys; from lightning_peft.cli import main; sys.argv = sys.argv[1:]; main()"
    command = [sys.executable, "-c", program, "lightning-peft", "fit", "--config", name, *given]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "runs/chat/best.ckpt").exists()
