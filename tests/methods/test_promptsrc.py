"""PromptSRC: the penalties by the authors' formulas, and the Gaussian average of the epochs."""

import copy
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import IVLP, PromptSRC, TuningError, collect
from tests import two_towers
from tests.contract import MethodContract, output, shake
from tests.methods.test_coop import features
from tests.models import TWO_TOWERS, batch, tiny
from tests.modules import Tuned, loader, trainer
from tests.two_towers import CONTEXT, written

WORDS = [CONTEXT, [10, 12]]
SIZES = {"init": None, "num_virtual_tokens": 3, "num_image_tokens": 2, "depth": 2, "words": WORDS}


class TestPromptSRC(MethodContract):
    method = PromptSRC(**SIZES)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """J (n d + n' d')."""
        return 2 * (3 * 32 + 2 * 32)


def _images(model: nn.Module, pixels: Tensor) -> Tensor:
    return F.normalize(model.towers.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_the_penalty_is_that_of_the_formulas(kind: str) -> None:
    model, plain, other = tiny(kind), tiny(kind).requires_grad_(False), tiny(kind)
    method = PromptSRC(**SIZES, text_pull=20.0, image_pull=5.0, logit_pull=3.0)
    method.apply(model)
    shake(model)
    IVLP(**{name: value for name, value in SIZES.items() if name != "words"}).apply(other)
    other.towers.ivlp.load_state_dict(model.towers.promptsrc.state_dict())
    pixels = batch(kind)["pixel_values"]
    assert torch.equal(output(model, kind), output(other, kind)), "the prompts are those of IVLP"
    model(**batch(kind))
    penalty = method.penalty(model)
    assert method.penalty(model) is None
    t, i = F.normalize(features(other), dim=-1), _images(other, pixels)
    fixed = torch.stack([features(plain, written(kind, words)) for words in WORDS]).mean(0)
    t0, i0 = F.normalize(fixed, dim=-1), _images(plain, pixels)
    scale = plain.towers.logit_scale.exp()
    p, p0 = (scale * i @ t.t()).softmax(1), (scale * i0 @ t0.t()).softmax(1)
    divergence = (p0 * (p0.log() - p.log())).sum() / p.numel()
    expected = 20 * (t - t0).abs().mean() + 5 * (i - i0).abs().mean() + 3 * divergence
    torch.testing.assert_close(penalty, expected, atol=1e-4, rtol=1e-4)
    penalty.backward()
    expected.backward()
    for ours, theirs in zip(model.towers.promptsrc.parameters(), other.towers.ivlp.parameters(), strict=True):
        assert theirs.grad.abs().max() > 1e-4
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)


class Noted(L.Callback):
    """Keeps the prompts after each epoch, before they are averaged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append(copy.deepcopy(collect(pl_module)))


def test_what_is_kept_is_the_gaussian_average_of_the_epochs(tmp_path: Path) -> None:
    module, noted = Tuned("clip"), Noted()
    method = PromptSRC(**SIZES, mean_epoch=2.0, std_epochs=0.8)
    trainer(tmp_path, noted, method, max_epochs=3).fit(module, loader("clip"), loader("clip"))
    gauss = [math.exp(-((e - 2.0) ** 2) / (2 * 0.8**2)) for e in (1, 2, 3)]
    assert method.weights_of_epochs(3) == pytest.approx([g / sum(gauss) for g in gauss])
    for name, tensor in collect(module).items():
        expected = sum(g / sum(gauss) * seen[name] for g, seen in zip(gauss, noted.seen, strict=True))
        torch.testing.assert_close(tensor, expected)
        assert not torch.allclose(tensor, noted.seen[-1][name], atol=1e-7)


def test_words_are_ids_once_it_is_applied(tmp_path: Path) -> None:
    method = PromptSRC(depth=1, words=["a photo of a", "a photo"], tokenizer=str(two_towers.save_tokenizer(tmp_path)))
    method.apply(tiny("clip"))
    assert method.words == [CONTEXT, [10, 11]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": []}, r"words=\[\] makes no written text"),
        ({"words": [[]]}, r"words=\[\] are neither words nor the ids"),
        ({"words": [[-1]]}, r"words=\[-1\] are neither words nor the ids"),
        ({"depth": 3}, "depth=3 is out of range"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        PromptSRC(**SIZES | arguments).apply(tiny("clip"))


def test_epochs_that_cannot_be_weighted_are_refused() -> None:
    with pytest.raises(TuningError, match="their number has no limit: set max_epochs"):
        PromptSRC(**SIZES).weights_of_epochs(-1)
    with pytest.raises(TuningError, match="mean_epoch=50 is far from the 5 epochs of the run"):
        PromptSRC(**SIZES, mean_epoch=50.0).weights_of_epochs(5)
