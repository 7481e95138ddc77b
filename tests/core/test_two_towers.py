"""Two processes on the CPU (gloo) with a sharded CLIP have the gradients of one; text towers are found."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from lightning_peft import CoOp, MaPLe, TuningError
from lightning_peft.towers import clip
from lightning_peft.towers.text_towers import ends_of, text_tower
from tests import fsdp_clip
from tests.contract import assert_near, assert_same
from tests.models import tiny
from tests.processes import TORCHRUN, run_module


@pytest.mark.slow
def test_two_ranks_of_a_sharded_clip_are_one(tmp_path: Path) -> None:
    run_module("tests.fsdp_clip", tmp_path, folder=tmp_path, before=TORCHRUN)
    texts = tiny("clip").texts
    for name, method in fsdp_clip.cases().items():
        one = fsdp_clip.gradients(fsdp_clip.tuned(method), texts)
        ranks = [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in (0, 1)]
        assert_same(*ranks)
        assert_near(one, ranks[0], 1e-5)
        assert all(gradient.abs().max() > 0 for gradient in one.values())


def test_the_tower_is_found_in_a_model_that_is_built_around() -> None:
    model = tiny("clip")
    assert text_tower(model, "CoOp") is model.towers.text_model
    assert text_tower(model.towers, "CoOp") is model.towers.text_model
    with_projection = hf.CLIPTextModelWithProjection(model.towers.config.text_config).eval()
    CoOp(num_virtual_tokens=4).apply(with_projection)
    with torch.no_grad():
        assert with_projection(input_ids=model.texts).text_embeds.shape == (3, 512)
    with pytest.raises(TuningError, match="has no vision tower"):
        MaPLe(init=None, depth=1).apply(hf.CLIPTextModelWithProjection(model.towers.config.text_config))


def test_texts_end_where_they_are_read() -> None:
    assert ends_of(tiny("clip").towers.text_model, tiny("clip").texts).tolist() == [3, 4, 5]
    assert ends_of(tiny("siglip").towers.text_model, tiny("siglip").texts).tolist() == [1, 2, 3]


def test_names_become_texts() -> None:
    assert clip.class_texts(["red_star", "b"], "a {} here") == ["a red star here", "a b here"]
