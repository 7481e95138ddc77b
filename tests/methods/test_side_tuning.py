"""SideTuning: a small network beside the frozen one."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import BitFit, SideTuning, TuningError, collect, merge
from lightning_peft.core.graft import grafts
from lightning_peft.features.narrow import narrow
from lightning_peft.methods.side_tuning import Side
from tests.contract import MethodContract, output
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer


class Conv(nn.Module):
    """A side network of the user's own: one vector for an image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Linear(4, width)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(image)).relu().mean((2, 3)))


class Bag(nn.Module):
    """A side network of the user's own: a vector for each token, and a field that models do not have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(100, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table(input_ids) * attention_mask[..., None]


CONV = f"{__name__}.Conv"


class TestSideTuning(MethodContract):
    method = SideTuning(side_layers=1)
    backbones = ("bert", "distilbert", "gpt2", "llama", "vit")
    traces_backward = True
    identity_at_start = False
    compiled = ("bert", "vit")

    def count(self, kind: str) -> int:
        """A copy of a quarter of the width with one block, a projection to the full width, and one number."""
        w, ff = 8, 16
        block = 4 * (w * w + w) + 2 * w * ff + w + ff + 4 * w
        words, positions, norm = 100 * w, 64 * w, 2 * w
        return (
            {
                "bert": words + positions + 2 * w + norm + block + w * w + w,  # token types, pooler
                "distilbert": words + positions + norm + block,
                "gpt2": words + positions + norm + block + 2 * w * (4 * w - ff) + 4 * w - ff,  # ff is 4 w there
                "llama": words + 4 * w * w + 3 * w * ff + 2 * w + w,
                "vit": 3 * 16 * w + w + w + 17 * w + norm + block,  # patches, [CLS], positions
            }[kind]
            + w * 32
            + 1
        )


def side_of(model: nn.Module) -> Side:
    (graft,) = (place.graft for place in grafts(model) if isinstance(place.graft, Side))
    return graft


def features(model: nn.Module, alpha: float) -> Tensor:
    side_of(model).alpha.data.fill_(alpha)
    with torch.no_grad():
        return model.vit(batch("vit")["pixel_values"]).last_hidden_state


def test_the_blend() -> None:
    """The mean at a = 0, the backbone at +30, the side network at -30."""
    model, pixels = tiny("vit"), batch("vit")["pixel_values"]
    with torch.no_grad():
        base = model.vit(pixels).last_hidden_state
        SideTuning().apply(model)
        graft = side_of(model)
        side = graft.projection(graft.network(pixels).last_hidden_state)
    assert torch.allclose(features(model, 0.0), (base + side) / 2, atol=1e-6)
    assert torch.allclose(features(model, 30.0), base, atol=1e-6)
    assert torch.allclose(features(model, -30.0), side, atol=1e-6)
    assert SideTuning().alpha(model) == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_alpha() -> None:
    """A quarter of sum g (B - S) at a = 0, g being the gradient of the blend."""
    model, pixels = tiny("vit"), batch("vit")["pixel_values"]
    with torch.no_grad():
        base = model.vit(pixels).last_hidden_state
    SideTuning().apply(model)
    graft = side_of(model)
    out = model.vit(pixels).last_hidden_state
    g = torch.randn_like(out)
    (out * g).sum().backward()
    side = graft.projection(graft.network(pixels).last_hidden_state)
    assert torch.allclose(graft.alpha.grad, 0.25 * (g * (base - side)).sum(), rtol=1e-4)


def test_no_graph_in_the_backbone() -> None:
    model = tiny("vit")
    SideTuning().apply(model)
    seen: list[Tensor] = []
    for block in model.vit.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    model(**batch("vit")).loss.backward()
    assert not any(out.requires_grad for out in seen)


def test_alpha_is_one_number_without_weight_decay(tmp_path: Path) -> None:
    class Decaying(Tuned):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), weight_decay=0.1)

    module, method = Decaying("vit"), SideTuning()
    run = trainer(tmp_path, method)
    run.fit(module, loader("vit"), loader("vit"))
    graft = side_of(module)
    assert graft.alpha.shape == (1,)
    decays = {id(p): group["weight_decay"] for group in run.optimizers[0].param_groups for p in group["params"]}
    assert decays.pop(id(graft.alpha)) == 0
    assert set(decays.values()) == {0.1}
    assert run.callback_metrics["side_alpha"] == pytest.approx(method.alpha(module))
    assert method.alpha(module) != 0.5


def test_the_head_of_bert_reads_the_pooler() -> None:
    model = tiny("bert")
    SideTuning().apply(model)
    assert side_of(model).blend == "pooler_output"
    model = tiny("bert").bert
    SideTuning().apply(model)
    assert side_of(model).blend == "last_hidden_state"


def test_a_network_of_ones_own_for_images(tmp_path: Path) -> None:
    """Its BatchNorm learns, and the statistics are saved."""
    module = Tuned("vit")
    method = SideTuning(side=CONV, blend="first_token")
    trainer(tmp_path, method).fit(module, loader("vit"), loader("vit"))
    delta = collect(module)
    assert any(name.endswith("network.norm.running_mean") and tensor.any() for name, tensor in delta.items())
    pixels = batch("vit")["pixel_values"]
    module.eval()
    with torch.no_grad():
        blend = module.model.vit(pixels).last_hidden_state
        graft = side_of(module)
        base = tiny("vit").vit(pixels).last_hidden_state
        share = graft.alpha.sigmoid()
        assert torch.allclose(blend[:, 0], share * base[:, 0] + (1 - share) * graft.network(pixels), atol=1e-5)
        assert torch.equal(blend[:, 1:], base[:, 1:])


def test_a_network_of_ones_own_for_texts() -> None:
    model = tiny("distilbert")
    SideTuning(side=f"{__name__}.Bag", side_args={"width": 32}).apply(model)
    model(**batch("distilbert")).loss.backward()
    assert side_of(model).network.table.weight.grad.any()


def test_a_narrow_copy_of_a_convolutional_network() -> None:
    model = tiny("resnet")
    SideTuning(reduction=2).apply(model)
    graft = side_of(model)
    assert graft.network.config.hidden_sizes == [8, 16]
    model(**batch("resnet")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_half_precision_backbone_has_a_side_network_of_full_precision() -> None:
    model = tiny("distilbert").bfloat16()
    SideTuning().apply(model)
    assert {p.dtype for p in side_of(model).parameters()} == {torch.float32}
    assert output(model, "distilbert").dtype is torch.bfloat16


def test_generation_is_without_a_cache() -> None:
    model = tiny("gpt2")
    SideTuning().apply(model)
    ids = batch("gpt2")["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(TuningError, match="use_cache=False"):
        model.generate(ids, **options)
    out = model.generate(ids, use_cache=False, **options)
    again = ids
    for _ in range(3):
        again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("vit", SideTuning(side="torch.nn.Nothing"), "cannot be imported"),
        ("vit", SideTuning(side="json.dumps"), "no path of an nn.Module class"),
        ("vit", SideTuning(side=CONV, side_args={"w": 1}), "does not take side_args"),
        ("vit", SideTuning(blend="mean"), "blend='mean' is no output"),
        ("vit", SideTuning(reduction=0), "reduction=0"),
        ("vit", SideTuning(side_layers=99), r"side_layers=99 \(it has 2 blocks\): choose others"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, method: SideTuning, message: str) -> None:
    model = tiny(kind)
    with pytest.raises(TuningError, match=message):
        method.apply(model)
    assert not list(grafts(model))


def test_a_model_of_several_is_refused_and_an_encoder_decoder_has_it_beside_its_encoder() -> None:
    with torch.device("meta"):
        model = hf.Blip2ForConditionalGeneration(hf.Blip2Config())
    with pytest.raises(TuningError, match=r"no base model of its own .*: take another model, or LoRA"):
        SideTuning().apply(model)
    t5 = tiny("t5")
    SideTuning(reduction=2).apply(t5)
    (place,) = grafts(t5)
    assert place.host is t5.encoder
    t5(**batch("t5")).loss.backward()
    assert all(p.grad is not None for p in t5.parameters() if p.requires_grad)


def test_a_model_of_text_and_images_has_a_narrow_copy_of_both() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = hf.LlamaConfig(**sizes, vocab_size=60, num_key_value_heads=2)
    config = hf.LlavaConfig(text_config=text, vision_config=hf.CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    network, widths = narrow(hf.LlavaModel(config), 2, None, pooled=False)
    assert widths == (8, 16)
    assert network.config.text_config.hidden_size == network.config.vision_config.hidden_size == 8
    assert network.config.text_config.intermediate_size == 16


def test_what_is_not_the_last_output_is_read_from_the_encoder() -> None:
    config = hf.ProphetNetConfig(
        vocab_size=60, hidden_size=16, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=2,
        num_decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    model = hf.ProphetNetForConditionalGeneration(config).eval()
    ids = torch.arange(3, 11).view(1, -1)
    before = model(input_ids=ids, labels=ids).logits
    SideTuning(reduction=2).apply(model)
    assert not torch.allclose(model(input_ids=ids, labels=ids).logits, before, atol=1e-4)


def test_a_transformer_in_stages_has_a_narrow_copy() -> None:
    model = tiny("swin")
    SideTuning(reduction=2).apply(model)
    network = model.swin.sidetuning.network
    assert network.config.hidden_size * 2 == model.config.hidden_size
    assert network.config.num_heads == [max(1, heads // 2) for heads in model.config.num_heads]


@pytest.mark.parametrize(
    "method", [SideTuning(side=CONV), SideTuning(side=CONV, side_args={"width": 7}, blend="first_token")]
)
def test_another_shape_is_refused(method: SideTuning) -> None:
    model = tiny("vit")
    method.apply(model)
    with pytest.raises(TuningError, match=r"gives \[4, (32|7)\] where the .* is \[4, (17, )?32\]"):
        output(model, "vit")


def test_an_output_that_is_not_there_is_refused() -> None:
    model = tiny("vit")
    SideTuning(blend="pooler_output", side=CONV).apply(model)
    with pytest.raises(TuningError, match="gives no pooler_output"):
        output(model, "vit")


def test_it_cannot_be_merged_and_trains_nothing_below() -> None:
    model = tiny("vit")
    SideTuning().apply(model)
    with pytest.raises(TuningError, match="computes what no weight can"):
        merge(model)
    with pytest.raises(TuningError, match="is not applied"):
        SideTuning().alpha(tiny("vit"))


def test_what_lies_below_would_get_no_gradient(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="gradient"):
        trainer(tmp_path, SideTuning(), BitFit()).fit(Tuned("vit"), loader("vit"), loader("vit"))
