"""MaPLe: prompts in the layers of both towers, equal to a loop over the layers by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import MaPLe, TuningError
from lightning_peft.towers.contexts import context_of, frozen
from tests import two_towers
from tests.contract import MethodContract, assert_near, output, shake
from tests.methods.test_coop import CLIP_B16, features
from tests.models import TWO_TOWERS, batch, meta, tiny
from tests.two_towers import END, NAMES, START, STOP


class TestMaPLe(MethodContract):
    method = MaPLe(init=None, depth=2)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """J n d + J (d d' + d')."""
        return 2 * 2 * 32 + 2 * (32 * 32 + 32)


def test_counts_of_the_paper() -> None:
    model = meta(CLIP_B16)
    MaPLe(init=None).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_555_072


def image_by_hand(towers: nn.Module, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
    """Return image features, the prompts of the first layers appended and replaced in a loop."""
    vision, count = towers.vision_model, len(prompts[0])
    x = vision.embeddings.forward(pixels)  # without its graft
    x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1)
    if hasattr(vision, "pre_layrnorm"):
        x = vision.pre_layrnorm(x)
    for i, layer in enumerate(vision.encoder.layers):
        if 0 < i < len(prompts):
            x = torch.cat([x[:, :-count], prompts[i].expand(len(x), -1, -1)], 1)
        x = layer.forward(x, None)
    x = x[:, :-count]
    if hasattr(vision, "head"):
        return vision.head(vision.post_layernorm(x))
    return towers.visual_projection(vision.post_layernorm(x[:, 0]))


def texts_by_hand(towers: nn.Module, kind: str, prompts: list[Tensor]) -> Tensor:
    """Return text features, one class at a time, the prompts of the first layers replaced in a loop."""
    text, found, count = towers.text_model, [], len(prompts[0])
    table, start = text.embeddings.token_embedding.weight, 1 if kind == "clip" else 0
    for name in NAMES:
        if kind == "clip":
            x = torch.cat([table[[START]], prompts[0], table[[*name, STOP, END]]])
        else:
            x = torch.cat([prompts[0], table[name]])
            x = torch.cat([x, table[[1]].expand(text.embeddings.position_embedding.num_embeddings - len(x), -1)])
        x = (x + text.embeddings.position_embedding.weight[: len(x)]).unsqueeze(0)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        mask = (seen.tril() if kind == "clip" else seen)[None, None]
        for i, layer in enumerate(text.encoder.layers):
            if 0 < i < len(prompts):
                x = torch.cat([x[:, :start], prompts[i].unsqueeze(0), x[:, start + count :]], 1)
            x = layer.forward(x, mask)
        x = text.final_layer_norm(x)[0, -1]
        found.append(towers.text_projection(x) if kind == "clip" else text.head(x))
    return torch.stack(found)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_it_is_the_loop_over_the_layers(kind: str, depth: int) -> None:
    model, inputs = tiny(kind), batch(kind)
    MaPLe(init=None, depth=depth).apply(model)
    shake(model)
    towers = model.towers
    vision, held = towers.vision_model, towers.maple
    prompts = list(held.text)
    images = [f(p) for f, p in zip(held.projections, prompts, strict=True)]
    assert len(images) == depth
    ours = towers.get_image_features(pixel_values=inputs["pixel_values"])
    assert_near({"": texts_by_hand(towers, kind, prompts)}, {"": features(model)}, 1e-5)
    assert_near({"": image_by_hand(towers, inputs["pixel_values"], images)}, {"": ours.pooler_output}, 1e-5)
    assert ours.last_hidden_state.shape[1] == vision.embeddings.num_positions, "the prompt is taken out"


def test_the_first_rows_are_words_and_the_others_belong_in_the_text(tmp_path: Path) -> None:
    model, tokenizer = tiny("clip"), str(two_towers.save_tokenizer(tmp_path))
    MaPLe(depth=2, tokenizer=tokenizer).apply(model)
    table = model.towers.text_model.embeddings.token_embedding
    assert torch.equal(model.towers.maple.text[0], table.weight[[10, 11]])
    assert context_of(model).template == "of a {}."


def test_the_frozen_model_is_still_there() -> None:
    plain, model = tiny("clip").requires_grad_(False), tiny("clip")
    MaPLe(init=None, depth=2).apply(model)
    with frozen(model):
        assert torch.equal(output(model, "clip"), output(plain, "clip"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": 3}, "depth=3 is out of range: .* has 2 layers"),
        ({"depth": 0}, "depth=0 is out of range"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no"),
        (
            {"num_virtual_tokens": 7, "init": "a photo of a"},
            r"no beginning of init='a photo of a' has 7 tokens \(it has 4",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, said: str, tmp_path: Path) -> None:
    tokenizer = str(two_towers.save_tokenizer(tmp_path))
    with pytest.raises(TuningError, match=said):
        MaPLe(**{"init": None, "depth": 2, "tokenizer": tokenizer} | arguments).apply(tiny("clip"))
