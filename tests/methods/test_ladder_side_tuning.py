"""LadderSideTuning: a narrow transformer that reads the blocks of the frozen one."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LadderSideTuning, LoRA, TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.features.activation_memory import Kept
from lightning_peft.methods.ladder_side_tuning import Ladder
from tests.contract import MethodContract, assert_near, count_calls, gradients, output, shake
from tests.models import batch, tiny

D, W = 32, 8


def ladder_of(model: nn.Module) -> Ladder:
    (graft,) = (place.graft for place in grafts(model) if isinstance(place.graft, Ladder))
    return graft


class TestLadderSideTuning(MethodContract):
    method = LadderSideTuning(reduction=4)
    backbones = ("bert", "distilbert", "gpt2", "llama", "vit")
    compiled = ("bert", "gpt2")

    def count(self, kind: str) -> int:
        """L + 1 projections down, one up, L narrow blocks with four times the width inside, L gates and a norm."""
        block = 4 * (W * W + W) + 2 * W * 4 * W + 4 * W + W + 4 * W
        return 4 * D * W + 2 * block + 2 + 2 * W

    def test_gradient_checkpointing_gives_the_same_gradients(self, kind: str) -> None:
        """There is no graph in the blocks, so nothing is computed twice."""
        model = tiny(kind)
        method = self.applied(model)
        shake(model)
        model.train()
        plain, once = count_calls(model, lambda: gradients(model, kind, method))
        model.activation_checkpointing_enable({"use_reentrant": False})
        checkpointed, more = count_calls(model, lambda: gradients(model, kind, method))
        assert more == once
        assert_near(plain, checkpointed, 1e-5)


def test_it_is_the_formula() -> None:
    model, method = tiny("vit"), LadderSideTuning(reduction=4, temperature=0.5)
    method.apply(model)
    shake(model)
    graft = ladder_of(model)
    pixels = batch("vit")["pixel_values"]
    plain, seen = tiny("vit"), []
    for layer in plain.vit.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        states = plain.vit(pixels)
        z = graft.downs[0](plain.vit.embeddings(pixels))
        for i, block in enumerate(graft.blocks):
            share = torch.sigmoid(graft.gates[i] / 0.5)
            z = block(share * graft.downs[i + 1](seen[i]) + (1 - share) * z)
        expected = states.last_hidden_state + graft.up(graft.norm(z))
        out = model.vit(pixels)
    assert torch.allclose(out.last_hidden_state, expected, atol=1e-5)
    assert not graft.seen, "nothing is kept between two calls"


def test_no_graph_in_the_backbone_and_less_memory() -> None:
    inputs = batch("bert")
    model, lora = tiny("bert"), tiny("bert")
    LadderSideTuning(reduction=8).apply(model)
    LoRA(r=1).apply(lora)
    seen: list[Tensor] = []
    model.bert.encoder.layer[1].register_forward_hook(lambda module, args, out: seen.append(out))
    kept = {}
    for name, each in (("ladder", model), ("lora", lora)):
        with Kept([*each.parameters(), *inputs.values()]) as count:
            loss = each(**inputs).loss
        kept[name] = count.bytes
        loss.backward()
    assert not seen[0].requires_grad
    assert kept["ladder"] < kept["lora"] / 2


def test_padding_is_not_read() -> None:
    model = tiny("bert")
    LadderSideTuning(reduction=4).apply(model)
    shake(model)
    inputs = {name: value for name, value in batch("bert").items() if name != "labels"}
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 50)}
    assert torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-5)


def test_a_decoder_sees_what_was_before() -> None:
    model = tiny("gpt2")
    LadderSideTuning(reduction=4).apply(model)
    shake(model)
    ids = batch("gpt2")["input_ids"]
    other = ids.clone()
    other[:, 5:] = 50
    left, right = model(ids).logits, model(other).logits
    assert torch.allclose(left[:, :5], right[:, :5], atol=1e-5)
    assert not torch.allclose(left[:, 5:], right[:, 5:], atol=1e-2)


def test_every_other_block() -> None:
    config = hf.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
    )
    model = hf.ViTForImageClassification(config)
    LadderSideTuning(every=2).apply(model)
    assert ladder_of(model).rungs == [0, 2, 4]
    model(**batch("vit")).loss.backward()


def test_generation_is_without_a_cache() -> None:
    model = tiny("llama")
    LadderSideTuning(reduction=4).apply(model)
    ids = batch("llama")["input_ids"]
    options = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = tiny("llama").generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), plain)
    with pytest.raises(TuningError, match="use_cache=False"):
        model.generate(ids, **options)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("vit", LadderSideTuning(reduction=0), "reduction=0"),
        ("vit", LadderSideTuning(every=0), "every=0"),
        ("vit", LadderSideTuning(every=3), "every=3 is out of range: ViTModel has 2 blocks"),
        ("vit", LadderSideTuning(temperature=0), "temperature=0"),
        ("vit", LadderSideTuning(dropout=1.0), "dropout=1.0"),
        ("swin", LadderSideTuning(), "no single stack of transformer blocks"),
        ("resnet", LadderSideTuning(), "no single stack of transformer blocks"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, method: LadderSideTuning, message: str) -> None:
    model = tiny(kind)
    before = output(model, kind)
    with pytest.raises(TuningError, match=message):
        method.apply(model)
    assert torch.equal(output(model, kind), before)
