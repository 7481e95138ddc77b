"""LinearProbe: the task head, on frozen features."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LinearProbe, Method, TuningError, collect
from tests.contract import MethodContract, assert_near, assert_same, copy_of, descend, output
from tests.models import batch, meta, tiny


class TestLinearProbe(MethodContract):
    method = LinearProbe()
    backbones = ("bert", "distilbert", "vit")
    compiled = ("vit",)

    def count(self, kind: str) -> int:
        """Nothing but the head."""
        return 0


@pytest.mark.parametrize("kind", TestLinearProbe.backbones)
def test_it_is_the_head(kind: str) -> None:
    model = tiny(kind)
    LinearProbe().apply(model)
    assert {name.split(".")[0] for name in collect(model)} <= {"classifier", "pre_classifier"}


def test_no_gradient_is_recorded_below_the_head() -> None:
    model = tiny("bert")
    LinearProbe().apply(model)
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch("bert")).loss.backward()
    assert not seen[0].requires_grad


def test_it_is_a_linear_model_of_the_features() -> None:
    model, method = tiny("bert"), LinearProbe()
    inputs = batch("bert")
    with torch.no_grad():
        features = model.bert(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    alone = nn.Linear(32, 3)
    alone.load_state_dict(model.classifier.state_dict())
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(alone(features), inputs["labels"]).backward()
        optimizer.step()
    method.apply(model)
    descend(model, "bert", method, steps=3, lr=0.1)
    assert_near(dict(alone.state_dict()), dict(model.classifier.state_dict()), 1e-6)


def test_the_head_of_roberta_has_two_layers() -> None:
    model = meta(hf.RobertaConfig(vocab_size=50265, num_labels=2), hf.AutoModelForSequenceClassification)
    LinearProbe().apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 592_130


def test_a_head_outside_of_the_backbone_is_left_alone() -> None:
    model = nn.ModuleDict({"features": tiny("bert").bert, "head": nn.Linear(32, 2)})
    LinearProbe().apply(model)
    assert list(collect(model)) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_language_model_needs_also_train(kind: str) -> None:
    with pytest.raises(TuningError, match=r"has no task head .* also_train="):
        LinearProbe().apply(tiny(kind))


def test_also_train_makes_any_layer_the_head() -> None:
    model = tiny("llama")
    LinearProbe(also_train=r"lm_head\.weight").apply(model)
    assert list(collect(model)) == ["lm_head.weight"]


class TestLinearProbeWithBatchNorm(MethodContract):
    method = LinearProbe(batch_norm=True)
    backbones = ("vit",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """Nothing but the head: the norm has statistics alone."""
        return 0

    def applied(self, model: nn.Module, **changes: Any) -> Method:
        """Apply it with statistics that are not those of the start."""
        method = super().applied(model, **changes)
        model.classifier.linearprobe.norm.running_mean.fill_(0.5)
        return method


def test_the_statistics_are_part_of_the_delta() -> None:
    """A delta of parameters alone would not give the trained model's logits."""
    model, fresh = tiny("vit"), tiny("vit")
    for each in (model, fresh):
        LinearProbe(batch_norm=True).apply(each)
    model.classifier.train()
    for seed in range(3):
        model(**batch("vit", seed=seed))
    model.eval()
    delta = collect(model)
    assert {name.rpartition(".")[2] for name in delta} >= {"running_mean", "running_var", "num_batches_tracked"}
    fresh.load_state_dict({n: t for n, t in delta.items() if "running" not in n}, strict=False)
    assert not torch.equal(output(fresh, "vit"), output(model, "vit"))
    fresh.load_state_dict(delta, strict=False)
    assert torch.equal(output(fresh, "vit"), output(model, "vit"))


def test_a_batch_of_one_has_no_statistics() -> None:
    model = tiny("vit")
    LinearProbe(batch_norm=True).apply(model)
    output(model, "vit")
    model.classifier.train()
    with pytest.raises(TuningError, match="drop_last=True"):
        model(**batch("vit", size=1))


@pytest.mark.parametrize(("how", "bias"), [("vpt", -4.59512), ("mae", 0.0), ("zero", 0.0)])
def test_initial_values(how: str, bias: float) -> None:
    model = tiny("vit")
    before = copy_of(model.state_dict())
    method = LinearProbe(head_init=how)
    method.apply(model)
    assert torch.allclose(model.classifier.bias, torch.full((3,), bias), atol=1e-5)
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    method.remove(model)
    assert_same(before, dict(model.state_dict()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LinearProbe(head_init="random"), "head_init='random' is no initial value"),
        (LinearProbe(cache_features=True, backbone_mode="train"), "backbone_mode='eval'"),
        (LinearProbe(cache_features=True, cache_limit=0), "cache_limit=0"),
    ],
)
def test_what_does_not_fit_is_refused(method: LinearProbe, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        method.apply(tiny("vit"))


def test_a_batch_norm_needs_a_head() -> None:
    with pytest.raises(TuningError, match="no task head"):
        LinearProbe(batch_norm=True).apply(tiny("vit").vit)
