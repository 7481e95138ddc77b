"""Another LoRA in the place of one, under torch.compile without a recompilation."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import IA3, LoRA, Method, TuningError, list_deltas, load_delta, save_delta
from lightning_peft.core.delta_file import read_delta
from tests.contract import at_work, copy_of, shake
from tests.models import batch, tiny

FILES = [
    LoRA(r=2),
    LoRA(r=4, alpha=3.0, use_rslora=True),
    LoRA(r=1, target_modules=["h.0.attn.c_attn"]),
    LoRA(r=2, init="pissa"),
    LoRA(r=2, rank_pattern={"h.1.attn.c_attn": 3}, alpha_pattern={"h.0.attn.c_attn": 7.0}),
]


def made(method: Method, kind: str = "gpt2", seed: int = 0) -> nn.Module:
    model = tiny(kind, seed=seed)
    torch.manual_seed(3)
    method.apply(model)
    shake(model)
    return model


def saved(folder: Path, *methods: Method, kind: str = "gpt2") -> list[tuple[Path, torch.Tensor]]:
    found = []
    for i, method in enumerate(methods):
        model = made(method, kind)
        found.append((save_delta(model, folder / f"{i}.safetensors"), at_work(model, kind)))
    return found


def test_loras_of_other_forms_take_the_place_of_one(tmp_path: Path) -> None:
    files, model = saved(tmp_path, *FILES), tiny("gpt2")
    load_delta(model, files[0][0], "slot", max_r=4)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    for file, expected in (*files, files[0]):
        load_delta(model, file, "slot")
        torch.testing.assert_close(at_work(model, "gpt2"), expected, atol=1e-5, rtol=1e-5)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert [d.name for d in list_deltas(model)] == ["slot"]
    again = save_delta(model, tmp_path / "again.safetensors", "slot")
    other = tiny("gpt2")
    load_delta(other, again, "slot")
    torch.testing.assert_close(at_work(other, "gpt2"), files[0][1], atol=1e-5, rtol=1e-5)


def test_a_compiled_model_is_not_compiled_anew(tmp_path: Path) -> None:
    files, model = saved(tmp_path, *FILES[:3]), tiny("gpt2")
    load_delta(model, files[0][0], "slot", max_r=4)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled, before = torch.compile(model, backend=count), 0
    for file, expected in files:
        load_delta(model, file, "slot")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch("gpt2")).logits, expected, atol=1e-5, rtol=1e-5)
        before = before or len(graphs)
        assert len(graphs) == before


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("bert", [LoRA(r=3, use_dora=True), LoRA(r=2, use_dora=True, target_modules=["layer.0.attention.self.query"])]),
        ("vit", [LoRA(r=3, target_modules=["projection", "q_proj"]), LoRA(r=1, target_modules=["projection"])]),
    ],
    ids=["magnitudes and a head", "a convolution"],
)
def test_magnitudes_heads_and_kernels(kind: str, methods: list[Method], tmp_path: Path) -> None:
    files, model = saved(tmp_path, *methods, kind=kind), tiny(kind)
    for file, expected in files:
        load_delta(model, file, "slot")
        torch.testing.assert_close(at_work(model, kind), expected, atol=1e-5, rtol=1e-5)


def test_what_has_no_room_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2")
    (first, expected), *others = saved(
        tmp_path, LoRA(r=2), LoRA(r=5), LoRA(r=2, target_modules=["c_fc"]), LoRA(r=2, use_dora=True), IA3()
    )
    load_delta(model, first, "slot", max_r=4)
    state = copy_of(model.state_dict())
    whys = (
        r"has rank 5, there is room for 4: load the first with max_r=5",
        r"changes transformer\.h\.0\.mlp\.c_fc, which slot has no room for",
        r"has use_dora=True and bias='none', slot has False and 'none'",
        r"was trained with IA3, but LoRA is applied here",
    )
    for (file, _), why in zip(others, whys, strict=True):
        with pytest.raises(TuningError, match=why):
            load_delta(model, file, "slot")
    stranger = save_delta(made(LoRA(r=3), seed=4), tmp_path / "stranger.safetensors")
    with pytest.raises(TuningError, match="was trained on GPT2LMHeadModel"):
        load_delta(model, stranger, "slot")
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    torch.testing.assert_close(at_work(model, "gpt2"), expected, atol=1e-5, rtol=1e-5)
    for wrong, why in (
        ({"name": "x", "max_r": 1}, "max_r=1 has no room for rank 2 of the file"),
        ({"max_r": 4}, "max_r=4 is for a delta under a name"),
    ):
        with pytest.raises(TuningError, match=why):
            load_delta(model, first, **wrong)
    with pytest.raises(TuningError, match="max_r=4 is for LoRA, the file is of IA3"):
        load_delta(model, others[3][0], "x", max_r=4)
    load_delta(model, others[0][0], "longer", max_r=5)


def test_one_of_the_same_form_is_put_in_as_it_is(tmp_path: Path) -> None:
    (file, expected), (other, _) = saved(tmp_path, LoRA(r=3, use_dora=True), LoRA(r=3, use_dora=True), kind="bert")
    model = tiny("bert")
    load_delta(model, other, "slot")
    shake(model)
    load_delta(model, file, "slot")
    again, tensors = save_delta(model, tmp_path / "again.safetensors", "slot"), read_delta(file)[0]
    found = {name.replace("lora_slot", "lora"): t for name, t in read_delta(again)[0].items() if "_own." not in name}
    assert found
    assert all(torch.equal(t, tensors[name]) for name, t in found.items())
    torch.testing.assert_close(at_work(model, "bert"), expected, atol=0, rtol=0)
