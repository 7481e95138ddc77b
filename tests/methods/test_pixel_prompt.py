"""PixelPrompt: a frame of pixels around the image, or over it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import PixelPrompt, TuningError, activate, collect, routed
from tests.contract import MethodContract, assert_near
from tests.models import HIDDEN, batch, tiny


class TestPixelPrompt(MethodContract):
    method = PixelPrompt(pixels=2, image_size=16)
    backbones = ("resnet",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """2 p C (W + 2 p + H)."""
        return 2 * 2 * 3 * (16 + 4 + 16)

    def test_routed_each_row_is_as_alone(self, kind: str, tmp_path: Path) -> None:
        """Rows with a frame and rows without have unlike sizes, so that they are no batch."""
        model = tiny(kind)
        PixelPrompt(pixels=2, image_size=16, name="framed").apply(model)
        with routed(model, ["framed", None]), pytest.raises(TuningError, match="which are no batch"):
            model(batch(kind, size=2)["pixel_values"])
        activate(model, "framed")
        alone = model(batch(kind, size=2)["pixel_values"]).logits
        with routed(model, ["framed", "framed"]):
            assert torch.allclose(model(batch(kind, size=2)["pixel_values"]).logits, alone, atol=1e-5)

    def test_gradient_checkpointing_gives_the_same_gradients(self, kind: str) -> None:
        """By torch's own, since ResNet has none in transformers."""
        found = []
        for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
            model = tiny(kind)
            torch.manual_seed(0)
            self.applied(model)
            run(model, batch(kind)["pixel_values"]).logits.square().sum().backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert_near(*found, 1e-5)


class TestOver(MethodContract):
    method = PixelPrompt(pixels=2, form="over", image_size=16)
    backbones = ("vit", "clip_image")
    identity_at_start = False

    def count(self, kind: str) -> int:
        """2 p C (W + H - 2 p)."""
        return 2 * 2 * 3 * (16 + 16 - 4)


def test_around_it_is_an_image_with_a_border() -> None:
    model, x = tiny("resnet"), batch("resnet")["pixel_values"]
    plain = tiny("resnet")
    method = PixelPrompt(pixels=3, image_size=16)
    method.apply(model)
    frame = collect(model)
    rows, columns = (next(v for n, v in frame.items() if n.endswith(end)) for end in (".ends", ".sides"))
    larger = F.pad(x, (3, 3, 3, 3))
    larger[:, :, :3], larger[:, :, -3:] = rows[:, :3], rows[:, 3:]
    larger[:, :, 3:-3, :3], larger[:, :, 3:-3, -3:] = columns[:, :, :3], columns[:, :, 3:]
    assert torch.equal(larger[:, :, 3:-3, 3:-3], x)
    with torch.no_grad():
        assert torch.allclose(model(x).logits, plain(larger).logits, atol=1e-6)


def test_over_it_is_added_to_the_outermost_pixels() -> None:
    model, x = tiny("vit"), batch("vit")["pixel_values"]
    plain = tiny("vit")
    PixelPrompt(pixels=3, form="over").apply(model)
    frame = collect(model)
    rows, columns = (next(v for n, v in frame.items() if n.endswith(end)) for end in (".ends", ".sides"))
    added = torch.zeros_like(x)
    added[:, :, :3], added[:, :, -3:] = rows[:, :3], rows[:, 3:]
    added[:, :, 3:-3, :3], added[:, :, 3:-3, -3:] = columns[:, :, :3], columns[:, :, 3:]
    assert not added[:, :, 3:-3, 3:-3].any()
    with torch.no_grad():
        assert torch.allclose(model(x).logits, plain(x + added).logits, atol=1e-6)


@pytest.mark.parametrize("form", ["around", "over"])
def test_initial_values(form: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, HIDDEN, 3))
    PixelPrompt(pixels=20, form=form, image_size=200).apply(model)
    pixels = torch.cat([value.flatten(1) for value in collect(model).values() if value.ndim == 3], dim=1)
    if form == "over":
        assert pixels.mean().abs() < 0.02
        assert (pixels.std() - 1).abs() < 0.02
        return
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = pixels * std[:, None] + mean[:, None]
    assert colours.min() >= -1e-6
    assert colours.max() <= 1 + 1e-6
    assert torch.allclose(colours.mean(1), torch.tensor(0.5), atol=0.01)


def test_the_image_must_fit() -> None:
    model = tiny("resnet")
    PixelPrompt(image_size=20).apply(model)
    with pytest.raises(TuningError, match=r"an image of \(16, 16\) pixels does not fit the frame, .* \(20, 20\)"):
        model(batch("resnet")["pixel_values"])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("vit", {}, "takes images of one size alone: take form='over', or VPT"),
        ("bert", {}, "has no convolution that reads the pixels"),
        ("vit", {"form": "over", "pixels": 8}, "pixels=8 covers all of an image of 16 by 16: take 7 or less"),
        ("vit", {"pixels": 0}, "pixels=0 is no frame"),
        ("vit", {"form": "below"}, "form='below' is no place of a frame"),
    ],
)
def test_what_is_refused(kind: str, arguments: dict, message: str) -> None:
    model = tiny(kind)
    with pytest.raises(TuningError, match=message):
        PixelPrompt(**arguments).apply(model)


def test_the_remedy_for_images_of_one_size() -> None:
    model = tiny("vit")
    PixelPrompt(form="over").apply(model)
    loss = model(**batch("vit")).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
