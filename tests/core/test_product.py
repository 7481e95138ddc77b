"""Projections [width, heads, d_head] that a module multiplies by in ``torch.einsum`` are matrices, as in XLNet."""

from pathlib import Path

import peft
import pytest
import torch

from lightning_peft import LoRA, TuningError, merge, to_lora
from lightning_peft.core.graft import grafts
from lightning_peft.core.product import Product
from lightning_peft.interop import from_peft, to_peft
from tests.contract import shake
from tests.families.builders import build


def trained(method: LoRA) -> dict[str, tuple[int, ...]]:
    model, _ = build("xlnet")
    method.apply(model)
    own = {f"{path}.{n}": p for path, _, _, graft in grafts(model) for n, p in graft.named_parameters()}
    start = "transformer.layer.0."
    return {name.removeprefix(start): tuple(p.shape) for name, p in own.items() if name.startswith(start)}


def test_the_query_and_the_value_are_tuned_by_default_with_one_pair_of_factors() -> None:
    assert trained(LoRA(r=3)) == {
        f"rel_attn.{name}.{part}": shape for name in "qv" for part, shape in (("A", (3, 16)), ("B", (16, 3)))
    }
    found = trained(LoRA(r=3, target_modules="all-linear"))
    assert {name.split(".")[1] for name in found} == {*"qkvor", "layer_1", "layer_2"}


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("ibh,hnd->ibnd", (5, 7, 4)), ("ibnd,hnd->ibh", (5, 7, 2, 3)), ("i h, h n d -> i n d", (7, 4))],
)
def test_a_product_gives_what_einsum_gives(equation: str, shape: tuple[int, ...]) -> None:
    product = Product.in_einsum(equation, 1)
    assert product is not None
    torch.manual_seed(0)
    w, x = torch.randn(4, 2, 3), torch.randn(shape)
    matrix, expected = product.matrix(w), torch.einsum(equation, x, w)
    assert torch.allclose((x.reshape(-1, matrix.shape[1]) @ matrix.t()).view_as(expected), expected, atol=1e-6)
    assert torch.equal(product.stored(matrix, w), w)


@pytest.mark.parametrize("equation", ["ibnd,snd->ibns", "eth,ehd->etd", "...h,hnd->...nd", "ih,hnd", "ibh,nhd->ibnd"])
def test_what_is_no_matrix_is_no_product(equation: str) -> None:
    assert Product.in_einsum(equation, 1) is None


def test_a_merged_update_has_its_rank_and_comes_back_as_a_lora() -> None:
    model, batch = build("xlnet")
    before = model.get_parameter("transformer.layer.1.rel_attn.o").detach().clone()
    LoRA(r=2, target_modules=["q", "o"], use_dora=True).apply(model)
    shake(model, 0.05)
    live = model(**batch).logits.detach()
    again, _ = build("xlnet")
    LoRA(r=2, target_modules=["q", "o"], use_dora=True).apply(again)
    again.load_state_dict(model.state_dict())
    assert max(to_lora(model, 16).values()) < 1e-3
    assert torch.allclose(model(**batch).logits, live, atol=1e-4)
    changed = merge(again).get_parameter("transformer.layer.1.rel_attn.o").detach() - before
    assert changed.abs().max() > 1e-3
    assert torch.allclose(again(**batch).logits, live, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_no_adapter_of_peft_has_such_a_projection(tmp_path: Path) -> None:
    model, _ = build("xlnet")
    LoRA(r=2).apply(model)
    with pytest.raises(TuningError, match="for stacked experts: exclude it, or merge"):
        to_peft(model, tmp_path / "ours")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["rel_attn.q"], init_lora_weights=False)
    peft.get_peft_model(build("xlnet")[0], config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(TuningError, match="as of stacked experts, which it is not"):
        from_peft(build("xlnet")[0], tmp_path / "theirs")
