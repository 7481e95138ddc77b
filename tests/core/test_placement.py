"""Backbones that accelerate has spread over devices or offloaded: grafts lie and compute where their hosts do."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from lightning_peft import (
    IA3,
    VPT,
    Adapter,
    BitFit,
    DiffPruning,
    FullFineTuning,
    LadderSideTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SideTuning,
    TinyTL,
    TuningError,
    collect,
    merge,
)
from lightning_peft.core import structure
from lightning_peft.core.delta import metadata
from lightning_peft.core.graft import attach, grafts
from lightning_peft.methods import tiny_tl
from lightning_peft.methods.bitfit import AddedBias
from lightning_peft.methods.ia3 import ScaledInput, ScaledOutput
from lightning_peft.towers.attended_prompts import ImagePrefix, OfThisCall
from lightning_peft.towers.deep_prompts import DeepPrompt, Prompts
from lightning_peft.updates.low_rank import LowRank
from lightning_peft.updates.sparse_difference import SparseDifference
from tests.contract import output, shake
from tests.models import tiny

CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lambda: LoRA(r=2, target_modules="all-linear")),
    "adapter": ("bert", lambda: Adapter(bottleneck=2, train_norms=False)),
    "ia3": ("llama", lambda: IA3()),
    "prompt": ("llama", lambda: PromptTuning(num_virtual_tokens=2, init="random_uniform")),
    "prompt in a batch": ("bert", lambda: PromptTuning(num_virtual_tokens=2, init="random_uniform")),
    "p-tuning": ("llama", lambda: PTuning(num_virtual_tokens=2, encoder="mlp")),
    "prefix": ("llama", lambda: PrefixTuning(num_virtual_tokens=2, mid_dim=None)),
    "prefix of a network": ("t5", lambda: PrefixTuning(num_virtual_tokens=2, mid_dim=4)),
    "infix": ("llama", lambda: PrefixTuning(num_virtual_tokens=2, mid_dim=None, form="infix")),
    "vpt": ("vit", lambda: VPT(num_virtual_tokens=2, dropout=0.0)),
    "vpt, projected": ("vit", lambda: VPT(num_virtual_tokens=2, dropout=0.0, projection=3)),
    "ladder": ("bert", lambda: LadderSideTuning(reduction=2)),
    "side": ("bert", lambda: SideTuning()),
}


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
def test_a_dispatched_model_computes_what_a_plain_one_does(name: str) -> None:
    kind, make = CASES[name]
    outputs = []
    for dispatched in (False, True):
        torch.manual_seed(0)
        model, method = tiny(kind).eval(), make()
        if dispatched:
            model = dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        torch.manual_seed(1)
        method.apply(model)
        shake(model)
        outputs.append(output(model, kind, method))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ladder", "side")])
def test_an_offloaded_model_is_tuned_where_it_computes(name: str) -> None:
    kind, make = CASES[name]
    model, method = tiny(kind).eval(), make()
    reference = copy.deepcopy(model)
    cpu_offload(structure.base_model_of(model), execution_device="cpu")
    torch.manual_seed(1)
    method.apply(model)
    own = [p for place in grafts(model) for p in place.graft.parameters()]
    assert own
    assert not any(p.is_meta for p in own)
    shake(model)
    found = output(model, kind, method)
    delta = collect(model)
    assert not any(tensor.is_meta for tensor in delta.values())
    other = make()
    other.apply(reference)
    reference.load_state_dict(delta, strict=False)
    torch.testing.assert_close(found, output(reference, kind, other))
    marks = [metadata(m)["backbones"][""]["fingerprint"] for m in (model, reference)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (BitFit(), "is offloaded and read anew for each call: load the backbone with a device_map"),
        (FullFineTuning(), "is offloaded and read anew for each call: load the backbone with a device_map"),
        (DiffPruning(), "DiffPruning|SparseDifference needs the weights of"),
        (LoRA(use_dora=True), "use_dora=True needs the weights of Linear, which are offloaded"),
        (LoRA(init="pissa"), "init='pissa' needs the weights of Linear, which are offloaded"),
    ],
)
def test_what_needs_the_weights_is_refused_where_they_are_offloaded(method: Any, sentence: str) -> None:
    model = tiny("bert")
    cpu_offload(structure.base_model_of(model), execution_device="cpu")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TuningError, match=sentence):
        method.apply(model)
    assert not any(grafts(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_merging_into_offloaded_weights_is_refused() -> None:
    model = cpu_offload(tiny("llama"), execution_device="cpu")
    LoRA(r=2).apply(model)
    with pytest.raises(TuningError, match="merging needs the weights of Linear, which are offloaded"):
        merge(model)


@pytest.mark.parametrize(
    "make",
    [lambda host: LowRank(host, 2, 4.0, 0.0, False), ScaledOutput, ScaledInput, AddedBias],
    ids=["LowRank", "ScaledOutput", "ScaledInput", "AddedBias"],
)
def test_a_graft_sees_its_input_on_the_device_of_its_host(make: Any) -> None:
    """The second device of every machine is the meta device, which computes shapes."""
    device = torch.device("meta")
    host = nn.Linear(4, 4, device=device)
    add_hook_to_module(host, AlignDevicesHook(device))
    graft = attach(host, make(host), "graft")
    assert {parameter.device for parameter in graft.parameters()} == {device}
    assert host(torch.zeros(3, 4)).device == device


def test_rows_of_prompts_go_to_the_block_that_takes_them() -> None:
    rows = [nn.Parameter(torch.zeros(2, 4)) for _ in range(2)]
    prompts = Prompts(rows, rows)
    assert DeepPrompt(prompts.call, "images", 1).before(nn.Identity(), torch.zeros(3, 5, 4, device="meta")).is_meta
    call = OfThisCall()
    call.rows = {0: torch.zeros(3, 2, 6, 8)}
    place: Any = SimpleNamespace(heads=2)
    keys = torch.zeros(3, 2, 5, 4, device="meta")
    assert all(tensor.is_meta for tensor in ImagePrefix(place, 0, call).key_value(keys, keys))


def test_a_penalty_adds_up_what_lies_on_several_devices() -> None:
    model, method = tiny("bert"), DiffPruning()
    method.apply(model)
    first = next(place.graft for place in grafts(model) if isinstance(place.graft, SparseDifference))
    first.to("meta")
    penalty = method.penalty(model)
    assert penalty is not None
    assert penalty.is_meta


def test_what_is_beside_a_block_lies_where_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tl, "device_of", lambda block: torch.device("meta"))
    model = tiny("vit")
    TinyTL().apply(model)
    assert {p.device.type for place in grafts(model) for p in place.graft.parameters()} == {"meta"}
