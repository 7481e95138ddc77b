"""MLPHead: layers before the one that gives the logits."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from lightning_peft import LoRA, MLPHead, TuningError, collect
from tests.contract import MethodContract, assert_same, copy_of, descend, output, shake
from tests.models import batch, meta, tiny

D = 32


class TestMLPHead(MethodContract):
    method = MLPHead()
    backbones = ("bert", "distilbert", "vit")
    identity_at_start = False
    compiled = ("vit",)

    def count(self, kind: str) -> int:
        """(k - 1) (d² + 3d), the last layer being the head's."""
        return 2 * (D * D + 3 * D)


def test_the_count_of_mlp_3() -> None:
    model = meta(hf.ViTConfig(num_labels=100), hf.AutoModelForImageClassification)
    MLPHead().apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_261_156


def test_it_is_the_formula() -> None:
    """Linear, ReLU, BatchNorm (in this order), twice, and the layer of the model."""
    model = tiny("vit")
    MLPHead(dropout=0.0).apply(model)
    shake(model)
    graft, x = model.classifier.mlphead, torch.randn(5, D)
    expected = x
    for layer, norm in zip(graft.layers, graft.norms, strict=True):
        expected = F.relu(layer(expected))
        expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    expected = F.linear(expected, model.classifier.weight, model.classifier.bias)
    assert torch.allclose(model.classifier(x), expected, atol=1e-5)


def test_the_last_bias_of_vpt() -> None:
    model = tiny("vit")
    before = copy_of(model.state_dict())
    method = MLPHead(head_init="vpt")
    method.apply(model)
    assert torch.allclose(model.classifier.bias, torch.full((3,), -4.59512), atol=1e-5)
    method.remove(model)
    assert_same(before, dict(model.state_dict()))


def test_one_layer_is_a_linear_probe() -> None:
    model = tiny("vit")
    MLPHead(k=1).apply(model)
    assert list(collect(model)) == ["classifier.weight", "classifier.bias"]
    assert torch.equal(output(model, "vit"), output(tiny("vit"), "vit"))


def test_new_weights_are_kaiming_normal_over_the_outputs() -> None:
    model = meta(hf.ViTConfig(num_labels=100), hf.AutoModelForImageClassification).to_empty(device="cpu")
    MLPHead().apply(model)
    for layer in model.classifier.mlphead.layers:
        assert abs(layer.weight.std().item() - (2 / 768) ** 0.5) < 1e-3
        assert not layer.bias.any()


def test_training_takes_more_than_one_row() -> None:
    model = tiny("vit")
    MLPHead().apply(model)
    model(**batch("vit", size=1))
    model.classifier.train()
    with pytest.raises(TuningError, match="batch of one row"):
        model(**batch("vit", size=1))


def test_tokens_are_rows() -> None:
    config = tiny("bert").config
    model = hf.BertForTokenClassification(config)
    MLPHead(k=2).apply(model)
    labels = torch.zeros(4, 10, dtype=torch.long)
    out = model(batch("bert")["input_ids"], labels=labels)
    assert out.logits.shape == (4, 10, 3)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_it_lives_beside_lora() -> None:
    model = tiny("vit")
    LoRA(r=2).apply(model)
    method = MLPHead()
    method.apply(model)
    descend(model, "vit", method, steps=1)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("vit", MLPHead(k=0), "k=0 is no number"),
        ("vit", MLPHead(dropout=1.0), "dropout=1.0 is no rate"),
        ("vit", MLPHead(head_init="x"), "head_init='x'"),
        ("gpt2", MLPHead(), "GPT2LMHeadModel has no task head"),
    ],
)
def test_what_does_not_fit_is_refused(model: str, method: MLPHead, message: str) -> None:
    backbone: nn.Module = tiny(model)
    with pytest.raises(TuningError, match=message):
        method.apply(backbone)
    assert all(p.requires_grad for p in backbone.parameters())


def test_a_last_layer_in_a_sequence_of_its_own_is_trained_too() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
    model = nn.ModuleDict({"blocks": blocks, "heads": nn.Sequential(OrderedDict(head=nn.Linear(4, 3)))})
    MLPHead(k=2).apply(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"heads.head.weight", "heads.head.bias"} < trained
    assert not any(name.startswith("blocks") for name in trained)
