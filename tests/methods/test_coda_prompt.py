"""CODA-Prompt: weighted sums of components written out by hand, the overlap, and what tasks train."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import CODAPrompt, TuningError
from lightning_peft.methods.coda_prompt import Components
from tests.contract import MethodContract, assert_near, shake
from tests.methods.test_dual_prompt import query_of, with_prefixes
from tests.models import HIDDEN, batch, tiny

M, LENGTH = 6, 4
SIZES: dict[str, Any] = {"num_tasks": 1, "components": M, "length": LENGTH, "layers": [0, 1]}


class TestCODAPrompt(MethodContract):
    method = CODAPrompt(**SIZES)
    backbones = ("vit", "dinov2_registers")
    compiled = ("vit",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """M (L + 2) d for each block."""
        return 2 * M * (LENGTH + 2) * HIDDEN


def applied(**arguments: Any) -> tuple[nn.Module, CODAPrompt, Components]:
    model, method = tiny("vit"), CODAPrompt(**SIZES | arguments)
    method.apply(model)
    shake(model)
    return model, method, model.vit.codaprompt


def sums(pool: Components, query: Tensor, layer: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the prompt of each image as the formula has it, its halves apart."""
    total = torch.zeros(len(query), LENGTH, HIDDEN)
    for m in range(count):
        weight = F.cosine_similarity(query * pool.attentions[layer, m], pool.keys[layer, m][None], dim=-1)
        total = total + weight.view(-1, 1, 1) * pool.prompts[layer, m]
    return total[:, : LENGTH // 2], total[:, LENGTH // 2 :]


@pytest.mark.parametrize("begun", [1, 2, 3])
def test_it_is_the_weighted_sum_of_the_components_so_far(begun: int) -> None:
    model, method, pool = applied(num_tasks=3)
    plain, pixels = tiny("vit"), batch("vit")["pixel_values"]
    plain.classifier.load_state_dict(model.classifier.state_dict())
    method.redraw = False
    method.on_task_start(None, model, begun - 1)
    query = query_of(plain, pixels)
    prefixes = {layer: sums(pool, query, layer, 2 * begun) for layer in (0, 1)}
    assert_near({"": with_prefixes(plain, pixels, prefixes)}, {"": model(pixels).logits}, 1e-5)
    overlap = 0.0
    for part in (pool.prompts, pool.attentions, pool.keys):
        for block in part:
            rows = block[: 2 * begun].flatten(1)
            overlap = overlap + ((rows @ rows.t() - torch.eye(2 * begun)) ** 2).mean()
    torch.testing.assert_close(method.penalty(model), 0.1 * overlap)


def test_components_start_orthogonal_and_those_of_earlier_tasks_are_left() -> None:
    model, method = tiny("vit"), CODAPrompt(**SIZES | {"num_tasks": 3})
    method.apply(model)
    method.on_task_start(None, model, 2)
    assert model.vit.codaprompt.overlap() < 1e-9
    method.on_task_start(None, model, 1)
    shake(model)
    (model(**batch("vit")).loss + method.penalty(model)).backward()
    for part in (model.vit.codaprompt.prompts, model.vit.codaprompt.attentions, model.vit.codaprompt.keys):
        moved = part.grad.transpose(0, 1).flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, False, True, True, False, False]


def test_components_of_a_task_are_drawn_when_it_begins() -> None:
    """Orthonormal, and orthogonal to what the earlier ones have become; a run that resumes in a task leaves them."""
    model, method, pool = applied(num_tasks=3)
    before = copy.deepcopy(pool)
    method.on_task_start(None, model, 1)
    for name in ("prompts", "attentions", "keys"):
        old, new = before.get_parameter(name), pool.get_parameter(name)
        assert torch.equal(old[:, [0, 1, 4, 5]], new[:, [0, 1, 4, 5]])
        for block in new.flatten(2):
            mine = block[2:4]
            torch.testing.assert_close(mine @ mine.t(), torch.eye(2))
            assert (mine @ block[:2].t()).abs().max() < 1e-5
    drawn = copy.deepcopy(pool.state_dict())
    method.on_task_start(None, model, 1)
    assert_near(drawn, pool.state_dict(), 0)
    method.on_task_start(None, model, 2)
    assert torch.equal(drawn["keys"][:, :4], pool.keys[:, :4])
    assert not torch.equal(drawn["keys"][:, 4:], pool.keys[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (
            {"num_tasks": 4},
            r"num_tasks=4 does not divide 6, .* number of components: take 3\.",
            {"num_tasks": 3},
        ),
        ({"length": 3}, "length=3 has no half for keys and one for values: take 4", {"length": 4}),
        ({"components": 33}, "components=33 cannot be orthogonal in 32 features: take 32", {"components": 32}),
        ({"layers": []}, r"layers=\[\] leaves no block", {}),
        ({"layers": [2]}, "block 2 gets prompts", {}),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str, remedy: dict) -> None:
    with pytest.raises(TuningError, match=message):
        applied(**arguments)
    applied(**remedy)


def test_more_tasks_than_components_are_refused() -> None:
    model, method, _ = applied()
    with pytest.raises(TuningError, match="task 1 begins, and num_tasks=1"):
        method.on_task_start(None, model, 1)
