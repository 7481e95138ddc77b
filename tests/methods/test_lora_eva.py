"""LoRA(init="eva"): the directions of HF PEFT for equal batches, its ranks, and what a fit makes of them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.interop import to_peft
from lightning_peft.updates.explained_variance import Directions
from lightning_peft.updates.low_rank import LowRank
from tests.contract import MethodContract, assert_near, shake
from tests.models import HIDDEN, batch, tiny
from tests.modules import Tuned, loader, trainer

R = 2


@pytest.mark.slow
class TestEVA(MethodContract):
    method = LoRA(r=R, init="eva")
    backbones = ("llama", "vit")

    def count(self, kind: str) -> int:
        """Room for 2 r in each of two projections of two layers; Llama's values have half as many heads."""
        return 2 * 2 * R * (2 * HIDDEN + HIDDEN + (HIDDEN // 2 if kind == "llama" else HIDDEN))


def batches(kind: str = "llama") -> list[dict[str, Tensor]]:
    return [batch(kind, size=4, seed=seed) for seed in range(3)]


def updates(model: nn.Module) -> dict[str, LowRank]:
    return {place.path: place.graft for place in grafts(model) if isinstance(place.graft, LowRank)}


def test_directions_are_the_components_of_all_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(240, 12) @ torch.diag(0.6 ** torch.arange(12)) + 2
    found = Directions(4)
    for part in rows.split(60):
        found.add(part)
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    cosines = (found.vectors * vectors[:4]).sum(1).abs()
    assert cosines.min() > 0.99
    torch.testing.assert_close(found.shares.float(), values[:4].square() / centred.square().sum(), atol=0.01, rtol=0)
    found.add(rows[:3])
    assert found.rows == 240, "fewer rows than directions are left out"


@pytest.mark.usefixtures("peft_finds_the_cache")
@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_peft_on_equal_batches() -> None:
    config = peft.LoraConfig(
        r=R, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny("llama"), config)
    peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    model, method = tiny("llama"), LoRA(r=R, alpha=4.0, init="eva", target_modules=["q_proj", "v_proj", "down_proj"])
    method.apply(model)
    ranks = method.initialise(model, batches())
    assert sum(ranks.values()) == 6 * R
    assert set(ranks.values()) != {R}
    expected = {
        name.removeprefix("base_model.model."): module for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.layer.LoraLayer)
    }  # fmt: skip
    for name, graft in updates(model).items():
        rank, pair = ranks[name], [other for other in ranks if other.rpartition(".")[0] == name.rpartition(".")[0]]
        assert not graft.A[rank:].any()
        assert not graft.B.any()
        if len(pair) == 1:  # among equal shares PEFT takes any
            assert rank == (expected[name].r["default"] if name in expected else 0)
        else:
            assert sum(ranks[n] for n in pair) == sum(expected[n].r["default"] for n in pair if n in expected)
        if name in expected:
            other = expected[name]
            both = min(rank, other.r["default"])
            assert_near({"": graft.A[:both]}, {"": other.lora_A["default"].weight[:both]}, 1e-4)
            assert graft.scale == pytest.approx(other.scaling["default"])


def test_a_fit_starts_from_its_own_batches_and_goes_on(tmp_path: Path) -> None:
    module, method = Tuned("llama"), LoRA(r=R, init="eva")
    batches_seen: list[Any] = []
    real = LoRA.initialise
    fit = trainer(tmp_path, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRA, "initialise", lambda *a: batches_seen.append(real(*a)))
        fit.fit(module, loader("llama"), loader("llama"))
    (ranks,) = batches_seen
    assert sum(ranks.values()) == 4 * R
    for name, graft in updates(module.model).items():
        rank = ranks[name]
        assert graft.B[:, :rank].any() == (rank > 0)
        assert not graft.A[rank:].any(), "the room that is not given stays empty"
        assert not graft.B[:, rank:].any()


@pytest.mark.usefixtures("peft_finds_the_cache")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_computes_the_same_with_it(use_rslora: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    method = LoRA(r=R, init="eva", use_rslora=use_rslora)
    method.apply(model)
    method.initialise(model, batches())
    shake(model)
    to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    inputs = batch("llama")
    with torch.no_grad():
        assert_near({"": model(**inputs).logits}, {"": theirs(**inputs).logits}, 1e-5)


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (LoRA(r=R), [], "init='kaiming' needs no data"),
        (LoRA(r=R, init="eva"), [], "0 batches gave .* fewer than 4 rows each"),
        (LoRA(r=R, init="eva"), [{"x": torch.ones(2)}], r"takes none of what the batch has \(dict of x\)"),
        (
            LoRA(r=16, init="eva"),
            [batch("llama", size=1)],
            "fewer than 32 rows each, .* give larger batches, or less r=",
        ),
    ],
)
def test_batches_that_do_not_do_are_refused(method: LoRA, data: list, message: str) -> None:
    model = tiny("llama")
    method.apply(model)
    before = {name: list(module.children()) for name, module in model.named_modules()}
    with pytest.raises(TuningError, match=message):
        method.initialise(model, data)
    assert {name: list(module.children()) for name, module in model.named_modules()} == before
    with pytest.raises(TuningError, match=r"init='eva' looks at the inputs of linear layers, and .* is none"):
        LoRA(r=R, init="eva", target_modules=["embed_tokens"]).apply(tiny("llama"))
