"""A LightningModule that owns its method, by its class or by what stands in brackets."""

import inspect
import pickle
from typing import Any

import lightning as L
import pytest

import lightning_peft
from lightning_peft import BitFit, LoRA, LoRAMixin, MethodMixin, TextClassification, TunedBy, TuningError
from lightning_peft.methods import every_method

VERBS = [
    (mixin, verb)
    for mixin in (getattr(lightning_peft, f"{name}Mixin") for name in every_method())
    for verb, member in vars(mixin).items()
    if inspect.isfunction(member)
]
CALLED = {"sparsity": "achieved"}


class Tuned(TunedBy[LoRA], L.LightningModule):
    pass


class Chosen(MethodMixin, L.LightningModule):
    default_method = LoRA


class Other(Tuned):
    default_method = BitFit


class Task(LoRAMixin, TextClassification):
    pass


@pytest.mark.parametrize(("kind", "method"), [(Tuned, LoRA), (Chosen, LoRA), (Other, BitFit)])
def test_a_module_has_its_method(kind: type[Any], method: type[Any]) -> None:
    module = kind()
    assert type(module.method) is method
    assert module.configure_callbacks() == [module.method]
    assert type(pickle.loads(pickle.dumps(module)).method) is method


def test_the_brackets_name_one_class() -> None:
    assert TunedBy[LoRA] is TunedBy[LoRA] is LoRAMixin
    assert isinstance(Tuned(), LoRAMixin)
    assert not isinstance(Chosen(), LoRAMixin)
    assert Task.__mro__.index(LoRAMixin) < Task.__mro__.index(TextClassification)
    assert "tuned by LoRA" in LoRAMixin.__doc__


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(TuningError, match=r"TunedBy\[int\] names no method: give a class such as LoRA"):
        TunedBy[int]


@pytest.mark.parametrize(("mixin", "verb"), VERBS)
def test_a_verb_is_done_by_the_method(mixin: type[Any], verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("Module", (mixin, L.LightningModule), {})()
    calls = []
    monkeypatch.setattr(mixin.default_method, CALLED.get(verb, verb), lambda *arguments: calls.append(arguments))
    getattr(module, verb)()
    assert [call[:2] for call in calls] == [(module.method, module)]


def test_there_are_verbs() -> None:
    assert len(VERBS) == 10
