"""VPT where tokens are read between the blocks (DPT), and where an image is a row of patches (SigLIP 2)."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import VPT, TuningError
from tests.contract import shake

IMAGE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
P = 3


def maps() -> nn.Module:
    return hf.Dinov2Backbone(hf.Dinov2Config(**IMAGE, out_features=["stage1", "stage2"])).eval()


def depth() -> nn.Module:
    sizes = {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8}
    return hf.DPTForDepthEstimation(hf.DPTConfig(**IMAGE, **sizes, reassemble_factors=[1, 1])).eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def first(out: Any) -> Tensor:
    return out[0][-1] if isinstance(out[0], tuple) else out[0]


@pytest.mark.parametrize("build", [maps, depth])
def test_deep_prompts_are_not_among_the_tokens_between_the_blocks(build: object) -> None:
    """They are not, though transformers notes hidden states from a first run on, before the prompts were there."""
    model, x = build(), pixels()
    with torch.no_grad():
        before = first(model(x))
    method = VPT(num_virtual_tokens=P, dropout=0.0)
    method.apply(model)
    shake(model, 0.5)
    after = first(model(x))
    assert after.shape == before.shape
    after.square().mean().backward()
    assert all(bool(prompt.grad.abs().sum()) for prompt in method.prompts(model))
    assert not torch.allclose(after, before, atol=1e-4)
    method.remove(model)
    with torch.no_grad():
        assert torch.equal(first(model(x)), before)


def test_prompts_aside_give_what_those_among_the_tokens_give() -> None:
    """The maps of a backbone are the hidden states of the model that it is."""
    x, backbone = pixels(), maps()
    model = hf.Dinov2Model(backbone.config).eval()
    model.load_state_dict(backbone.state_dict())
    methods = [VPT(num_virtual_tokens=P, dropout=0.0), VPT(num_virtual_tokens=P, dropout=0.0)]
    for method, each in zip(methods, (model, backbone), strict=True):
        method.apply(each)
    with torch.no_grad():
        for one, other in zip(methods[0].prompts(model), methods[1].prompts(backbone), strict=True):
            other.copy_(one.normal_())
        expected = model(x).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(backbone(x).feature_maps[-1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("build", "message"), [
    (maps, "prompts would be among them: take deep=True in all blocks"), (depth, "take deep=True in all blocks"),
])  # fmt: skip
def test_prompts_that_go_on_are_refused_and_the_remedy_holds(build: object, message: str) -> None:
    model = build()
    with pytest.raises(TuningError, match=message):
        VPT(num_virtual_tokens=P, deep=False).apply(model)
    VPT(num_virtual_tokens=P).apply(model)


def siglip() -> nn.Module:
    vision = {**IMAGE, "num_patches": 16}
    text = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Siglip2Config(vision_config=vision, text_config=text, num_labels=3)
    return hf.Siglip2ForImageClassification(config).eval()


def patches(padding: int) -> dict[str, Tensor]:
    """Return images of 2 x 3 patches, with so many patches of noise behind them that a mask leaves out."""
    values = torch.randn(2, 9, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))[:, : 6 + padding]
    mask = torch.arange(6 + padding).lt(6).long().expand(2, -1)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[2, 3]] * 2)}


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_among_rows_of_patches_are_seen_and_what_a_mask_hides_is_not(deep: bool) -> None:
    model = siglip()
    with torch.no_grad():
        before = model(**patches(0)).logits
    method = VPT(num_virtual_tokens=P, dropout=0.0, deep=deep)
    method.apply(model)
    shake(model, 0.5)
    logits = model(**patches(3)).logits
    torch.testing.assert_close(logits, model(**patches(0)).logits, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    assert all(bool(prompt.grad.abs().sum()) for prompt in method.prompts(model))
    assert not torch.allclose(logits, before, atol=1e-3)
    method.remove(model)
    with torch.no_grad():
        assert torch.equal(model(**patches(0)).logits, before)


def test_prompts_become_keys_and_values_among_rows_of_patches() -> None:
    model = siglip()
    method = VPT(num_virtual_tokens=P, dropout=0.0)
    method.apply(model)
    shake(model, 0.5)
    with torch.no_grad():
        live = model(**patches(3)).logits
        method.to_key_values(model)
        torch.testing.assert_close(model(**patches(3)).logits, live, atol=1e-5, rtol=1e-5)


def test_the_mean_over_patches_is_refused_where_some_are_padding() -> None:
    with pytest.raises(TuningError, match="pool='mean' is for a transformers classifier of images"):
        VPT(pool="mean").apply(siglip())
