"""KgCoOp: CoOp with a pull towards hand-written texts, by the authors' formula."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_peft import CoOp, KgCoOp, TuningError, from_delta, save_delta
from tests import two_towers
from tests.contract import MethodContract, output, shake
from tests.methods.test_coop import features
from tests.models import TWO_TOWERS, batch, tiny
from tests.two_towers import CONTEXT, with_context, written


class TestKgCoOp(MethodContract):
    method = KgCoOp(init=None, num_virtual_tokens=4, words=CONTEXT)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """M d."""
        return 4 * 32


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_the_penalty_is_that_of_the_formula_with_its_gradient(kind: str, share_prefix: bool) -> None:
    model, plain = tiny(kind), tiny(kind)
    method = KgCoOp(init=None, num_virtual_tokens=5, words=CONTEXT, pull=3.0, share_prefix=share_prefix)
    method.apply(model)
    shake(model)
    model(**batch(kind))
    assert method.penalty(copy.deepcopy(model)) is None  # a copy is of no call
    penalty = method.penalty(model)
    assert method.penalty(model) is None
    rows = method.context(model)
    ours = F.normalize(with_context(plain.towers, kind, rows.expand(3, -1, -1), "end"), dim=1)
    theirs = F.normalize(features(plain, written(kind, CONTEXT)), dim=1)
    expected = 3.0 * (1 - (ours * theirs).sum(1)).mean()
    torch.testing.assert_close(penalty, expected)
    weight = model.towers.text_model.embeddings.token_embedding.kgcoop.weight
    found, wanted = (torch.autograd.grad(loss, weight)[0] for loss in (penalty, expected))
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_it_computes_what_coop_does_and_starts_without_a_penalty(tmp_path: Path) -> None:
    tokenizer = str(two_towers.save_tokenizer(tmp_path / "words"))
    model, other = tiny("clip"), tiny("clip")
    method = KgCoOp(tokenizer=tokenizer)
    method.apply(model)
    CoOp(init="a photo of a", tokenizer=tokenizer).apply(other)
    assert torch.equal(output(model, "clip"), output(other, "clip"))
    model(**batch("clip"))
    assert method.penalty(model).abs() < 1e-5, "the context is the written words"
    assert method.words == CONTEXT
    file = save_delta(model, tmp_path / "delta.safetensors")
    assert torch.equal(output(from_delta(file, tiny("clip")), "clip"), output(model, "clip"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": []}, r"words=\[\] are no words"),
        ({"words": [100]}, r"words=\[100\] are no words of a table of 100"),
        ({"pull": 0.0}, r"pull=0\.0 pulls nowhere: take more than 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny("clip")
    with pytest.raises(TuningError, match=message):
        KgCoOp(**{"init": None, "words": CONTEXT} | arguments).apply(model)
    KgCoOp(init=None, words=CONTEXT).apply(model)
