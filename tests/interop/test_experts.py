"""Adapters of single experts, as transformers 4 and PEFT wrote them, go to models that stack the experts."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft import TuningError
from lightning_peft.interop import from_peft
from tests.contract import assert_near
from tests.interop.test_names import built, computed

EXPERTS = {"w1": ("experts.gate_up_proj", 0, 64, 32), "w3": ("experts.gate_up_proj", 64, 64, 32)} | {
    "w2": ("experts.down_proj", 0, 32, 64)
}
"""Layer of an expert -> the stack, its first row there, and its rows and columns."""


def adapter(folder: Path, targets: list[str], **options: Any) -> dict[str, Tensor]:
    """Write an adapter of a Mixtral by the names of transformers 4; return what its updates add to the weights."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    weights = dict(built("mixtral").named_parameters())
    tensors: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}

    def update(name: str, disk: str, index: Any, rows: int, columns: int) -> None:
        leaf = disk.rpartition(".")[2]
        r = (config.rank_pattern or {}).get(leaf, 2)
        scale = (config.alpha_pattern or {}).get(leaf, 6) / (r**0.5 if config.use_rslora else r)
        a, b = torch.randn(r, columns) / 5, torch.randn(rows, r) / 5
        tensors[f"base_model.model.{disk}.lora_A.weight"], tensors[f"base_model.model.{disk}.lora_B.weight"] = a, b
        added.setdefault(name, torch.zeros_like(weights[name]))[index] += scale * b @ a

    for layer in range(2):
        block, disk = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        for target in targets:
            if target == "gate":
                update(f"{block}.gate.weight", f"{disk}.gate", ..., 4, 32)
                continue
            stack, first, rows, columns = EXPERTS[target]
            for e in range(4):
                index = (e, slice(first, first + rows))
                update(f"{block}.{stack}", f"{disk}.experts.{e}.{target}", index, rows, columns)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return added


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "all": (["w1", "w2", "w3"], {}),
    "one": (["w2"], {}),
    "gate without up": (["w1"], {}),
    "the router too": (["w1", "w2", "w3", "gate"], {}),
    "rsLoRA": (["w1", "w2", "w3"], {"use_rslora": True}),
    "ranks and alphas": (["w1", "w2", "w3"], {"rank_pattern": {"w1": 3, "w2": 1}, "alpha_pattern": {"w3": 10}}),
}
OTHERWISE_IN_PEFT = {"gate without up", "ranks and alphas", "rsLoRA"}
"""PEFT 0.21 refuses one of two layers of a stack, passes over their patterns, and doubles alpha with the rank under
rsLoRA too, where the scale goes by the root of the rank."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_single_experts_are_stacked(case: str, tmp_path: Path) -> None:
    targets, options = CASES[case]
    added = adapter(tmp_path, targets, **options)
    expected, model = built("mixtral"), built("mixtral")
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter += added.get(name, 0)
    from_peft(model, tmp_path)
    assert_near({"": computed(expected, "mixtral")}, {"": computed(model, "mixtral")}, 1e-5)
    if case not in OTHERWISE_IN_PEFT:
        other = peft.PeftModel.from_pretrained(built("mixtral"), tmp_path).eval()
        assert_near({"": computed(other, "mixtral")}, {"": computed(model, "mixtral")}, 1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drop": "experts.2.w3."}, r"has updates of 3 of 4 experts .* none of expert 2.* merge it with PEFT\.$"),
        ({"drop": "experts.2.w3.lora_A"}, r"has lora_B\.weight of model\.layers\.0\.block_sparse_moe\.experts\.2\.w3,"),
        ({"add": "experts.2.w3.lora_magnitude_vector"}, r"lora_magnitude_vector of .*experts\.2\.w3, of which this"),
    ],
)
def test_what_cannot_be_stacked(change: dict[str, str], says: str, tmp_path: Path) -> None:
    adapter(tmp_path, ["w1", "w3"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: t for key, t in load_file(file).items() if change.get("drop", "no") not in key}
    if "add" in change:
        tensors[f"base_model.model.model.layers.0.block_sparse_moe.{change['add']}"] = torch.ones(64)
    save_file(tensors, file, {"format": "pt"})
    model = built("mixtral")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(TuningError, match=says):
        from_peft(model, tmp_path)
    assert before.keys() == model.state_dict().keys()
