"""LinearProbe: the task head, on frozen features."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LinearProbe, TuningError, collect
from tests.contract import MethodContract, assert_near, descend
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
