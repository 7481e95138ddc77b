"""OFT: ``h = W Rᵀ x``, R orthogonal in blocks: its counts, that it stays orthogonal, its weights, and PEFT's."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lightning_peft import OFT, TuningError, merge
from lightning_peft.core.graft import grafts
from tests.contract import MethodContract, assert_near, descend, output
from tests.interop.twins import check_twin, shaken
from tests.models import tiny

SIZE = 8


class TestOFT(MethodContract):
    method = OFT(block_size=SIZE)
    backbones = ("bert", "gpt2")
    on_families = (("oft", OFT(block_size=4)),)
    traces_backward = True

    def count(self, kind: str) -> int:
        """L (in / b) b (b - 1) / 2 for each target."""
        return 2 * (32 // SIZE) * (SIZE * (SIZE - 1) // 2) * {"bert": 2, "gpt2": 1}[kind]


def rotation(graft: nn.Module) -> torch.Tensor:
    """Return R as a matrix, by the formula of the Cayley transform."""
    blocks = []
    for row in graft.Q.double().detach():
        q = torch.zeros(SIZE, SIZE, dtype=torch.double)
        entries = iter(row)
        for i in range(SIZE):
            for j in range(i + 1, SIZE):
                q[i, j] = next(entries)
                q[j, i] = -q[i, j]
        eye = torch.eye(SIZE, dtype=torch.double)
        blocks.append((eye - q) @ torch.linalg.inv(eye + q))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_formula_and_the_merged_weight(kind: str) -> None:
    model = shaken(kind, OFT(block_size=SIZE, target_modules="all-linear"))
    for place in grafts(model):
        r = rotation(place.graft)
        bare = tiny(kind).get_submodule(place.path).double()
        x = torch.randn(3, 2, len(r))
        assert_near({"": bare(x.double() @ r)}, {"": place.host(x).double()}, 1e-5)
    live = output(model, kind)
    assert_near({"": live}, {"": output(merge(copy.deepcopy(model)), kind)}, 1e-5)


def test_it_is_orthogonal_after_100_steps() -> None:
    model, method = tiny("bert"), OFT(block_size=SIZE)
    method.apply(model)
    descend(model, "bert", method, steps=100, lr=1e-2, optimizer=torch.optim.Adam)
    for place in grafts(model):
        r = place.graft.turn().detach() + torch.eye(SIZE)
        assert (r - torch.eye(SIZE)).abs().max() > 0.1, "nothing was turned"
        assert (r @ r.mT - torch.eye(SIZE)).abs().max() < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_peft_has_the_same(exact: bool, tmp_path: Path) -> None:
    config = peft.OFTConfig(
        oft_block_size=SIZE,
        target_modules=["q_proj", "down_proj"],
        use_cayley_neumann=not exact,
        task_type="CAUSAL_LM",
    )
    check_twin("llama", config, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 6}, r"block_size=6 does not divide 32, which is the input of .*query: take 8,"),
        ({"block_size": 1}, "block_size=1 is no size of a block: take 2 or more"),
        ({"num_cayley_neumann_terms": 3}, "num_cayley_neumann_terms=3 is out of range: take 4 or more"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny("bert")
    with pytest.raises(TuningError, match=message):
        OFT(**arguments).apply(model)
    OFT(block_size=8).apply(model)
