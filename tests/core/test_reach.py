"""What no output of a model depends on, and that methods which train all of a kind leave it out."""

import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import nn

from lightning_peft import (
    OFT,
    Adapter,
    BitFit,
    DiffPruning,
    LadderSideTuning,
    LoRA,
    LoReFT,
    PartialK,
    PTuningV2,
    SideTuning,
    TuningError,
)
from lightning_peft.core import reach
from tests.families.builders import WIDTH, classes, image
from tests.models import tiny

TEXT = {
    "vocab_size": 60, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
IMAGE = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def big_bird() -> nn.Module:
    return hf.BigBirdForSequenceClassification(hf.BigBirdConfig(**TEXT, attention_type="original_full")).eval()


def canine() -> nn.Module:
    config = hf.CanineConfig(**TEXT, num_hash_buckets=64, local_transformer_stride=8, downsampling_rate=4)
    return hf.CanineForSequenceClassification(config).eval()


def llava() -> nn.Module:
    words = {**TEXT, "num_key_value_heads": 1}
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**IMAGE), text_config=hf.LlamaConfig(**words))
    return hf.LlavaForConditionalGeneration(config).eval()


def without_gradient(model: nn.Module) -> set[str]:
    batch = classes() | {"input_ids": classes()["input_ids"].repeat(1, 2)}
    model(**batch).loss.backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def siglip() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a classifier that does not read the pooling head of its tower, and images as rows of patches."""
    vision = {**IMAGE, "num_patches": 16}
    config = hf.Siglip2Config(vision_config=vision, text_config=TEXT, num_labels=3)
    model = hf.Siglip2ForImageClassification(config).eval()
    return model, {
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2), "labels": torch.tensor([0, 1]),
    }  # fmt: skip


def layout() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a model whose biases by position are computed without gradients."""
    sizes = {"max_2d_position_embeddings": 16, "coordinate_size": 3, "shape_size": 2, "input_size": 16, "patch_size": 8}
    return hf.LayoutLMv3ForSequenceClassification(hf.LayoutLMv3Config(**TEXT, **sizes)).eval(), image() | classes()


ASKS_FOR_NUMBERS = Version(hf.__version__) < Version("5.24")
"""transformers' SigLIP 2 has asked for the numbers of the shapes, so that of it nothing is known."""


@pytest.mark.parametrize("build", [layout] if ASKS_FOR_NUMBERS else [siglip, layout])
def test_it_is_so_where_a_model_takes_other_inputs(build: object) -> None:
    model, batch = build()
    found = reach.unreached(model)
    model(**batch).loss.backward()
    assert found == {name for name, p in model.named_parameters() if p.grad is None} != set()


class Shared(hf.PreTrainedModel):
    """Two blocks with the same weights, each of which calls a layer of its own of the two that both have."""

    config_class = hf.BertConfig

    def __init__(self, config: hf.BertConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))
        for own, first in zip(self.blocks[1], self.blocks[0], strict=True):
            own.weight, own.bias = first.weight, first.bias
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            x = block[i](x)
        return x


def test_a_layer_that_is_not_called_is_none_to_hang_on_though_its_weights_are_used_elsewhere() -> None:
    model = Shared(hf.BertConfig())
    assert reach.unreached(model) == set()
    assert reach.reached(model, ["blocks.0.0", "blocks.0.1", "blocks.1.1"]) == ["blocks.0.0", "blocks.1.1"]
    assert reach.reached(model, ["blocks.0.1.bias"]) == ["blocks.0.1.bias"]


def test_lora_leaves_projections_that_no_output_depends_on() -> None:
    """MRA attends by a kernel for GPUs, without which it gives zeros."""
    model = hf.MraForSequenceClassification(hf.MraConfig(**TEXT)).eval()
    LoRA(r=2).apply(model)
    assert without_gradient(model) == set()
    assert "lora" in dict(model.mra.encoder.layer[0].intermediate.dense.named_children())


@pytest.mark.parametrize("build", [big_bird, canine])
def test_it_is_what_a_loss_gives_no_gradient(build: object) -> None:
    model = build()
    training = {name: module.training for name, module in model.named_modules()}
    found = reach.unreached(model)
    assert found == without_gradient(model) != set()
    assert training == {name: module.training for name, module in model.named_modules()}


def test_the_last_block_of_a_tower_whose_features_are_of_the_one_before() -> None:
    model = llava()
    found = reach.unreached(model)
    assert any(name.startswith("model.vision_tower.encoder.layers.1.") for name in found)
    assert not any("layers.0." in name or "projector" in name or "language_model" in name for name in found)


def test_of_a_tower_whose_images_are_unknown_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach.structure, "gives_image_features", lambda model: False)
    monkeypatch.setattr(hf.LlavaModel, "get_image_features", None)
    assert reach.unreached(llava()) == set()


def test_a_plain_module_and_a_base_model_have_none() -> None:
    assert reach.unreached(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == set()
    assert reach.unreached(tiny("bert").base_model) == set()


@pytest.mark.parametrize("method", [
    BitFit(), DiffPruning(), PartialK(), Adapter(bottleneck=2), LoRA(r=2), LoRA(r=2, target_modules="all-linear"),
    PTuningV2(num_virtual_tokens=2), OFT(block_size=4), LoReFT(r=2, exclude=r"canine\.encoder\..*"),
])  # fmt: skip
def test_a_method_of_all_trains_what_a_loss_depends_on(method: object) -> None:
    model = canine()
    method.apply(model)
    assert without_gradient(model) == set()
    method.remove(model)


def test_what_is_named_is_trained() -> None:
    model = big_bird()
    BitFit(biases="pooler").apply(model)
    assert model.bert.pooler.bias.requires_grad
    LoRA(r=2, target_modules=["pooler"]).apply(model)
    assert "lora" in dict(model.bert.pooler.named_children())


def test_a_tuned_model_is_run_as_it_was_untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = canine()
    before = reach.unreached(model)
    Adapter(bottleneck=2).apply(model)
    monkeypatch.setattr(reach, "_KNOWN", {})
    assert reach.unreached(model) == before


def test_a_model_is_run_once_as_long_as_it_has_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = big_bird()
    before = reach.unreached(model)
    monkeypatch.setattr(reach, "_by_a_run", lambda *_: reach._Reach(frozenset({"another"})))
    BitFit().apply(model)
    assert reach.unreached(model) == before
    model.dropout = nn.Sequential(nn.Identity())
    assert reach.unreached(model) == {"another"}


def test_a_run_leaves_no_hooks() -> None:
    model = hf.ViTModel(hf.ViTConfig(**IMAGE)).eval()
    assert reach.unreached(model) == set()
    called = []
    model.layernorm.register_forward_hook(lambda *_: called.append(1))
    assert reach._by_a_run(model, dict(model.named_modules())) == reach._Reach()
    assert called == []
    pixels = image()["pixel_values"]
    assert len(model(pixels, output_hidden_states=True).hidden_states) == 3


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def dpt() -> nn.Module:
    config = hf.DPTConfig(
        **IMAGE | {"num_hidden_layers": 4}, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8,
        neck_hidden_sizes=[4, 4, 8, 8], reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return hf.DPTForDepthEstimation(config)


@pytest.mark.parametrize(
    ("build", "method"), [(segformer, SideTuning(reduction=2)), (dpt, LadderSideTuning(reduction=2))]
)
def test_a_side_network_in_an_output_that_is_not_read_is_refused(build: object, method: object) -> None:
    model = build()
    state = list(model.state_dict())
    with pytest.raises(TuningError, match="does not read the output"):
        method.apply(model)
    assert list(model.state_dict()) == state
    LoRA(r=2).apply(model)
    with torch.no_grad():
        model(pixel_values=image(64 if build is segformer else 16)["pixel_values"])
