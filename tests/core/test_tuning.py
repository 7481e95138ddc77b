"""Several methods on one backbone: the first freezes, they add up, and each can be taken off alone."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import BitFit, FullFineTuning, LinearProbe, LoRA, Method, PromptTuning, TuningError, collect
from lightning_peft.core.graft import grafts
from lightning_peft.core.tuning import Tuning, tunings
from tests.contract import assert_same, copy_of, descend, output, shake, snapshot
from tests.models import batch, tiny


def several() -> list[Method]:
    return [LoRA(r=2), BitFit(), PromptTuning(num_virtual_tokens=3, init="random_uniform"), LinearProbe()]


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_they_add_up_and_come_off_in_any_order(order: tuple[int, ...]) -> None:
    alone = {}
    for i, method in enumerate(several()):
        model = tiny("bert")
        method.apply(model)
        alone[i] = trained(model)
    model, methods = tiny("bert"), several()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model, "bert")
    for count, i in enumerate(order, start=1):
        methods[i].apply(model)
        assert trained(model) == set().union(*(alone[j] for j in order[:count]))
    shake(model)
    for count, i in enumerate(order, start=1):
        methods[i].remove(model)
        if order[count:]:
            assert trained(model) == set().union(*(alone[j] for j in order[count:]))
    assert_same(before, snapshot(model, "bert"))


def test_a_head_shared_by_two_methods_stays_trained_until_the_last() -> None:
    model = tiny("bert")
    original = model.classifier.weight.detach().clone()
    lora, bitfit = LoRA(r=2), BitFit()
    lora.apply(model)
    shake(model)
    changed = model.classifier.weight.detach().clone()
    bitfit.apply(model)
    lora.remove(model)
    assert torch.equal(model.classifier.weight, changed)
    assert model.classifier.weight.requires_grad
    bitfit.remove(model)
    assert torch.equal(model.classifier.weight, original)


def test_full_fine_tuning_beside_lora() -> None:
    model, lora, full = tiny("bert"), LoRA(r=2), FullFineTuning()
    before = snapshot(model, "bert")
    lora.apply(model)
    full.apply(model)
    assert all(p.requires_grad for p in model.parameters())
    full.remove(model)
    assert trained(model) == {n for n, _ in model.named_parameters() if "lora" in n or n.startswith("classifier")}
    lora.remove(model)
    assert_same(before, snapshot(model, "bert"))


def test_two_backbones_of_one_module() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = tiny("bert"), tiny("vit")

    pair = Pair()
    LoRA(r=2, backbone="one").apply(pair)
    LoRA(r=3, backbone="other").apply(pair)
    assert [name for name, _, _ in tunings(pair)] == ["one", "other"]
    ranks = {place.path.split(".")[0]: place.graft.A.shape[0] for place in grafts(pair)}
    assert ranks == {"one": 2, "other": 3}
    LoRA(backbone="one").remove(pair)
    assert [name for name, _, _ in tunings(pair)] == ["other"]


def test_an_error_in_the_second_method_leaves_the_first() -> None:
    model, lora = tiny("bert"), LoRA(r=2)
    lora.apply(model)
    shake(model)
    before, names = copy_of(collect(model)), trained(model)
    for bad in (BitFit(biases=["nope"]), PromptTuning(num_virtual_tokens=64), BitFit(also_train="nope")):
        with pytest.raises(TuningError):
            bad.apply(model)
        assert trained(model) == names
        assert_same(before, copy_of(collect(model)))
        assert list(Tuning.of(model).methods) == ["lora"]


def test_freeze_undoes_what_others_thawed_and_not_what_the_user_froze() -> None:
    model = tiny("bert")
    LoRA(r=2).apply(model)
    names = trained(model)
    model.requires_grad_(True)
    model.classifier.requires_grad_(False)
    Tuning.of(model).freeze(model)
    assert trained(model) == names - {"classifier.weight", "classifier.bias"}


def test_a_copy_is_tuned_apart() -> None:
    model, lora = tiny("bert"), LoRA(r=2)
    lora.apply(model)
    other = copy.deepcopy(model)
    before = snapshot(tiny("bert"), "bert")
    lora.remove(other)
    assert_same(before, snapshot(other, "bert"))
    assert lora.is_applied(model)
    assert not lora.is_applied(other)
    descend(model, "bert", lora, steps=1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_trained_model_is_not_taken_for_the_original(copied) -> None:
    model, full = tiny("bert"), FullFineTuning()
    full.apply(model)
    descend(model, "bert", full, steps=1)
    other = copied(model)
    with pytest.raises(TuningError, match="kept no copy"):
        full.remove(other)
    assert_same(copy_of(model.state_dict()), copy_of(other.state_dict()))


def test_values_set_after_apply_are_not_kept() -> None:
    """A checkpoint of the bare backbone loaded after `apply` trains on; `remove` gives back what came before."""
    model, lora = tiny("bert"), LoRA(r=2)
    before = output(model, "bert")
    lora.apply(model)
    model.load_state_dict(tiny("bert", seed=1).state_dict(), strict=False)
    assert torch.equal(output(model, "bert", lora), output(tiny("bert", seed=1).requires_grad_(False), "bert"))
    lora.remove(model)
    assert not torch.equal(output(model, "bert"), before), "frozen tensors have no copies"


def test_a_plain_module_can_be_tuned() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Plain(), torch.randn(2, 4)
    before = model(x)
    method = LoRA(r=2, target_modules="all-linear", layers=[-1])
    method.apply(model)
    assert sorted(collect(model)) == ["blocks.2.0.lora.A", "blocks.2.0.lora.B"]
    shake(model, 1.0)
    assert not torch.equal(model(x), before)
    method.remove(model)
    assert torch.equal(model(x), before)


def test_both_prompt_and_weights_train_together() -> None:
    model, prompt, lora = tiny("gpt2"), PromptTuning(num_virtual_tokens=3, init="random_uniform"), LoRA(r=2)
    prompt.apply(model)
    lora.apply(model)
    model(**prompt.prepare(batch("gpt2"))).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained(model))
