"""DualPrompt: general and expert prompts written out by hand, the choice of a task, the pull, and what tasks train."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import DualPrompt, TuningError
from lightning_peft.methods.dual_prompt import DualPrompts
from tests.contract import MethodContract, assert_near
from tests.models import HIDDEN, batch, tiny

SIZES: dict[str, Any] = {
    "num_tasks": 3,
    "general_length": 2,
    "expert_length": 3,
    "general_layers": [0],
    "expert_layers": [1],
}


class TestDualPrompt(MethodContract):
    method = DualPrompt(**SIZES)
    backbones = ("vit", "dinov2_registers")
    compiled = ("vit",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """2 L_g d for each general block, T 2 L_e d for each expert one, and T keys."""
        return (2 * 2 + 3 * 2 * 3 + 3) * HIDDEN


def applied(**arguments: Any) -> tuple[nn.Module, DualPrompt, DualPrompts]:
    model, method = tiny("vit"), DualPrompt(**SIZES | arguments)
    method.apply(model)
    return model, method, model.vit.dualprompt


def query_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return [CLS] of the frozen model."""
    with torch.no_grad():
        return model.vit(pixels).last_hidden_state[:, 0]


def with_prefixes(model: nn.Module, pixels: Tensor, prefixes: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Return the logits of a plain ViT with these keys and values [B, P, d] in its blocks, by formulas alone."""
    vit = model.vit
    x = vit.embeddings(pixels)
    for i, layer in enumerate(vit.layers):
        y, attention = layer.layernorm_before(x), layer.attention
        q, k, v = (project(y) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        if i in prefixes:
            k, v = (torch.cat([rows, own], 1) for rows, own in zip(prefixes[i], (k, v), strict=True))
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
        shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + attention.o_proj((shares @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.classifier(vit.layernorm(x)[:, 0])


@pytest.mark.parametrize("begun", [1, 2, 3])
def test_an_image_takes_the_prompts_of_the_nearest_task_that_has_begun(begun: int) -> None:
    model, method, pool = applied(pull=0.7)
    pixels = batch("vit", size=8)["pixel_values"]
    plain = tiny("vit")
    query = query_of(plain, pixels)
    cosine = F.cosine_similarity(query[:, None], pool.keys[None], dim=-1)
    method.on_task_start(None, model, begun - 1)
    chosen = cosine[:, :begun].argmax(1)
    assert begun < 3 or len(set(chosen.tolist())) > 1
    prefixes = {
        0: tuple(pool.general[0, i].expand(8, -1, -1) for i in range(2)),
        1: tuple(pool.expert[chosen, 0, i] for i in range(2)),
    }
    assert_near({"": with_prefixes(plain, pixels, prefixes)}, {"": model(pixels).logits}, 1e-5)
    wanted = 0.7 * (1 - cosine.gather(1, chosen[:, None])).mean()
    assert torch.allclose(method.penalty(model), wanted, atol=1e-5)
    assert method.penalty(model) is None


def test_training_takes_the_prompts_of_its_task_and_leaves_the_others() -> None:
    model, method, pool = applied()
    method.on_task_start(None, model, 1)
    inputs = batch("vit")
    plain, pixels = tiny("vit"), inputs["pixel_values"]
    model.train()
    out = model(**inputs)
    prefixes = {
        0: tuple(pool.general[0, i].expand(4, -1, -1) for i in range(2)),
        1: tuple(pool.expert[1, 0, i].expand(4, -1, -1) for i in range(2)),
    }
    assert_near({"": with_prefixes(plain, pixels, prefixes)}, {"": out.logits}, 1e-5)
    (out.loss + method.penalty(model)).backward()
    for parameter in (pool.expert, pool.keys):
        moved = parameter.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_layers": [0, 1]}, r"general_layers=\[0\] and expert_layers=\[0, 1\] must share no block"),
        ({"expert_layers": []}, "must share no block, and the second must have one"),
        ({"expert_layers": [2]}, "block 2 gets prompts, and ViTForImageClassification has blocks 0 to 1"),
        ({"general_layers": [-1]}, r"general_layers=\[-1\] is out of range: take 0 or more"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        applied(**arguments)
    with pytest.raises(TuningError, match="prompts are chosen by the"):
        DualPrompt(**SIZES).apply(tiny("swin"))


def test_more_tasks_than_prompts_are_refused() -> None:
    model, method, _ = applied()
    with pytest.raises(TuningError, match="task 3 begins, and num_tasks=3: give as many as there are"):
        method.on_task_start(None, model, 3)
