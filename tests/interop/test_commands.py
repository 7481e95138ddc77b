"""``lightning-peft export`` and ``import``, and the model card, as a user meets them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft import LoRA, PromptTuning, from_delta, save_delta
from lightning_peft.cli import main
from lightning_peft.interop import Facts, to_peft
from lightning_peft.interop.card import _words
from tests.contract import assert_near, shake
from tests.interop.adapters import logits, theirs_from, tuned
from tests.models import save_tokenizer, tiny
from tests.modules import Tuned, loader, trainer
from tests.test_cli import run

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "model")
    tiny("bert").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *map(str, arguments)])
    if code:
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    else:
        main()


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_delta_goes_out_and_comes_back(
    backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = backbone.parent
    model = loaded(backbone)
    LoRA(r=2).apply(model)
    shake(model)
    save_delta(model, folder / "delta.safetensors")
    command(monkeypatch, "export", folder / "delta.safetensors", folder / "adapter", "--to", "peft")
    assert "LORA adapter written to" in capsys.readouterr().out
    assert_near({"": logits(model, "bert")}, {"": theirs_from(folder / "adapter", "bert", loaded(backbone))}, 1e-5)
    command(monkeypatch, "import", folder / "adapter", folder / "again.safetensors")
    assert "LoRA of BertForSequenceClassification written to" in capsys.readouterr().out
    again = from_delta(folder / "again.safetensors")
    assert torch.equal(logits(model, "bert"), logits(again, "bert"))
    command(monkeypatch, "export", folder / "delta.safetensors", folder / "served", "--for", "vllm", code=2)
    said = capsys.readouterr().err
    assert "vLLM cannot serve this adapter: classifier would have to" in said
    assert "convolution" not in said  # the head's bias is none
    assert not (folder / "served").exists()
    command(monkeypatch, "import", folder / "adapter", folder / "again.bin", code=2)
    assert "give it the suffix .safetensors" in capsys.readouterr().err


def test_the_card_is_told_what_a_delta_does_not_know(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = backbone.parent
    model = loaded(backbone)
    LoRA(r=2).apply(model)
    save_delta(model, folder / "delta.safetensors")
    scores = ("--metrics", '{"val_accuracy": 0.91234, "val_f1": 1}')
    command(monkeypatch, "export", folder / "delta.safetensors", folder / "adapter", *scores, "--data", "films")
    card = (folder / "adapter" / "README.md").read_text()
    assert "| metrics | val_accuracy 0.9123, val_f1 1.0000 |" in card
    assert "| data | films |" in card
    wrong = ("--metrics", '{"val_accuracy": "high"}')
    command(monkeypatch, "export", folder / "delta.safetensors", folder / "other", *wrong, code=2)
    assert not (folder / "other").exists()


def test_the_card_of_a_prompt_has_its_nearest_words(tmp_path: Path) -> None:
    """Rows that are the embeddings of words have these words nearest; with no tokenizer at hand there is no table."""
    method = PromptTuning(num_virtual_tokens=2, init="random_uniform")
    model, _ = tuned("gpt2", (method,))
    to_peft(model, tmp_path / "without")
    assert "Nearest" not in (tmp_path / "without" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "model"))
    model.config._name_or_path = str(tmp_path / "model")
    with torch.no_grad():
        method.rows(model).copy_(model.get_input_embeddings().weight[:2])
    to_peft(model, tmp_path / "with")
    rows = [line for line in (tmp_path / "with" / "README.md").read_text().splitlines() if "(1.00)" in line]
    for i, word in enumerate(tokenizer.convert_ids_to_tokens([0, 1])):
        assert rows[i].startswith(f"| {i} | <code>{word}</code> (1.00), ")


def test_words_of_a_vocabulary_break_no_table() -> None:
    assert _words([[("a|b", 0.5), ("<s>", 0.25)]]).splitlines()[2] == (
        "| 0 | <code>a&#124;b</code> (0.50), <code>&lt;s&gt;</code> (0.25) |"
    )


def test_a_checkpoint_of_a_wrapped_module_comes_in(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = backbone.parent
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], base_model_name_or_path=str(backbone))
    wrapped = peft.get_peft_model(loaded(backbone), config).eval()
    shake(wrapped)
    torch.save({"state_dict": {f"net.{n}": t for n, t in wrapped.state_dict().items()}}, folder / "full.ckpt")
    wrapped.save_pretrained(folder / "adapter")
    command(monkeypatch, "import", folder / "full.ckpt", folder / "delta.safetensors", code=2)
    config_file = folder / "adapter" / "adapter_config.json"
    command(monkeypatch, "import", folder / "full.ckpt", folder / "delta.safetensors", "--config", config_file)
    assert_near({"": logits(wrapped, "bert")}, {"": logits(from_delta(folder / "delta.safetensors"), "bert")}, 1e-5)


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\nfrom lightning_peft.cli import main\nsys.argv = ['lightning-peft', '--help']\nmain()\n"
        "assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "export" in printed
    assert "import" in printed


@pytest.mark.slow
def test_the_script_itself(backbone: Path) -> None:
    model = loaded(backbone)
    LoRA(r=2).apply(model)
    save_delta(model, backbone.parent / "delta.safetensors")
    assert "--for" in run("export", "--help", folder=backbone.parent)
    run("export", "delta.safetensors", "adapter", folder=backbone.parent)
    run("import", "adapter", "again.safetensors", folder=backbone.parent)


def test_the_model_card_says_what_it_is(tmp_path: Path) -> None:
    model, _ = tuned("bert", (LoRA(r=2),))
    model.config._name_or_path = "somebody/bert"
    facts = Facts(
        data="films(100 rows)", metrics={"val_accuracy": 0.91234}, command="lightning-peft fit --config x.yaml"
    )
    folder = to_peft(model, tmp_path / "films", facts=facts)
    card = (folder / "README.md").read_text()
    _, front, page = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "somebody/bert", "library_name": "peft", "tags": ["lightning-peft", "lora"]
    }  # fmt: skip
    for part in ("# films", "`LoRA(r=2)`", "2106.09685", "`somebody/bert`", "SEQ_CLS", "films(100 rows)",
                 "val_accuracy 0.9123", "lightning-peft fit --config x.yaml", "from_peft"):  # fmt: skip
        assert part in page, part


def test_the_card_takes_its_facts_from_a_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "run" / "checkpoints", monitor="val_loss", filename="best")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 1\n")
    module = Tuned("bert")

    class Films(L.LightningDataModule):
        def __init__(self, folder: str, max_length: int) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader("bert")

        val_dataloader = train_dataloader

    trainer(tmp_path, LoRA(r=2), best).fit(module, datamodule=Films("films", 64))
    facts = Facts.of(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert facts.metrics == {"val_loss": pytest.approx(best.best_model_score.item())}
    assert facts.command == "lightning-peft fit --config config.yaml"
    folder = to_peft(module, tmp_path / "adapter", facts=facts)
    card = (folder / "README.md").read_text()
    assert f"val_loss {best.best_model_score.item():.4f}" in card
    assert '| data | data(folder="films", max_length=64) |' in card
    assert Facts.of(tmp_path / "none.safetensors") == Facts()
