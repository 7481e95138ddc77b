"""CLIP-Adapter: ``a A(f) + (1 - a) f`` of images or texts, and features of images that are kept."""

import pytest
import torch
import torch.nn.functional as F

from lightning_peft import ClipAdapter, LoRA, TuningError
from lightning_peft.towers import clip
from tests.contract import MethodContract, assert_near, output, shake
from tests.methods.test_coop import CLIP_B16, features
from tests.models import TWO_TOWERS, batch, meta, tiny


class TestClipAdapter(MethodContract):
    method = ClipAdapter(ratio=0.5, text_ratio=0.3)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """2 p (p / 4) for each tower."""
        return 2 * 2 * 32 * 8


def test_counts_of_the_paper() -> None:
    model = meta(CLIP_B16)
    ClipAdapter().apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 512 * 128


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_it_is_the_formula(kind: str) -> None:
    model, plain, inputs = tiny(kind), tiny(kind), batch(kind)
    ClipAdapter(ratio=0.4, text_ratio=0.3).apply(model)
    shake(model)
    found = []
    for end, ratio, bare in (
        ("visual_projection" if kind == "clip" else "vision_model", 0.4, _images(plain, inputs)),
        ("text_projection" if kind == "clip" else "text_model", 0.3, features(plain)),
    ):
        graft = model.towers.get_submodule(end).clipadapter
        changed = torch.clamp(graft.up.weight @ torch.clamp(graft.down.weight @ bare.t(), min=0), min=0).t()
        found.append(F.normalize(ratio * changed + (1 - ratio) * bare, dim=1))
    bias = plain.towers.logit_bias if kind == "siglip" else 0
    expected = plain.towers.logit_scale.exp() * found[0] @ found[1].t() + bias
    assert_near({"": expected}, {"": output(model, kind)}, 1e-5)


def _images(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.towers.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_features_of_images_can_be_kept_in_front_of_it(kind: str) -> None:
    model, plain, inputs = tiny(kind), tiny(kind), batch(kind)
    ClipAdapter().apply(model)
    shake(model)
    assert clip.images_are_frozen(model.towers)
    with clip.bare_features(model.towers):
        kept = clip.image_features(model.towers, inputs["pixel_values"])
    assert_near({"": kept}, {"": _images(plain, inputs)}, 1e-6)
    assert_near({"": _images(model, inputs)}, {"": clip.adapted(model.towers, kept)}, 1e-6)
    LoRA(r=2, target_modules=r".*vision_model.*q_proj").apply(model)
    assert not clip.images_are_frozen(model.towers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.5}, r"ratio=1\.5 is no share"),
        ({"ratio": 0.0}, "ratio=0 and text_ratio=0 leave nothing to train"),
        ({"reduction": 33}, "reduction=33 leaves nothing of 32 features: take 32 at most"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny("clip")
    with pytest.raises(TuningError, match=message):
        ClipAdapter(**arguments).apply(model)
    with pytest.raises(TuningError, match="no text tower like that of CLIP"):
        ClipAdapter().apply(tiny("bert"))
    ClipAdapter(reduction=32).apply(model)
