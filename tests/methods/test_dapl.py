"""DAPL: prompts of two domains, whose logits stand side by side."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import DAPL, TuningError
from lightning_peft.towers.clip import text_features
from lightning_peft.towers.contexts import frozen
from tests.contract import MethodContract, assert_near, output, shake
from tests.methods.test_coop import CLIP_B16, features
from tests.models import TWO_TOWERS, batch, meta, tiny
from tests.two_towers import with_context


class TestDAPL(MethodContract):
    method = DAPL(num_virtual_tokens=3, num_domain_tokens=2)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """M1 d + D M2 d."""
        return 3 * 32 + 2 * 2 * 32


@pytest.mark.parametrize(("classes", "count"), [(None, 24_576), (12, 114_688)])
def test_counts_of_the_paper(classes: int | None, count: int) -> None:
    model = meta(CLIP_B16)
    DAPL(class_specific=classes is not None, num_classes=classes).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def tuned(kind: str = "clip", **arguments: object) -> nn.Module:
    model = tiny(kind)
    DAPL(num_virtual_tokens=3, num_domain_tokens=2, **arguments).apply(model)
    shake(model)
    return model


def tokens_of(model: nn.Module) -> nn.Module:
    return model.towers.text_model.embeddings.token_embedding.dapl


@pytest.mark.parametrize("class_specific", [True, False])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_prompts_are_those_of_the_formulas(kind: str, share_prefix: bool, class_specific: bool) -> None:
    number = {"class_specific": True, "num_classes": 3} if class_specific else {}
    model = tuned(kind, share_prefix=share_prefix, **number)
    tokens, ours = tokens_of(model), features(model)
    common = tokens.weight.view(3, 3, -1) if class_specific else tokens.weight.expand(3, -1, -1)
    for domain in (0, 1):
        contexts = torch.cat([common, tokens.domains[domain].expand(3, -1, -1)], 1)
        expected = with_context(model.towers, kind, contexts, "end")
        assert_near({"": expected}, {"": ours[3 * domain : 3 * domain + 3]}, 1e-5)
        alone = text_features(model.towers, model.texts, variant=domain)
        assert_near({"": expected}, {"": alone}, 1e-5)


def test_the_frozen_model_gives_the_naive_logits() -> None:
    plain, model = tiny("clip").requires_grad_(False), tuned()
    assert output(model, "clip").shape == (4, 6)
    with frozen(model):
        assert torch.equal(output(model, "clip"), output(plain, "clip"))


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, tokens_of(model).domains)[0].abs().amax((1, 2))


def test_only_a_contrast_of_both_domains_reaches_both() -> None:
    """Columns are source, then target; K-way losses leave the other domain's vectors alone, 2K-way losses do not."""
    model, inputs = tuned(), batch("clip")
    labels = inputs.pop("labels")
    for columns, zero in ((slice(0, 3), [False, True]), (slice(3, 6), [True, False]), (slice(0, 6), [False, False])):
        found = gradients(model, F.cross_entropy(model(**inputs).logits[:, columns], labels))
        assert [value == 0 for value in found.tolist()] == zero
    logits = model(**inputs).logits
    assert F.cross_entropy(logits, labels) >= F.cross_entropy(logits[:, :3], labels)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"domains": 1}, "domains=1 is out of range: take 2 or more"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is out of range"),
        ({"num_domain_tokens": 0}, "num_domain_tokens=0 is out of range"),
        ({"class_specific": True}, "do not go together"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(TuningError, match=said):
        DAPL(**arguments).apply(tiny("clip"))
