"""CoOp, KgCoOp, MaPLe and IVLP in a model of open_clip's structure are what they are in transformers' CLIP."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IVLP, CoOp, KgCoOp, MaPLe, Method, TuningError, collect, muted
from lightning_peft.core.graft import grafts
from lightning_peft.towers.plain_text import plain_text
from tests.models import tiny
from tests.towers.open_clip import OpenCLIP
from tests.two_towers import written

M = 3


def models() -> tuple[nn.Module, OpenCLIP, Tensor]:
    """Return CLIP, the same with other names, and texts of as many tokens as it has positions."""
    clip = tiny("clip").base_model.eval()
    texts = written("clip", [], length=clip.config.text_config.max_position_embeddings)
    ends = texts.argmax(1, keepdim=True)
    own = OpenCLIP(clip).eval().requires_grad_(False)  # where weights learn, torch's attention takes another path
    return clip, own, torch.where(torch.arange(texts.shape[1]) > ends, 0, texts)


@pytest.mark.parametrize(
    "arguments", [{}, {"position": "middle"}, {"position": "front"}, {"class_specific": True, "num_classes": 3}]
)
def test_a_context_is_that_in_transformers(arguments: dict[str, object]) -> None:
    clip, own, texts = models()
    names = list(own.state_dict())
    with torch.no_grad():
        before = own.encode_text(texts)
    torch.testing.assert_close(before, clip.get_text_features(texts).pooler_output, atol=1e-5, rtol=1e-5)
    methods = [CoOp(num_virtual_tokens=M, **arguments) for _ in range(2)]
    for method, model in zip(methods, (clip, own), strict=True):
        method.apply(model)
    methods[0].context(clip).data.copy_(methods[1].context(own).data.normal_())
    features = own.encode_text(texts)
    torch.testing.assert_close(features, clip.get_text_features(texts).pooler_output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features, before, atol=1e-2)
    features.sum().backward()
    assert bool(own.token_embedding.coop.weight.grad.abs().sum())
    assert [name for name, p in own.named_parameters() if p.requires_grad] == ["token_embedding.coop.weight"]
    assert list(collect(own)) == ["token_embedding.coop.weight"]
    with muted(own), torch.no_grad():
        assert torch.equal(own.encode_text(texts), before)
    methods[1].remove(own)
    assert list(own.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(own.encode_text(texts), before)


def test_it_is_found_below_a_module_and_has_room_for_so_much() -> None:
    _, own, texts = models()
    module = nn.ModuleDict({"model": own, "other": nn.Linear(2, 2)})
    found = plain_text(module)
    assert found is not None
    assert (found.model, found.table, found.norm) == (own, own.token_embedding, own.ln_final)
    CoOp(num_virtual_tokens=found.positions - 1).apply(module)
    with pytest.raises(TuningError, match="shorten the text or the context"):
        own.encode_text(texts)


PROMPTS = (
    MaPLe(init=None, depth=2),
    MaPLe(init=None, depth=1, num_virtual_tokens=3),
    IVLP(init=None, depth=2, image_depth=1),
    KgCoOp(init=None, num_virtual_tokens=M, words=[10, 11]),
)


@pytest.mark.parametrize("method", PROMPTS, ids=lambda method: type(method).__name__)
def test_prompts_in_both_towers_and_a_pulled_context_are_those_in_transformers(method: Method) -> None:
    clip, own, texts = models()
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    twins = [copy.deepcopy(method), copy.deepcopy(method)]
    with torch.no_grad():
        before = own.encode_text(texts), own.encode_image(image)
    for twin, model in zip(twins, (clip, own), strict=True):
        twin.apply(model)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (clip, own)]
    errors = []
    with torch.no_grad():
        for one, other in zip(*trained, strict=True):
            other.copy_(one.normal_())
    expected = clip.get_text_features(texts).pooler_output, clip.get_image_features(image).pooler_output
    found = own.encode_text(texts), own.encode_image(image)
    for twin, model, features in zip(twins, (clip, own), (expected, found), strict=True):
        penalty = twin.penalty(model)
        errors.append(features[0].sum() + features[1].sum() + (0.0 if penalty is None else penalty))
        errors[-1].backward()
    torch.testing.assert_close([*found, errors[1]], [*expected, errors[0]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], before[0], atol=1e-2)
    torch.testing.assert_close([p.grad for p in trained[1]], [p.grad for p in trained[0]], atol=1e-5, rtol=1e-4)
    twins[1].remove(own)
    with torch.no_grad():
        assert torch.equal(own.encode_text(texts), before[0])
        assert torch.equal(own.encode_image(image), before[1])


class OtherProjection(OpenCLIP):
    """Its features of texts go through one thing more."""

    def encode_text(self, text: Tensor) -> Tensor:
        return super().encode_text(text).cumsum(-1)


def test_a_pull_of_features_that_nobody_knows_is_refused_and_coop_is_not() -> None:
    own = OtherProjection(models()[0]).eval()
    with pytest.raises(TuningError, match=r"something else than a text_projection.* take CoOp"):
        KgCoOp(init=None, num_virtual_tokens=M, words=[10]).apply(own)
    assert not list(grafts(own))
    CoOp(num_virtual_tokens=M).apply(own)


@pytest.mark.parametrize("method", [CoOp(), MaPLe(init=None, depth=1)], ids=lambda method: type(method).__name__)
def test_what_does_not_fit_is_refused(method: Method) -> None:
    own = OpenCLIP(models()[0], pool="last")
    with pytest.raises(TuningError, match="does not read a text at its end"):
        method.apply(own)
    assert not list(grafts(own))
    assert own.training
