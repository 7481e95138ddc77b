"""What a person does with a delta: its card and export say what is known of the run, PEFT opens it, a hub takes it."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification

from lightning_peft import LoRA, PromptTuning, TuningError, from_delta, merge, save_delta
from lightning_peft.commands import texts
from lightning_peft.commands.pushing import push
from lightning_peft.core.delta_file import CLASS_PATH
from lightning_peft.interop import Facts, to_peft
from lightning_peft.interop.check import check_adapter
from lightning_peft.interop.folder import read_adapter
from lightning_peft.interop.programs import write_program
from lightning_peft.reports.tuning_report import TuningReport
from tests import text
from tests.interop import hub
from tests.interop.adapters import tuned
from tests.interop.test_commands import command
from tests.models import batch, tiny

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
        "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    ),
]
cache = text.cache


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a fit of one epoch, with the model beside it; the saved model has two classes, the task three."""
    folder = tmp_path_factory.mktemp("trained")
    model = text.save_model(folder / "model")
    config = folder / "model/config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "id2label"}))
    best = ModelCheckpoint(folder / "run", monitor="val_accuracy", mode="max", filename="best")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    report = TuningReport(
        "/usr/bin/lightning-peft", ["fit", "--data.train", str(folder / "train.jsonl"), "--method", "LoRA"]
    )
    callbacks: list[L.Callback] = [LoRA(r=2), best, report]
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)  # type: ignore[arg-type]
    trainer.fit(text.task(model), text.data(model, folder, train=8, other=6))
    return folder / "run/best.ckpt"


def test_an_export_says_what_is_known_and_no_path(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "export", trained, tmp_path / "adapter", "--check")
    printed = capsys.readouterr().out
    assert "lightning_peft computes the same logits" in printed
    assert printed.index("peft computes the same logits") < printed.index("adapter written to")
    card, known = (tmp_path / "adapter/README.md").read_text(), read_adapter(tmp_path / "adapter").header["training"]
    for line in ("| classes | nature, people, sound |", "| learning rates | delta 0.002, head 0.03 |", "| epochs | 1 |",
                 "| base | a folder `model` |", 'train="train.jsonl"',
                 "lightning-peft fit --data.train train.jsonl --method LoRA"):  # fmt: skip
        assert line in card
    assert str(trained.parents[1]) not in card + json.dumps(known)
    assert known["classes"] == text.NAMES
    assert known["epochs"] == 1
    assert known["metrics"].keys() == {"val_accuracy"}
    lines: dict[str, Any] = {}
    code = re.search(r"```python\n(.*?)\n\n", card, re.DOTALL)
    assert code is not None
    exec(code[1].replace("THIS_FOLDER", str(tmp_path / "adapter")), lines)
    assert isinstance(lines["model"], peft.PeftModelForSequenceClassification)
    assert lines["model"].config.id2label == dict(enumerate(text.NAMES))
    inputs = {name: value for name, value in batch("bert").items() if name != "labels"}
    with torch.no_grad():
        theirs, ours = lines["model"].eval()(**inputs).logits, from_delta(trained)(**inputs).logits
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_an_export_that_computes_something_else_is_no_adapter(tmp_path: Path) -> None:
    model, _ = tuned("bert", (LoRA(r=2),))
    tiny("bert").save_pretrained(tmp_path / "base")
    to_peft(model, tmp_path / "adapter", facts=Facts())
    assert max(check_adapter(model, tmp_path / "adapter", str(tmp_path / "base")).values()) < 1e-4
    with torch.no_grad():
        model.classifier.bias += 1.0
    with pytest.raises(TuningError, match=r"lightning_peft computes other logits from .*: keep the delta, or merge it"):
        check_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    assert not (tmp_path / "adapter/adapter_config.json").exists()


@pytest.mark.parametrize(("name", "told"), [("CausalLM", {}), ("TextClassification", {"labels": ["bad", "good"]})])
def test_a_task_is_told_its_classes_if_it_asks(
    name: str, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that texts can be given from the shell to what writes, too."""
    names = {"id2label": {"0": "bad", "1": "good"}}
    kept = {"hyper_parameters": {CLASS_PATH: f"lightning_peft.{name}"}}
    monkeypatch.setattr(texts, "read_checkpoint", lambda path: kept)
    monkeypatch.setattr(texts, "meta_of", lambda checkpoint, path: {"backbones": {"backbone": {"config": names}}})
    monkeypatch.setattr(texts, "load_from_checkpoint", lambda kind, path, **given: (kind.__name__, given))
    assert texts.load_task("a.ckpt") == (name, told)


def test_a_hub_takes_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model, _ = tuned("bert", (LoRA(r=2),))
    model.config._name_or_path = "/home/me/bert"
    to_peft(model, tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    with hub.running() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        with pytest.raises(TuningError, match=r"the base of .* is /home/me/bert, .*: give --base, its hub id\.$"):
            push(tmp_path / "adapter", "me/films")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "google/bert").mkdir(parents=True)
        model.config._name_or_path = "google/bert"
        to_peft(model, tmp_path / "near")
        with pytest.raises(TuningError, match=r"the base of .* is google/bert, .*: give --base, its hub id\.$"):
            push(tmp_path / "near", "me/films")
        (tmp_path / "google/bert").rmdir()
        with pytest.raises(TuningError, match=r"'a/b/c' is no name of a repository: write it as owner/name\.$"):
            push(tmp_path / "adapter", "a/b/c", base="google/bert")
        assert not server.made
        command(monkeypatch, "push", tmp_path / "adapter", "me/films", "--base", "google/bert")
        assert f"is at {server.address}/me/films" in capsys.readouterr().out
        assert "private" in server.made[0].values() or server.made[0].get("private") is True
        files = server.files["me/films"]
        assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "google/bert"
        assert files["adapter_model.safetensors"] == (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(TuningError, match=r"the hub does not take me/films .*hf auth whoami knows you"):
            push(tmp_path / "adapter", "me/films")
    with pytest.raises(TuningError, match="holds no adapter and no model: give a folder"):
        push(tmp_path, "me/films")
    read_adapter(tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "t5"])
def test_a_merged_model_is_a_program(kind: str, tmp_path: Path) -> None:
    model, _ = tuned(kind, (LoRA(r=2),))
    file, difference = write_program(merge(model), tmp_path / "program", "torch")
    assert file.is_file()
    assert difference is not None
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "t5"])
def test_a_merged_model_is_onnx_or_says_what_is_missing(kind: str, tmp_path: Path) -> None:
    model, _ = tuned(kind, (LoRA(r=2),))
    if find_spec("onnxscript") is None:
        with pytest.raises(TuningError, match="which is not installed: pip install onnxscript"):
            write_program(merge(model), tmp_path / "program", "onnx")
        return
    file, difference = write_program(merge(model), tmp_path / "program", "onnx")
    assert file.is_file()
    assert difference is None or difference < 1e-4


def test_what_cannot_be_merged_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text.save_model(tmp_path / "model"))
    PromptTuning(num_virtual_tokens=2, init="random_uniform").apply(model)
    save_delta(model, tmp_path / "delta.safetensors")
    command(monkeypatch, "export", tmp_path / "delta.safetensors", tmp_path / "out", "--torch-export", code=2)
    assert "cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
