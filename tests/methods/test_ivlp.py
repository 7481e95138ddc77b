"""IVLP: prompts in the layers of both towers that know nothing of each other."""

from pathlib import Path

import pytest
import torch

from lightning_peft import IVLP, TuningError
from tests import two_towers
from tests.contract import MethodContract, assert_near, shake
from tests.methods.test_coop import CLIP_B16, features
from tests.methods.test_maple import image_by_hand, texts_by_hand
from tests.models import TWO_TOWERS, batch, meta, tiny


class TestIVLP(MethodContract):
    method = IVLP(init=None, num_virtual_tokens=3, num_image_tokens=5, depth=2)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """J (n d + n' d')."""
        return 2 * (3 * 32 + 5 * 32)


def test_counts() -> None:
    model = meta(CLIP_B16)
    IVLP(init=None, image_depth=3).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9 * 4 * 512 + 3 * 4 * 768


@pytest.mark.parametrize("depths", [(1, 2), (2, 1)])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_it_is_the_loop_over_the_layers(kind: str, depths: tuple[int, int]) -> None:
    model, inputs = tiny(kind), batch(kind)
    IVLP(init=None, num_virtual_tokens=3, num_image_tokens=2, depth=depths[0], image_depth=depths[1]).apply(model)
    shake(model)
    texts, images = list(model.towers.ivlp.text), list(model.towers.ivlp.images)
    assert (len(texts), len(images)) == depths
    ours = model.towers.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert_near({"": texts_by_hand(model.towers, kind, texts)}, {"": features(model)}, 1e-5)
    assert_near({"": image_by_hand(model.towers, inputs["pixel_values"], images)}, {"": ours}, 1e-5)


def test_the_first_rows_are_words(tmp_path: Path) -> None:
    model = tiny("clip")
    IVLP(depth=1, tokenizer=str(two_towers.save_tokenizer(tmp_path))).apply(model)
    table = model.towers.text_model.embeddings.token_embedding
    assert torch.equal(model.towers.ivlp.text[0], table.weight[two_towers.CONTEXT])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": 3}, "depth=3 is out of range"),
        ({"image_depth": 3}, "image_depth=3 is out of range"),
        ({"num_image_tokens": 0}, "num_image_tokens=0 is no prompt"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(TuningError, match=said):
        IVLP(**{"init": None, "depth": 2} | arguments).apply(tiny("clip"))
