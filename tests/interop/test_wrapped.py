"""Full Lightning checkpoints of modules that PEFT has wrapped become deltas."""

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from torch import Tensor

from lightning_peft import TuningError, from_delta, read_delta
from lightning_peft.interop import convert_wrapped, from_peft
from tests.contract import assert_near, shake
from tests.interop.adapters import plain
from tests.models import tiny
from tests.modules import loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:Found .* module:UserWarning",
)

CASES: dict[str, tuple[str, peft.PeftConfig]] = {
    "LoRA with head": ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])),
    "LoRA with biases": ("bert", peft.LoraConfig(r=2, target_modules=["query"], bias="all")),
    "DoRA": ("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
    "IA3": ("llama", peft.IA3Config(task_type="CAUSAL_LM")),
    "prompt": ("gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


class Wrapped(L.LightningModule):
    """What people have written before: a module that wraps its model with PEFT itself."""

    def __init__(self, kind: str, config: peft.PeftConfig) -> None:
        super().__init__()
        self.net: Any = peft.get_peft_model(tiny(kind), config)
        shake(self.net)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def checkpoint(name: str, folder: Path) -> tuple[Path, Wrapped]:
    kind, config = CASES[name]
    module = Wrapped(kind, config)
    fit = trainer(folder, max_steps=2)
    fit.fit(module, loader(kind))
    fit.save_checkpoint(folder / "full.ckpt")
    return folder / "full.ckpt", module


@pytest.mark.parametrize("name", CASES)
def test_it_becomes_a_delta(name: str, tmp_path: Path) -> None:
    kind, config = CASES[name]
    full, module = checkpoint(name, tmp_path)
    delta = convert_wrapped(tiny(kind), full, tmp_path / "delta.safetensors", config.to_dict())
    assert delta.stat().st_size < full.stat().st_size
    again = from_delta(delta, tiny(kind))
    with torch.no_grad():
        expected = module.net.eval()(**plain(kind)).logits
        ours = again(**plain(kind)).logits
    assert_near({"": expected[:, -10:]}, {"": ours}, 1e-5)
    assert not torch.allclose(ours, tiny(kind)(**plain(kind)).logits, atol=1e-3)
    assert not any("base_model" in key for key in read_delta(delta)[0])


def test_the_configuration_may_be_a_file_or_its_folder(tmp_path: Path) -> None:
    full, module = checkpoint("DoRA", tmp_path)
    module.net.save_pretrained(tmp_path / "adapter")
    for i, config in enumerate((tmp_path / "adapter", tmp_path / "adapter" / "adapter_config.json")):
        convert_wrapped(tiny("llama"), full, tmp_path / f"{i}.safetensors", config)
    assert (tmp_path / "0.safetensors").stat().st_size == (tmp_path / "1.safetensors").stat().st_size


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    kind, config = CASES["LoRA with head"]
    full, _ = checkpoint("LoRA with head", tmp_path)
    out = tmp_path / "delta.safetensors"
    with pytest.raises(TuningError, match=r"has another .* than this model: give the base that was wrapped"):
        convert_wrapped(tiny(kind, seed=1), full, out, config.to_dict())
    with pytest.raises(TuningError, match="which this model lacks"):
        convert_wrapped(tiny("llama"), full, out, config.to_dict())
    with pytest.raises(TuningError, match="no module wrapped by PEFT with an adapter 'other'"):
        convert_wrapped(tiny(kind), full, out, config.to_dict(), adapter="other")
    torch.save({"state_dict": dict(tiny(kind).state_dict())}, tmp_path / "plain.ckpt")
    with pytest.raises(TuningError, match="no module wrapped by PEFT"):
        convert_wrapped(tiny(kind), tmp_path / "plain.ckpt", out, config.to_dict())
    assert not out.exists()


def test_each_of_several_adapters_becomes_a_delta(tmp_path: Path) -> None:
    configs = {
        "films": peft.LoraConfig(r=2, target_modules=["q_proj"]),
        "books": peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True),
    }
    model: Any = peft.get_peft_model(tiny("llama"), configs["films"], adapter_name="films")
    model.add_adapter("books", configs["books"])
    for name in configs:
        model.set_adapter(name)
        shake(model)
    torch.save(model.state_dict(), tmp_path / "full.ckpt")
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(
        TuningError, match=r"both is no adapter of PEFT, .*: give the folder that has it, such as .*books"
    ):
        from_peft(tiny("llama"), tmp_path / "both")
    for name in configs:
        model.set_adapter(name)
        with torch.no_grad():
            expected = model.eval()(**plain("llama")).logits
        tuned = tiny("llama")
        convert_wrapped(tuned, tmp_path / "full.ckpt", tmp_path / name, tmp_path / "both" / name, adapter=name)
        assert_near({"": expected}, {"": tuned(**plain("llama")).logits.detach()}, 1e-5)
