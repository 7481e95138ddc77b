"""TinyTL: biases, and lite residuals beside the blocks."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import TinyTL, TuningError, collect
from lightning_peft.core.graft import grafts
from lightning_peft.methods.tiny_tl import LiteResidual
from tests.contract import MethodContract, copy_of, output, shake, snapshot
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer


def of_one(c: int, k: int) -> int:
    """Return c²/2 k² + c² + 4c, the parameters of a residual on c channels."""
    return c * c // 2 * k * k + c * c + 4 * c


class TestTinyTL(MethodContract):
    method = TinyTL()
    backbones = ("vit", "dinov2")
    compiled = ("vit",)

    def count(self, kind: str) -> int:
        """The biases, and two residuals that see 2 by 2 positions, so that their kernels are 1."""
        biases = {"vit": 2 * (7 * 32 + 64) + 2 * 32, "dinov2": 2 * (7 * 32 + 64) + 2 * 32}[kind]
        return biases + 2 * of_one(32, 1)


def residual(c: int, size: int, kernel: int) -> LiteResidual:
    shape = torch.Size([1, c, size, size])
    return LiteResidual(shape, shape, None, kernel, 2, 1.0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("c", "size", "kernel", "expected"), [(32, 28, 3, 3), (32, 28, 5, 5), (32, 7, 5, 3), (32, 1, 5, 1)]
)
def test_the_count_and_the_kernel_that_fits(c: int, size: int, kernel: int, expected: int) -> None:
    graft = residual(c, size, kernel)
    assert graft.conv.kernel_size == (expected, expected)
    assert sum(p.numel() for p in graft.parameters()) == of_one(c, expected)
    if expected == 3:
        assert of_one(c, 3) == 5_760


def test_the_residual_is_the_formula() -> None:
    """Up(norm(conv1x1(ReLU(norm(conv(AvgPool2(x))))))), written out position by position."""
    torch.manual_seed(0)
    graft, x = residual(16, 6, 3), torch.randn(2, 16, 6, 6)
    shake(graft)
    pooled = x.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5))
    around = nn.functional.pad(pooled, (1, 1, 1, 1))

    def standardised(weight: torch.Tensor) -> torch.Tensor:
        return torch.stack([(row - row.mean()) / row.std() for row in weight])

    def normed(norm: nn.GroupNorm, y: torch.Tensor) -> torch.Tensor:
        rows = y.unflatten(1, (2, 8))  # 8 channels a group
        mean, var = rows.mean((2, 3, 4), keepdim=True), rows.var((2, 3, 4), keepdim=True, unbiased=False)
        flat = ((rows - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        return flat * norm.weight[:, None, None] + norm.bias[:, None, None]

    first = torch.empty(2, 16, 3, 3)
    for group in range(2):
        own = slice(8 * group, 8 * group + 8)
        weight = standardised(graft.conv.weight)[own]
        for i in range(3):
            for j in range(3):
                first[:, own, i, j] = torch.einsum("bchw,ochw->bo", around[:, own, i : i + 3, j : j + 3], weight)
    hidden = normed(graft.norm, first).relu()
    low = normed(graft.last_norm, torch.einsum("bchw,oc->bohw", hidden, standardised(graft.point.weight)[:, :, 0, 0]))
    between = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0])  # of six pixels among three
    up = (1 - (between[:, None] - torch.arange(3.0)).abs()).clamp(min=0)
    expected = torch.einsum("ai,bcij,dj->bcad", up, low, up)
    assert expected.abs().max() > 0.1
    assert torch.allclose(graft.after(torch.zeros(2, 16, 6, 6), nn.Identity(), x), expected, atol=1e-5)


def test_the_first_step_moves_the_last_norm_alone() -> None:
    model = tiny("vit")
    TinyTL().apply(model)
    model(**batch("vit")).loss.backward()
    for place in grafts(model):
        # What the head reads, [CLS], no longer sees what the last block makes of the image's tokens.
        assert bool(place.graft.last_norm.weight.grad.any()) is (place.path == "vit.layers.0")
        assert not place.graft.conv.weight.grad.any()
        assert not place.graft.point.weight.grad.any()


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_stages_of_other_sizes_and_widths(kind: str) -> None:
    model = tiny(kind)
    method = TinyTL()
    before = output(model, kind)
    method.apply(model)
    assert torch.equal(output(model, kind), before), "the start is the frozen model"
    assert len(list(grafts(model))) == 4
    shake(model)
    out = model(**batch(kind))
    assert not torch.equal(out.logits, before)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    method.remove(model)
    model.zero_grad()
    assert torch.equal(output(model, kind), before)


def test_any_network_of_images() -> None:
    torch.manual_seed(0)
    body = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)])
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    image = torch.randn(2, 3, 9, 9)
    before = model(image)
    TinyTL(target_modules=["0", "1"], image_size=9).apply(model)
    assert torch.equal(model(image), before)
    shake(model)
    assert model(image).shape == before.shape
    assert set(collect(model)) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_statistics_of_frozen_norms_stay(tmp_path: Path) -> None:
    module = Tuned("resnet")
    before = copy_of(module.state_dict())
    run = trainer(tmp_path, TinyTL(), max_epochs=1)
    run.fit(module, loader("resnet"), loader("resnet"))
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name)
    assert not any("running" in name for name in collect(module))
    assert run.callback_metrics["activation_memory_mib"] > 0


def test_what_autograd_keeps_is_reported(tmp_path: Path) -> None:
    """As many bytes as saved-tensor hooks see around the forward pass of the first batch."""
    module, method = Tuned("vit"), TinyTL()
    run = trainer(tmp_path, method, max_steps=1)
    run.fit(module, loader("vit"), loader("vit"))
    reported = run.callback_metrics["activation_memory_mib"] * 2**20
    first = next(iter(loader("vit")))
    assert method.activation_memory(module.model, first) == pytest.approx(reported.item(), rel=0.05)
    larger = {name: torch.cat([value, value]) for name, value in first.items()}
    assert method.activation_memory(module.model, larger) > 1.7 * method.activation_memory(module.model, first)


def test_biases_alone_keep_less_than_weights() -> None:
    """No input of a frozen projection is kept, but those of GELU, softmax and norms are."""
    method = TinyTL()
    model, full = tiny("vit"), tiny("vit")
    method.apply(model)
    assert method.activation_memory(model, batch("vit")) > 0
    for place in grafts(model):
        assert place.graft.conv.weight.requires_grad
    biases = tiny("vit").requires_grad_(False)
    for name, p in biases.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    assert method.activation_memory(biases, batch("vit")) < 0.9 * method.activation_memory(full, batch("vit"))


def test_it_may_leave_the_biases() -> None:
    model = tiny("vit")
    TinyTL(biases=False).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * of_one(32, 1) + 99


def test_biases_and_norms_have_no_weight_decay() -> None:
    model, method = tiny("vit"), TinyTL()
    method.apply(model)
    decays = {name for name in collect(model) if not method.optimizer_options(name)}
    assert {name.rpartition("tinytl.")[2] for name in decays} == {"conv.weight", "point.weight", "classifier.weight"}


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("bert", TinyTL(), "BertForSequenceClassification takes no images"),
        ("vit", TinyTL(kernel_size=0), "kernel_size=0"),
        ("vit", TinyTL(target_modules=["mpl"]), r"'mpl' matches no module .*mlp"),
        ("vit", TinyTL(image_size=20), "does not take an image of 3 x 20 x 20"),
        ("vit", TinyTL(target_modules=["vit.layers"]), "vit.layers is no block but a container"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, method: TinyTL, message: str) -> None:
    model = tiny(kind)
    before = snapshot(model, kind)
    with pytest.raises(TuningError, match=message):
        method.apply(model)
    after = snapshot(model, kind)
    assert (after["hooks"], after["modules"], after["requires_grad"]) == (
        before["hooks"], before["modules"], before["requires_grad"]
    )  # fmt: skip
