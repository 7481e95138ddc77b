"""PartialK: the last blocks, by index."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LinearProbe, PartialK, TuningError, collect
from tests.contract import MethodContract, copy_of
from tests.models import batch, meta, tiny
from tests.modules import Tuned, loader, trainer

BLOCK = {
    "bert": 4 * (32 * 32 + 32) + 2 * 32 * 64 + 32 + 64 + 4 * 32,
    "gpt2": 4 * (32 * 32 + 32) + 2 * 32 * 128 + 32 + 128 + 4 * 32,
    "llama": 3 * 32 * 32 + 3 * 32 * 64 + 2 * 32,
    "t5": 8 * 32 * 32 + 2 * 32 * 64 + 3 * 32,
}
BLOCK["vit"] = BLOCK["bert"]


class TestPartialK(MethodContract):
    method = PartialK()
    backbones = ("bert", "gpt2", "llama", "t5", "vit")
    compiled = ("vit",)

    def count(self, kind: str) -> int:
        """A block, and the norm after all blocks, which BERT does not have."""
        return BLOCK[kind] + {"bert": 0, "gpt2": 64, "llama": 32, "t5": 32, "vit": 64}[kind]


@pytest.mark.parametrize(
    ("k", "count"), [(0, 0), (0.5, 4_723_968 + 1_536), (1, 7_087_872 + 1_536), (4, 4 * 7_087_872 + 1_536)]
)
def test_counts_of_the_papers(k: float, count: int) -> None:
    model = meta(hf.ViTConfig(num_labels=100), hf.AutoModelForImageClassification)
    PartialK(k=k).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count + 76_900


def test_a_block_and_a_half() -> None:
    whole, more = tiny("vit"), tiny("vit")
    PartialK(k=1).apply(whole)
    PartialK(k=1.5).apply(more)
    extra = {name.removeprefix("vit.layers.0.") for name in collect(more).keys() - collect(whole).keys()}
    assert {name.rpartition(".")[0] for name in extra} == {"layernorm_after", "mlp.fc1", "mlp.fc2"}


def test_half_a_block_of_a_norm_that_comes_after() -> None:
    model = tiny("bert")
    PartialK(k=0.5).apply(model)
    owners = {name.removeprefix("bert.encoder.layer.1.").rpartition(".")[0] for name in collect(model)}
    assert owners == {"intermediate.dense", "output.dense", "output.LayerNorm", "classifier"}


def test_blocks_go_by_index() -> None:
    """``layers.1`` is a substring of ``layers.11``."""
    model = meta(hf.ViTConfig(), hf.AutoModel)
    PartialK(k=1).apply(model)
    assert {name.split(".")[1] for name in collect(model) if name.startswith("layers.")} == {"11"}
    model = meta(hf.ViTConfig(), hf.AutoModel)
    PartialK(k=12).apply(model)
    assert len({name.split(".")[1] for name in collect(model) if name.startswith("layers.")}) == 12


def test_none_is_a_linear_probe() -> None:
    model, probe = tiny("vit"), tiny("vit")
    PartialK(k=0).apply(model)
    LinearProbe().apply(probe)
    assert list(collect(model)) == list(collect(probe))


def test_no_graph_below_the_first_trained_block() -> None:
    model = tiny("vit")
    PartialK(k=1).apply(model)
    seen: list[Tensor] = []
    for block in model.vit.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    model(**batch("vit"))
    assert [out.requires_grad for out in seen] == [False, True]


@pytest.mark.parametrize(("k", "stages"), [(1, {"1.blocks.1"}), (2, {"1.blocks.0", "1.blocks.1"})])
def test_swin_blocks_are_counted_across_stages(k: int, stages: set[str]) -> None:
    model = tiny("swin")
    PartialK(k=k).apply(model)
    names = {name for name in collect(model) if "blocks" in name}
    assert {".".join(name.split(".")[3:6]) for name in names} == stages
    assert not any("downsample" in name for name in collect(model))


def test_what_lies_between_two_trained_blocks_is_trained() -> None:
    model = tiny("swin")
    PartialK(k=3).apply(model)
    names = set(collect(model))
    assert any("downsample" in name for name in names)
    assert any("0.blocks.1" in name for name in names)
    assert not any("0.blocks.0" in name for name in names)
    assert "swin.layernorm.weight" in names


def test_batch_norms_of_trained_blocks_learn_and_those_of_frozen_ones_do_not(tmp_path: Path) -> None:
    module = Tuned("resnet")
    before = copy_of(module.state_dict())
    trainer(tmp_path, PartialK(k=1)).fit(module, loader("resnet"), loader("resnet"))
    delta, after = collect(module), module.state_dict()
    statistics = {name for name in delta if "running" in name}
    assert statistics
    assert all("stages.1.layers.1" in name for name in statistics)
    for name in after:
        if "running_mean" in name:
            assert torch.equal(after[name], before[name]) is (name not in statistics)


def test_two_towers_are_tuned_both_or_the_one_that_is_named() -> None:
    model = tiny("clip")
    method = PartialK()
    method.apply(model)
    blocks = {name.split(".layers.")[0] for name in collect(model) if ".layers.1." in name}
    assert blocks == {"towers.text_model.encoder", "towers.vision_model.encoder"}
    assert not any(".layers.0." in name for name in collect(model))
    method.remove(model)
    with pytest.raises(TuningError, match=r"has 2 of them tuned: name one by blocks="):
        PartialK(cache_features=True).apply(model)
    PartialK(blocks="towers.vision_model.encoder.layers").apply(model)
    names = {name.split(".encoder.layers.1")[0] for name in collect(model)}
    assert names == {"towers.vision_model", *(f"towers.vision_model.post_layernorm.{p}" for p in ("weight", "bias"))}


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("vit", PartialK(k=3), "k=3 does not fit the 2 blocks"),
        ("vit", PartialK(k=-1), "k=-1 does not fit"),
        ("vit", PartialK(k=0.3), "k=0.3 does not fit"),
        ("gpt2", PartialK(k=0), "k=0 trains the head alone, and GPT2LMHeadModel has none"),
        ("vit", PartialK(blocks="vit.layer"), r"blocks='vit.layer' is no list of blocks .*vit\.layers"),
        ("resnet", PartialK(k=0.5), "has no half"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, method: PartialK, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        method.apply(tiny(kind))


def test_a_backbone_without_blocks_is_refused() -> None:
    with pytest.raises(TuningError, match="has no list of blocks"):
        PartialK().apply(nn.Sequential(nn.Linear(2, 2)))
