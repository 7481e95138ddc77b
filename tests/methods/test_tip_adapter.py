"""Tip-Adapter: ``alpha exp(-beta (1 - f Kᵀ)) V`` beside the logits, with and without training, and how it is filled."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import Method, TipAdapter, TuningError, collect
from lightning_peft.towers import clip
from tests.contract import MethodContract, assert_near, output
from tests.methods.test_coop import features
from tests.models import TWO_TOWERS, batch, tiny
from tests.modules import Tuned, loader, trainer

SHOTS = 16


class TestTipAdapter(MethodContract):
    method = TipAdapter(num_classes=3, shots=SHOTS)
    backbones = TWO_TOWERS
    identity_at_start = False

    def count(self, kind: str) -> int:
        """N p."""
        return 3 * SHOTS * 32

    def applied(self, model: nn.Module, **changes: Any) -> Method:
        method = super().applied(model, **changes)
        method.fill(model, [batch(kind_of(model), size=8, seed=1)])
        return method


def kind_of(model: nn.Module) -> str:
    return "siglip" if "siglip" in type(model.towers).__name__.lower() else "clip"


def _images(model: nn.Module, pixels: Tensor) -> Tensor:
    return F.normalize(model.towers.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


@pytest.mark.parametrize("train_keys", [True, False])
@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_it_is_the_formula(kind: str, train_keys: bool) -> None:
    model, plain, kept, inputs = tiny(kind), tiny(kind), batch(kind, size=8, seed=1), batch(kind)
    method = TipAdapter(num_classes=3, shots=SHOTS, alpha=1.7, beta=2.5, train_keys=train_keys)
    method.apply(model)
    assert_near({"": output(model, kind)}, {"": output(plain, kind)}, 1e-6)  # an empty cache adds nothing
    assert any(p.requires_grad for p in model.parameters()) is train_keys
    assert clip.images_are_frozen(model.towers)
    method.fill(model, [{name: rows[:5] for name, rows in kept.items()}, {n: rows[5:] for n, rows in kept.items()}])
    with torch.no_grad():
        expected = output(plain, kind)
        keys, queries = _images(plain, kept["pixel_values"]), _images(plain, inputs["pixel_values"])
        for b, query in enumerate(queries):
            for key, label in zip(keys, kept["labels"].tolist(), strict=True):
                expected[b, label] += 1.7 * torch.exp(-2.5 * (1 - query @ key))
        assert_near({"": expected}, {"": output(model, kind)}, 1e-5)
        task = clip.similarity(model.towers, queries, features(plain))
    assert_near({"": expected}, {"": task}, 1e-5)
    assert {name.rpartition(".")[2] for name in collect(model)} == {"keys", "labels"}


def test_a_fit_fills_it_from_the_training_images(tmp_path: Path) -> None:
    module, method = Tuned("clip"), TipAdapter(num_classes=3, shots=SHOTS)
    fit = trainer(tmp_path, method)
    fit.fit(module, loader("clip"), loader("clip"))
    rows = [row for each in loader("clip") for row in each["labels"].tolist()]
    labels = module.model.towers.tipadapter.labels.tolist()
    assert labels == [*rows, *[-1] * (3 * SHOTS - len(rows))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 1}, "has . images, and the cache has room for shots=1: give fewer, or shots="),
        ({"num_classes": 2}, "label 2 is none of num_classes=2 classes: give as many"),
    ],
)
def test_images_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    model, method = tiny("clip"), TipAdapter(**{"num_classes": 3} | arguments)
    method.apply(model)
    with pytest.raises(TuningError, match=message):
        method.fill(model, [batch("clip", size=8, seed=1)])
    with pytest.raises(TuningError, match="there are no images to keep"):
        method.fill(model, [])


def test_other_classes_are_refused() -> None:
    model = tiny("clip")
    TipAdapter(num_classes=4).apply(model)
    with pytest.raises(TuningError, match="the cache has images of 4 classes, and there are texts of 3"):
        output(model, "clip")


class Rows(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader("clip")

    val_dataloader = test_dataloader = train_dataloader


def test_without_training_a_data_module_fills_it(tmp_path: Path) -> None:
    """What is tested is what `fill` gives; a fit would have nothing to do, and batches alone leave it empty."""
    module, filled = Tuned("clip"), Tuned("clip")
    arguments = {"num_classes": 3, "shots": SHOTS, "train_keys": False}
    method = TipAdapter(**arguments)
    method.apply(filled.model)
    method.fill(filled.model, loader("clip"))
    scores = trainer(tmp_path, TipAdapter(**arguments)).test(module, Rows(), verbose=False)
    assert scores == trainer(tmp_path, method).test(filled, loader("clip"), verbose=False)
    with pytest.raises(TuningError, match=r"TipAdapter.train_keys=False. leaves nothing to train: validate, test or"):
        trainer(tmp_path, TipAdapter(**arguments)).fit(Tuned("clip"), Rows())
    with pytest.raises(TuningError, match=r"the cache has no images, .*: call fill.model, batches. of the method"):
        trainer(tmp_path, TipAdapter(**arguments)).test(Tuned("clip"), loader("clip"))
