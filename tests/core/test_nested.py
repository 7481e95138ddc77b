"""Grafts in torch's own encoder, which computes on nested tensors where rows are padded and nothing is trained."""

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, Adapter, LoRA, LoReFT, Method, merge, muted
from lightning_peft.core.graft import grafts
from tests.contract import shake

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(7) >= torch.tensor([[7], [4], [5]])
METHODS: list[Method] = [
    LoRA(r=2, target_modules="all-linear"),
    Adapter(bottleneck=2, train_norms=False),
    IA3(),
    LoReFT(r=2),
]


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def nested(model: nn.Module) -> Tensor:
    return model(X, src_key_padding_mask=PADDING)


def plain(model: nn.Module) -> Tensor:
    """In training mode no tensor is nested; there is no dropout."""
    return nested(model.train()).masked_fill(PADDING.unsqueeze(-1), 0.0)


@pytest.mark.parametrize("methods", [*[(m,) for m in METHODS], (LoReFT(r=2), LoRA(r=2)), (LoRA(r=2), LoReFT(r=2))])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_it_computes_what_it_does_on_padded_rows(methods: tuple[Method, ...], with_gradients: bool) -> None:
    model = encoder()
    for method in methods:
        method.apply(model)
    shake(model)
    model.eval()
    with torch.set_grad_enabled(with_gradients):
        out = nested(model)
        assert not out[PADDING].any(), "what a bare encoder gives for padding"
    torch.testing.assert_close(out, plain(model))
    assert not torch.allclose(out, nested(encoder()), atol=1e-3)


def test_gradients_muting_removing_and_merging() -> None:
    model, bare = encoder(), nested(encoder().requires_grad_(False))
    methods = [LoRA(r=2, target_modules="all-linear"), LoReFT(r=2)]
    for method in methods:
        method.apply(model)
    shake(model)
    model.eval()
    nested(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with muted(model):
        torch.testing.assert_close(nested(model), bare)
    methods[1].remove(model)
    alone = nested(model)
    torch.testing.assert_close(nested(merge(model).requires_grad_(False)), alone)
    assert not list(grafts(model))


def test_removed_it_is_bit_for_bit_as_before() -> None:
    model = encoder().requires_grad_(False)
    before = nested(model)
    for method in (lora := LoRA(r=2), reft := LoReFT(r=2)):
        method.apply(model)
    reft.remove(model)
    lora.remove(model)
    assert torch.equal(nested(model), before)
