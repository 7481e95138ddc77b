"""VPT: hooks against loops written out by hand, the counts of the authors' logs, Swin against its own attention."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import window_partition, window_reverse

from lightning_peft import VPT, TuningError, collect
from lightning_peft.methods.vpt import initial_bound
from lightning_peft.towers.vision import tower
from tests.contract import MethodContract, assert_near, copy_of, output, shake
from tests.models import HEADS, HIDDEN, IMAGES, batch, meta, tiny

P = 3


class TestVPT(MethodContract):
    method = VPT(num_virtual_tokens=P)
    backbones = ("vit", "dinov2_registers", "siglip_image", "swin")
    on_families = (("vpt", VPT(num_virtual_tokens=2, dropout=0.0)),)
    traces_backward = True
    compiled = ("vit", "swin")
    identity_at_start = False

    def count(self, kind: str) -> int:
        """P for each block, of the width that its stage has."""
        return P * (2 * HIDDEN // 2 + 2 * HIDDEN if kind == "swin" else 2 * HIDDEN)


class TestShallowVPT(MethodContract):
    method = VPT(num_virtual_tokens=P, deep=False, pool="mean")
    backbones = ("deit", "clip_image", "swin")
    compiled = ("swin",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """P in all."""
        return P * (HIDDEN // 2 if kind == "swin" else HIDDEN)


def applied(kind: str, **arguments: object) -> tuple[nn.Module, VPT]:
    model, method = tiny(kind), VPT(num_virtual_tokens=P, **arguments)
    method.apply(model)
    return model, method


def loop(kind: str, model: nn.Module, pixels: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """Return the logits of a plain model whose blocks of these numbers see these prompts."""
    found = tower(model)
    n, x, here = found.prefix, found.embeddings(pixels), 0

    def joined(x: Tensor, rows: Tensor, here: int) -> Tensor:
        return torch.cat((x[:, :n], rows.expand(len(x), -1, -1), x[:, n + here :]), dim=1)

    if 0 in prompts:
        x, here = joined(x, prompts[0], here), P
    if kind == "clip_image":
        x = found.module.pre_layrnorm(x)
    for i, block in enumerate(found.blocks):
        if i > 0 and i in prompts:
            x, here = joined(x, prompts[i], here), P
        x = block(x, None)
    x = torch.cat((x[:, :n], x[:, n + here :]), dim=1)
    if kind == "clip_image":
        return model.classifier(x[:, 1:].mean(1))
    if kind == "siglip_image":
        return model.classifier(found.module.post_layernorm(x).mean(1))
    x = found.module.layernorm(x)
    if kind.startswith("dinov2"):
        return model.classifier(torch.cat((x[:, 0], x[:, found.prefix :].mean(1)), dim=1))
    return model.classifier(x[:, 0])


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        ({"deep": False}, [0]),
        ({}, [0, 1]),
        ({"num_deep_layers": 1}, [0]),
        ({"num_deep_layers": 1, "deep_from": "top"}, [1]),
    ],
    ids=["shallow", "deep", "bottom", "top"],
)
@pytest.mark.parametrize("kind", [kind for kind in IMAGES if kind != "swin"])
def test_hooks_are_the_loop(kind: str, arguments: dict, blocks: list[int]) -> None:
    model, method = applied(kind, **arguments)
    plain = tiny(kind)
    prompts = dict(zip(blocks, [p.detach() for p in method.prompts(model)], strict=True))
    with torch.no_grad():
        expected = loop(kind, plain, batch(kind)["pixel_values"], prompts)
        unprompted = loop(kind, plain, batch(kind)["pixel_values"], {})
    assert_near({"": expected}, {"": output(model, kind)}, 1e-5)
    assert_near({"": unprompted}, {"": output(plain, kind)}, 1e-5)
    assert not torch.allclose(expected, unprompted, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "classes", "deep", "trained"),
    [
        (100, 6, True, 926_214),
        (100, 10, True, 929_290),
        (5, 397, True, 351_373),
        (5, 10, False, 11_530),
        (5, 10, True, 53_770),
    ],
    ids=["DMLab", "EuroSAT", "SUN397", "shallow", "deep"],
)
def test_counts_of_the_authors(count: int, classes: int, deep: bool, trained: int) -> None:
    model = meta(hf.ViTConfig(num_labels=classes), hf.AutoModelForImageClassification)
    VPT(num_virtual_tokens=count, deep=deep).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.parameters()) - trained == 85_798_656


def test_count_of_swin() -> None:
    config = hf.SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
    model = meta(config)
    VPT(num_virtual_tokens=50).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 601_600


def test_count_with_a_projection() -> None:
    model, method = applied("vit", projection=8)
    assert sum(p.numel() for p in collect(model).values()) == 2 * P * 8 + 8 * HIDDEN + HIDDEN + HEADS["vit"]
    assert [tuple(p.shape) for p in method.prompts(model)] == [(P, 8)] * 2
    model(**batch("vit")).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (hf.ViTConfig(), 0.0625),
        (hf.ViTConfig(hidden_size=1024, num_attention_heads=16), 0.05786),
        (hf.ViTConfig(hidden_size=1280, num_attention_heads=16, patch_size=14), 0.05667),
        (hf.ViTConfig(patch_size=32), 0.03953),
        (hf.SwinConfig(embed_dim=128, num_heads=[4, 8, 16, 32]), 0.18464),
    ],
    ids=["B/16", "L/16", "H/14", "B/32", "Swin-B"],
)
def test_initial_values(config: hf.PreTrainedConfig, bound: float) -> None:
    assert initial_bound(tower(meta(config))) == pytest.approx(bound, abs=5e-6)
    if bound == 0.0625:
        assert initial_bound(tower(meta(config))) == bound


def test_initial_values_fill_their_range() -> None:
    model, method = tiny("vit"), VPT(num_virtual_tokens=200)
    method.apply(model)
    bound = initial_bound(tower(model))
    for rows in method.prompts(model):
        assert 0.98 * bound < rows.abs().max() <= bound
        assert abs(rows.mean()) < 0.05 * bound


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("arguments", [{}, {"num_deep_layers": 1, "deep_from": "top"}], ids=["deep", "top"])
def test_prompts_become_keys_and_values(kind: str, arguments: dict) -> None:
    model, method = applied(kind, **arguments)
    shake(model)
    before, plain = output(model, kind), output(tiny(kind), kind)
    method.to_key_values(model)
    assert_near({"": before}, {"": output(model, kind)}, 1e-5)
    assert not torch.allclose(before, plain, atol=1e-3)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "vpt" in name)
    method.remove(model)
    classifier = copy_of(tiny(kind).classifier.state_dict())
    model.classifier.load_state_dict(classifier)
    assert torch.equal(output(model, kind), plain)


@pytest.mark.parametrize("arguments", [{"deep": False}, {"num_deep_layers": 1}], ids=["shallow", "bottom"])
def test_prompts_whose_outputs_go_on_do_not(arguments: dict) -> None:
    model, method = applied("vit", **arguments)
    before = output(model, "vit")
    with pytest.raises(TuningError, match="go on to the next block"):
        method.to_key_values(model)
    assert torch.equal(output(model, "vit"), before)
    method.remove(model)
    with pytest.raises(TuningError, match="is not applied"):
        method.to_key_values(model)


def test_their_order_does_not_matter() -> None:
    model, method = applied("vit")
    before = output(model, "vit")
    with torch.no_grad():
        rows = method.prompts(model)[1]
        rows.copy_(rows.flip(0))
    assert_near({"": before}, {"": output(model, "vit")}, 1e-5)


def test_shapes_inside_and_outside() -> None:
    model, _ = applied("vit")
    model.set_attn_implementation("eager")
    out = model.vit(batch("vit")["pixel_values"], output_attentions=True)
    assert out.last_hidden_state.shape == (4, 1 + 16, HIDDEN)
    assert [a.shape for a in out.attentions] == [(4, 4, 1 + P + 16, 1 + P + 16)] * 2


def test_clip_with_text_is_tuned_on_its_image_side() -> None:
    sides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = sides | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.CLIPConfig(
        text_config=text, vision_config=sides | {"image_size": 16, "patch_size": 4}, projection_dim=32
    )
    model = hf.CLIPModel(config).eval()
    VPT(num_virtual_tokens=P).apply(model)
    assert [p.numel() for p in collect(model).values()] == [P * 32] * 2
    assert all(name.startswith("vision_model.") for name in collect(model))
    ids = torch.tensor([[1, 7, 2], [1, 9, 2]])
    model(input_ids=ids, pixel_values=batch("vit")["pixel_values"]).logits_per_image.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["vit", "clip_image", "dinov2", "swin"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling(kind: str, pool: str) -> None:
    if pool == "cls" and kind == "swin":
        with pytest.raises(TuningError, match=r"pool='cls', but SwinForImageClassification has no \[CLS\] token"):
            applied(kind, pool=pool)
        return
    model, _ = applied(kind, pool=pool)
    plain, same = tiny(kind), VPT(num_virtual_tokens=P)
    same.apply(plain)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        base = next(m for m in plain.children() if isinstance(m, hf.PreTrainedModel))
        x = base(batch(kind)["pixel_values"]).last_hidden_state
        pooled = x[:, 0] if pool == "cls" else x[:, tower(plain).prefix :].mean(1)
        double = kind == "dinov2"
        expected = plain.classifier(torch.cat((pooled, pooled), 1) if double else pooled)
    assert_near({"": expected}, {"": output(model, kind)}, 1e-5)


def swin_loop(model: nn.Module, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
    """Return the logits of a Swin whose windows are attended to one image and one window at a time."""
    x, (height, width) = model.swin.embeddings(pixels)
    prompts = list(prompts)
    for stage in model.swin.encoder.layers:
        for block in stage.blocks:
            rows = prompts.pop(0)
            size, shift, attention = block.window_size, block.shift_size, block.attention
            inner = block.layernorm_before(x).view(len(x), height, width, -1)
            inner = window_partition(torch.roll(inner, (-shift, -shift), (1, 2)), size)
            windows = inner.view(len(x), -1, size * size, inner.shape[-1])
            mask = block.get_attn_mask(height, width, x.dtype, x.device)
            bias = attention.relative_position_bias()[0]
            out = torch.empty_like(windows)
            for image in range(windows.shape[0]):
                for window in range(windows.shape[1]):
                    tokens = windows[image, window]
                    keys = torch.cat((block.layernorm_before(rows), tokens))

                    def heads(linear: nn.Linear, t: Tensor, attention: nn.Module = attention) -> Tensor:
                        return linear(t).view(len(t), -1, attention.head_dim).transpose(0, 1)

                    q, k, v = (
                        heads(attention.q_proj, tokens),
                        heads(attention.k_proj, keys),
                        heads(attention.v_proj, keys),
                    )
                    scores = q @ k.transpose(1, 2) * attention.scaling
                    scores[:, :, P:] += bias + (mask[window] if mask is not None else 0)
                    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(tokens), -1)
                    out[image, window] = attention.o_proj(mixed)
            merged = window_reverse(out.view(-1, size, size, out.shape[-1]), size, height, width)
            x = x + torch.roll(merged, (shift, shift), (1, 2)).reshape(x.shape)
            x = x + block.mlp(block.layernorm_after(x))
        if stage.downsample is not None:
            x = stage.downsample(x, (height, width))
            height, width = height // 2, width // 2
    return model.classifier(model.swin.layernorm(x).mean(1))


def test_swin_is_windows_one_by_one() -> None:
    model, method = applied("swin")
    shake(model, 0.5)
    plain = tiny("swin")
    plain.classifier.load_state_dict(model.classifier.state_dict())
    assert any(block.shift_size > 0 for block in tower(plain).blocks)
    with torch.no_grad():
        expected = swin_loop(plain, batch("swin")["pixel_values"], method.prompts(model))
    assert_near({"": expected}, {"": output(model, "swin")}, 1e-5)


@pytest.mark.parametrize("arguments", [{"deep": False}, {}, {"num_deep_layers": 3}], ids=["shallow", "deep", "bottom"])
def test_in_swin_an_image_knows_no_other(arguments: dict) -> None:
    model, _ = applied("swin", **arguments)
    shake(model, 0.5)
    pixels = batch("swin")["pixel_values"]
    other = pixels.clone()
    other[1:] += 3
    with torch.no_grad():
        assert_near({"": model(pixels).logits[:1]}, {"": model(other).logits[:1]}, 1e-5)
        assert_near({"": model(pixels).logits[:1]}, {"": model(pixels[:1]).logits}, 1e-5)


def test_in_swin_prompts_go_on_through_merging() -> None:
    """The shallow prompt of the first block moves the last one; without averaging it would not reach it."""
    model, method = applied("swin", deep=False)
    seen: list[Tensor] = []
    last = tower(model).blocks[-1]
    last.attention.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(batch("swin")["pixel_values"])
    (grad,) = torch.autograd.grad(seen[0].sum(), method.prompts(model))
    assert grad.any()


def test_dropout_differs_by_image() -> None:
    model, _ = applied("vit", dropout=0.5)
    image = batch("vit")["pixel_values"][:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        first, *others = model(image).logits
        for other in others:  # rows of a batch are equal but for rounding
            assert_near({"": first}, {"": other}, 1e-5)
        model.vit.embeddings.vpt.train()
        logits = model(image).logits
    assert torch.pdist(logits).min() > 0.01


def test_the_papers_dropout_is_the_default() -> None:
    assert VPT()._dropout == 0.1
    assert VPT(deep=False)._dropout == 0.0
    assert VPT(dropout=0.0)._dropout == 0.0


def test_images_of_another_size() -> None:
    model, _ = applied("vit")
    larger = F.interpolate(batch("vit")["pixel_values"], size=(24, 24))
    assert model(larger, interpolate_pos_encoding=True).logits.shape == (4, 3)


def test_two_copies_are_apart() -> None:
    model, method = applied("vit")
    other = copy.deepcopy(model)
    with torch.no_grad():
        method.prompts(other)[0].add_(1)
    assert not torch.equal(output(model, "vit"), output(other, "vit"))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("vit", {"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no prompt"),
        ("vit", {"num_deep_layers": 3}, "num_deep_layers=3, but ViTForImageClassification has 2 blocks: take 1 to 2"),
        ("vit", {"deep": False, "num_deep_layers": 1}, "deep=False has prompts in the input alone"),
        ("vit", {"deep_from": "middle"}, "deep_from='middle' is no end"),
        ("vit", {"dropout": 1.0}, r"dropout=1.0 is no share"),
        ("vit", {"projection": 0}, "projection=0 is no width"),
        ("vit", {"pool": "max"}, "pool='max' is no pooling"),
        ("siglip_image", {"pool": "cls"}, r"pool='cls', but SiglipForImageClassification has no \[CLS\] token"),
        ("swin", {"projection": 8}, "have several widths"),
        ("bert", {}, "BertForSequenceClassification has no vision transformer"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, arguments: dict, message: str) -> None:
    model = tiny(kind)
    keys = list(model.state_dict())
    with pytest.raises(TuningError, match=message):
        VPT(**arguments).apply(model)
    assert list(model.state_dict()) == keys


def test_pooling_without_a_head_is_refused() -> None:
    with pytest.raises(TuningError, match="pool='mean' is for a task head, and ViTModel has none"):
        VPT(pool="mean").apply(tiny("vit").vit)


def test_a_convolutional_model_is_refused() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with pytest.raises(TuningError, match="has no vision transformer"):
        VPT().apply(hf.ResNetForImageClassification(config))
