"""CoCoOp: a batch is the loop over its images; with a network of zeros it is CoOp."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import CoCoOp, CoOp, TuningError
from lightning_peft.towers.clip import depends_on_images, image_features, similarity, text_features
from tests.contract import MethodContract, assert_near, output, shake
from tests.methods.test_coop import CLIP_B16
from tests.models import HIDDEN, TWO_TOWERS, batch, meta, tiny
from tests.two_towers import with_context


class TestCoCoOp(MethodContract):
    method = CoCoOp(num_virtual_tokens=4, init=None)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """M d + p p/16 + p/16 + p/16 d + d."""
        return 4 * 32 + 32 * 2 + 2 + 2 * 32 + 32


def test_counts_of_the_paper() -> None:
    model = meta(CLIP_B16)
    CoCoOp(init=None).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 35_360


def tuned(kind: str, **arguments: object) -> nn.Module:
    model = tiny(kind)
    torch.manual_seed(1)
    CoCoOp(num_virtual_tokens=4, init=None, **arguments).apply(model)
    shake(model)
    return model


@pytest.mark.parametrize("chunk", [None, 1, 5, 8])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_a_batch_is_the_loop_over_its_images(kind: str, share_prefix: bool, chunk: int | None) -> None:
    model, inputs = tuned(kind, share_prefix=share_prefix, chunk=chunk), batch(kind, size=5)
    tokens = model.towers.text_model.embeddings.token_embedding.cocoop
    logits = []
    for pixels in inputs["pixel_values"]:
        image = image_features(model.towers, pixels.unsqueeze(0))
        context = tokens.weight + tokens.meta_net(F.normalize(image, dim=1))
        features = with_context(model.towers, kind, context.expand(3, -1, -1), "end")
        logits.append(similarity(model.towers, image, features))
    expected = torch.cat(logits)
    ours = model(**inputs)
    assert_near({"": expected}, {"": ours.logits}, 1e-5)
    loss = F.cross_entropy(expected, inputs["labels"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for theirs, mine in zip(*(torch.autograd.grad(x, trained) for x in (loss, ours.loss)), strict=True):
        assert_near({"": theirs}, {"": mine}, 1e-5)


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_a_network_of_zeros_makes_it_coop(kind: str) -> None:
    model, plain = tuned(kind), tiny(kind)
    method = CoOp(num_virtual_tokens=4)
    method.apply(plain)
    tokens = model.towers.text_model.embeddings.token_embedding.cocoop
    with torch.no_grad():
        nn.init.zeros_(tokens.meta_net[2].weight)
        nn.init.zeros_(tokens.meta_net[2].bias)
        method.context(plain).copy_(tokens.weight)
    assert_near({"": output(plain, kind)}, {"": output(model, kind)}, 1e-5)


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_features_of_images_may_be_had_before(kind: str) -> None:
    model, inputs = tuned(kind), batch(kind)
    with torch.no_grad():
        images = image_features(model.towers, inputs["pixel_values"])
        texts = text_features(model.towers, model.texts, images)
        assert texts.shape == (4, 3, HIDDEN)
        assert_near({"": output(model, kind)}, {"": similarity(model.towers, images, texts)}, 1e-5)
    assert depends_on_images(model)
    with pytest.raises(
        TuningError, match="prompts depend on the image: call the model with input_ids and pixel_values"
    ):
        model.towers.get_text_features(input_ids=model.texts)


def test_no_tensor_stays_behind() -> None:
    model = tuned("clip")
    output(model, "clip")
    call = model.towers.text_model.cocoop.call
    assert (call.images, call.shift, call.variant, call.listens) == (None, None, None, False)
    with pytest.raises(ValueError):
        model(pixel_values=torch.zeros(2, 3, 9, 9))
    assert (call.images, call.listens) == (None, False)


def test_a_chunk_bounds_what_is_kept() -> None:
    from tests.benchmarks.measure import kept

    sizes = {}
    for chunk in (None, 4):
        model, inputs = tuned("clip", chunk=chunk), batch("clip", size=16)
        sizes[chunk] = kept(lambda model=model, inputs=inputs: model(**inputs).loss, model.parameters())
    assert sizes[4] < 0.2 * sizes[None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"reduction": 0}, "reduction=0 is out of range: an image feature has 32 numbers"),
        ({"reduction": 33}, "reduction=33 is out of range"),
        ({"chunk": 0}, "chunk=0 is out of range"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is no context"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(TuningError, match=said):
        CoCoOp(**{"init": None} | arguments).apply(tiny("clip"))


def test_the_loss_of_pairs_is_refused() -> None:
    model = tuned("clip")
    with pytest.raises(TuningError, match="return_loss contrasts pairs"):
        model.towers(input_ids=model.texts, pixel_values=batch("clip")["pixel_values"], return_loss=True)
