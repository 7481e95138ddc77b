"""`lightning-peft check --meta true`: models without weights, against what the same models take when they run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_peft import BitFit, FullFineTuning, LinearProbe, LoRA, Method, PromptTuning
from lightning_peft.cli import main
from lightning_peft.reports.findings import Finding
from lightning_peft.reports.preflight import Preflight
from lightning_peft.tasks import CausalLM
from lightning_peft.training.strategy import FullyShard
from tests.fresh import ROOT
from tests.models import tiny
from tests.reports.test_memory import LENGTH, Module, checked


def found(module: Any, method: Method, rows: int = 8, length: int = LENGTH, **asked: Any) -> dict[str, Finding]:
    run = Preflight.of(accelerator="cpu", callbacks=[method], **asked)
    data: Any = SimpleNamespace(batch_size=rows, max_length=length)
    return {finding.what: finding for finding in run.findings_on_meta(module, data)}


def empty(kind: str) -> Module:
    with torch.device("meta"):
        return Module(kind)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("bert", LoRA()),
        ("bert", PromptTuning(init="random_uniform")),
        ("gpt2", PromptTuning(init="random_uniform")),
        ("gpt2", BitFit()),
        ("vit", LinearProbe()),
        ("bert", FullFineTuning()),
        ("gpt2", FullFineTuning()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_memory_without_weights_is_that_with_them(kind: str, method: Method) -> None:
    real = checked(kind, method, 8).probe.memory
    run = Preflight.of(accelerator="cpu", callbacks=[method])
    data: Any = SimpleNamespace(batch_size=8, max_length=LENGTH)
    findings = run.findings_on_meta(empty(kind), data)
    assert all(finding.passes for finding in findings), findings
    assert "activations and gradients" not in findings[-1].seen
    meta = run.probe.memory
    assert meta[:3] == real[:3]
    assert meta.activations == pytest.approx(real.activations, rel=0.15)


def llama(folder: Path, **size: int) -> Path:
    """Save the configuration of a model and nothing else."""
    ids: dict[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    hf.LlamaConfig(tie_word_embeddings=False, dtype="bfloat16", **ids, **size).save_pretrained(folder)
    return folder


def test_a_folder_with_a_configuration_alone(tmp_path: Path) -> None:
    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "num_attention_heads": 32}
    folder = llama(tmp_path, **size, num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048)
    with torch.device("meta"):
        task = CausalLM(str(folder), dtype="auto")
    findings = found(task, LoRA(r=4, alpha=4), 2, 64, strategy=FullyShard(), devices=8, num_nodes=2)
    assert all(finding.passes for finding in findings.values()), findings
    trained = 3 * 4 * (2048 + 2048 + 2048 + 256)
    weights = 2 * (2 * 32000 * 2048 + 3 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048) + 2048)
    assert f"{trained:,} of" in findings["every trained tensor is in one optimizer group"].seen
    weights += 4 * trained
    assert f"weights {weights / 2**20:.1f} MiB" in findings["memory of a process that holds it all"].seen
    assert "4 units over 16 processes" in findings["FSDP2 units are uniform"].seen
    rank = findings["memory of each of 16 processes"].seen
    assert f"weights {weights / 16 / 2**20:.1f} MiB" in rank


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_recomputed_activations_take_less(tmp_path: Path) -> None:
    folder = llama(
        tmp_path, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, vocab_size=100
    )
    needs = []
    for recompute in (False, True):
        with torch.device("meta"):
            task = CausalLM(str(folder), dtype="auto")
        method = LoRA(backbone_mode="train")
        run = Preflight.of(callbacks=[method], strategy=FullyShard(activation_checkpointing=recompute))
        findings = run.findings_on_meta(task, None)
        assert "activations and gradients" not in findings[-1].seen
        needs.append(run.probe.memory.activations)
    assert needs[1] < needs[0] / 2
    method = LoRA(backbone_mode="train")
    real = checked("bert", method, 8, checkpointing=True).probe.memory
    run = Preflight.of(accelerator="cpu", callbacks=[method])
    with torch.device("meta"):
        module = Module("bert", checkpointing=True)
    data: Any = SimpleNamespace(batch_size=8, max_length=LENGTH)
    run.findings_on_meta(module, data)
    assert run.probe.memory.activations == pytest.approx(real.activations, rel=0.15)


def test_what_is_said_of_models_that_do_not_fit() -> None:
    finding = found(Module("bert"), LoRA())["built on the meta device"]
    assert not finding.passes
    assert "embeddings.weight on the cpu: let it take torch.get_default_device()" in finding.seen
    module = empty("bert")
    module.unused = torch.nn.Linear(2, 2, device="meta")
    finding = found(module, LoRA())["every trained tensor gets a gradient"]
    assert not finding.passes
    assert finding.seen.startswith("2 without")
    finding = found(empty("bert"), LoRA(), strategy="FullyShard")["strategy"]
    assert (finding.passes, finding.seen) == (False, "'FullyShard' is the name of none")
    finding = found(empty("gpt2"), PromptTuning(init="random_uniform"), length=90)
    assert "a prompt of 20 do not fit the 96 positions" in finding["built on the meta device"].seen


def test_half_precision_is_stored_as_in_training() -> None:
    findings = found(empty("bert"), LoRA(), precision="bf16-true")
    assert findings["the gradient scaler meets no fp16 gradient"].seen == "trained in float32, precision bf16-true"
    whole = findings["memory of a process that holds it all"].seen
    full = found(empty("bert"), LoRA())["memory of a process that holds it all"].seen
    assert whole != full
    mixed = found(empty("bert"), LoRA(), precision="bf16-mixed")
    assert "without autocast" in mixed["left out on the meta device"].seen


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = ["--config", str(ROOT / "configs/tasks/causal_lm.yaml"), "--method", "LoRA", "--meta", "true"]
    words += ["--model.model", str(llama(tmp_path, **size)), "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "check", *words])
    monkeypatch.setenv("COLUMNS", "200")
    main()
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    assert "32 rows of 128 tokens" in printed  # of the configuration
    words[-3] = str(tmp_path / "nowhere")
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "check", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no causal language model can be made of" in capsys.readouterr().err


class Downloads(Module):
    """Loads weights, wherever it is."""

    def __init__(self, folder: str) -> None:
        super().__init__("bert")
        self.model = hf.BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_module_that_loads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("bert").save_pretrained(tmp_path)
    words = ["--model", "tests.reports.test_meta_check.Downloads", "--model.folder", str(tmp_path), "--meta", "true"]
    words += ["--data", "tests.slurm.job.Rows", "--method", "LoRA"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "check", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "Downloads cannot be made on the meta device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_without_weights(tmp_path: Path) -> None:
    """70 B parameters of which there is but a configuration."""
    size = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    folder = llama(tmp_path, **size, num_key_value_heads=8, vocab_size=128256)
    words = ["--config", "configs/tasks/causal_lm.yaml", "--config", "configs/trainers/fsdp2.yaml", "--meta", "true"]
    words += ["--model.model", str(folder), "--model.dtype", "auto", "--method", "LoRA", "--method.r", "16"]
    words += ["--trainer.devices", "8", "--trainer.num_nodes", "2", "--data.batch_size", "2"]
    command = [Path(sys.executable).parent / "lightning-peft", "check", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "81 units over 16 processes" in " ".join(done.stdout.split())
