"""Classes by their names: scores, features kept, base and new classes, bad names, bad precision."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_peft import (
    DAPL,
    IVLP,
    VPT,
    CLIPClassification,
    CLIPData,
    CoCoOp,
    ColouredShapes,
    CoOp,
    LoRA,
    MaPLe,
    Method,
    TuningError,
    collect,
)
from lightning_peft.core.rates import RECIPE
from lightning_peft.towers import clip
from tests import two_towers
from tests.modules import trainer

COLOURS, SHAPES = ["red", "green", "blue"], ["star", "ring"]
METHODS = [
    CoOp(num_virtual_tokens=4),
    CoOp(init="a photo of a", position="middle"),
    CoCoOp(num_virtual_tokens=4, init=None),
    MaPLe(depth=2),
    IVLP(depth=2, init=None),
    LoRA(r=2),
]


@pytest.fixture(scope="session", params=["clip", "siglip"])
def towers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(two_towers.save_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(two_towers.save_model(tmp_path_factory.mktemp("clip")))


def shapes(model: str, **arguments: Any) -> ColouredShapes:
    defaults = {"per_class": 4, "validation_per_class": 2, "test_per_class": 3, "batch_size": 8, "pixels": 16}
    return ColouredShapes(**{"colours": COLOURS, "shapes": SHAPES, "processor": model} | defaults | arguments)


def data(model: str, base_to_new: bool = False, **arguments: Any) -> CLIPData:
    return CLIPData(shapes(model, **arguments), base_to_new=base_to_new)


def test_the_learning_rate_is_that_which_the_method_recommends_for_sgd(model: str) -> None:
    for methods, rate in (
        ([], RECIPE.delta),
        ([LoRA(r=2)], RECIPE.delta),
        ([MaPLe(depth=2)], MaPLe.advised.delta),
        ([LoRA(r=2), MaPLe(depth=2)], min(RECIPE.delta, MaPLe.advised.delta)),
    ):
        task = CLIPClassification(model)
        for method in methods:
            method.apply(task.backbone)
        assert task.rate == rate
        task.lr = 1e-2
        assert task.rate == 1e-2
    assert MaPLe.advised.delta != RECIPE.delta
    assert LoRA.advised.optimizer == "AdamW"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'position', '')}")
def test_every_method_learns(towers: str, method: Method, tmp_path: Path) -> None:
    task = CLIPClassification(towers, lr=1e-2, warmup_epochs=0)
    if "init" in vars(method) and method.init is not None:
        method.tokenizer = towers
    # That of trained models: a random SigLIP has 1, which leaves hardly a gradient.
    task.backbone.logit_scale.data.fill_(math.log(100))
    run = trainer(tmp_path, method, max_epochs=4)
    images = data(towers, keep_in_memory=True)
    run.validate(task, images, verbose=False)
    before = run.callback_metrics["val_loss"].item()
    run.fit(task, images)
    assert run.callback_metrics["val_loss"] < 0.99 * before
    assert run.callback_metrics.keys() >= {"train_loss", "val_loss", "val_accuracy"}
    (tested,) = run.test(task, images, verbose=False)
    assert tested.keys() == {"test_loss", "test_accuracy"}
    method.remove(task.backbone)


def test_zero_shot_is_the_model_with_a_template(model: str, tmp_path: Path) -> None:
    task, images = CLIPClassification(model), data(model)
    (tested,) = trainer(tmp_path).test(task, images, verbose=False)
    rows = images.data.images("test")
    pixels = torch.stack([rows.pixels(i) for i in range(len(rows))])
    texts = [f"a photo of a {name}." for name in images.label_names]
    ids = task.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    with torch.no_grad():
        logits = task.backbone(input_ids=ids, pixel_values=pixels).logits_per_image
    right = (logits.argmax(1).numpy() == rows.labels).mean()
    assert tested["test_accuracy"] == pytest.approx(right)
    predicted = trainer(tmp_path).predict(task, images)
    assert [label for batch in predicted for label in batch["labels"]] == [
        images.label_names[i] for i in logits.argmax(1).tolist()
    ]
    assert torch.cat([batch["probabilities"] for batch in predicted]).sum(1).allclose(torch.ones(len(rows)))


def counted(task: CLIPClassification) -> dict[str, int]:
    calls = {"text_model": 0, "vision_model": 0}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        getattr(task.backbone, name).register_forward_hook(count(name))
    return calls


def test_texts_are_computed_once_an_evaluation(model: str, tmp_path: Path) -> None:
    for method, texts in ((CoOp(num_virtual_tokens=4), 1), (CoCoOp(num_virtual_tokens=4, init=None), 3)):
        task = CLIPClassification(model)
        run = trainer(tmp_path, method)
        method.apply(task.backbone)
        calls = counted(task)
        run.test(task, data(model), verbose=False)
        assert calls == {"text_model": texts, "vision_model": 3}
        with torch.no_grad():  # not kept from one evaluation to the next, nor for callers outside
            for parameter in collect(task).values():
                parameter.add_(1)
        run.test(task, data(model), verbose=False)
        assert calls == {"text_model": 2 * texts, "vision_model": 6}
        assert not task._kept


@pytest.mark.parametrize("method", [CoOp(num_virtual_tokens=4), CoCoOp(num_virtual_tokens=4, init=None)])
def test_kept_features_train_alike(model: str, method: Method, tmp_path: Path) -> None:
    results, delta = [], []
    for keep in (False, True):
        torch.manual_seed(0)
        task = CLIPClassification(model, cache_image_features=keep, lr=1e-2, warmup_epochs=0)
        method = type(method)(**method.init_args())
        calls = counted(task)
        run = trainer(tmp_path, method, max_epochs=3, num_sanity_val_steps=0)
        images = data(model)
        run.fit(task, images)
        # 24 training images and 12 to validate, in batches of 8
        assert calls["vision_model"] == (3 + 2 if keep else 3 * (3 + 2))
        results.append(run.callback_metrics["val_loss"])
        delta.append({name: tensor.clone() for name, tensor in collect(task).items()})
        run.test(task, images, verbose=False)  # pixels again
    assert torch.allclose(*results, atol=1e-5)
    for name, tensor in delta[0].items():
        assert torch.allclose(tensor, delta[1][name], atol=1e-5), name


def test_features_that_change_are_not_kept(model: str, tmp_path: Path) -> None:
    for method in (MaPLe(init=None, depth=2), VPT(num_virtual_tokens=2), LoRA(r=2)):
        task = CLIPClassification(model, cache_image_features=True)
        with pytest.raises(TuningError, match="the method changes the features of images"):
            trainer(tmp_path, method).fit(task, data(model))
    task = CLIPClassification(model, cache_image_features=True)
    with pytest.raises(TuningError, match=r"augment=\['flip'\] changes the training images at random"):
        trainer(tmp_path, CoOp(num_virtual_tokens=4)).fit(task, data(model, augment=["flip"]))
    with pytest.raises(TuningError, match="give CLIPData"):
        trainer(tmp_path, CoOp(num_virtual_tokens=4)).fit(
            CLIPClassification(model, cache_image_features=True), shapes(model)
        )


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_resumes_as_if_it_had_not_stopped(model: str, keep: bool, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0 if ckpt_path is None else 5)
        task = CLIPClassification(model, cache_image_features=keep, lr=1e-2)
        every = ModelCheckpoint(tmp_path / "run", filename="{step}", save_top_k=-1, every_n_train_steps=2)
        fit = trainer(tmp_path, CoOp(num_virtual_tokens=4), every, max_epochs=2)
        fit.fit(task, data(model), ckpt_path=ckpt_path)
        return collect(task)

    straight = run()
    middle = (tmp_path / "run" / "step=4.ckpt").rename(tmp_path / "middle.ckpt")
    for file in (tmp_path / "run").glob("*.ckpt"):
        file.unlink()
    for name, tensor in run(middle).items():
        assert torch.equal(tensor, straight[name]), name


def test_base_classes_are_trained_and_both_are_tested(model: str, tmp_path: Path) -> None:
    images, task = data(model, base_to_new=True), CLIPClassification(model, lr=5e-2)
    every = [" ".join(pair) for pair in shapes(model).class_pairs]
    assert images.test_sets == {"base": every[:3], "new": every[3:]}
    run = trainer(tmp_path, CoOp(num_virtual_tokens=4), max_epochs=2)
    run.fit(task, images)
    assert task.labels == every[:3]
    tested = {name: value for result in run.test(task, images, verbose=False) for name, value in result.items()}
    assert tested.keys() == {
        "test_base_loss", "test_base_accuracy", "test_new_loss", "test_new_accuracy", "test_harmonic_mean"
    }  # fmt: skip
    base, new = tested["test_base_accuracy"], tested["test_new_accuracy"]
    assert tested["test_harmonic_mean"] == pytest.approx(2 * base * new / (base + new) if base + new else 0)
    assert set(images.tested["new"].images("test").labels) == {0, 1, 2}
    with pytest.raises(TuningError, match="base_to_new halves the classes"):
        CLIPData(shapes(model, classes="new"), base_to_new=True)


def test_logits_are_fp32_in_bf16(model: str, tmp_path: Path) -> None:
    task = CLIPClassification(model)
    run = trainer(tmp_path, CoOp(num_virtual_tokens=4), precision="bf16-mixed")
    predicted = run.predict(task, data(model))
    assert {batch["probabilities"].dtype for batch in predicted} == {torch.float32}


def test_names_that_do_not_fit_are_refused(model: str, tmp_path: Path) -> None:
    for labels, said in (
        (["red", " ".join(["star"] * 30)], r"class 'star star .*' is too long: .* has 3\d tokens and a context of 4"),
        (["red star", "red_star"], "classes 'red star' and 'red_star' are the same to the tokenizer"),
    ):
        task = CLIPClassification(model, labels=labels)
        with pytest.raises(TuningError, match=said):
            trainer(tmp_path, CoOp(num_virtual_tokens=4)).predict(task, data(model))
    task = CLIPClassification(model, labels=["red star", "dark ring"])
    with pytest.raises(TuningError, match=r"the data have 6 classes .*, labels= has 2 \(red star, dark ring\)"):
        trainer(tmp_path).test(task, data(model))
    with pytest.raises(TuningError, match="template='a photo' has no place for the name of a class"):
        CLIPClassification(model, template="a photo")


def test_models_and_methods_that_do_not_fit_are_refused(model: str, tokenizer: Path, tmp_path: Path) -> None:
    from tests.models import tiny

    tiny("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(TuningError, match="which has no two towers: give a CLIP or SigLIP model"):
        CLIPClassification(str(tmp_path / "bert"))
    with pytest.raises(TuningError, match="makes several prompts of each class"):
        trainer(tmp_path, DAPL(num_virtual_tokens=2, num_domain_tokens=2)).fit(CLIPClassification(model), data(model))
    endless = trainer(tmp_path, CoOp(num_virtual_tokens=2), max_epochs=-1, max_steps=2)
    with pytest.raises(TuningError, match="set max_epochs"):
        endless.fit(CLIPClassification(model), data(model))


def test_images_count_as_frozen_where_they_are(model: str) -> None:
    for method, frozen in ((CoOp(), True), (CoCoOp(init=None), True), (MaPLe(init=None, depth=1), False)):
        backbone = CLIPClassification(model).backbone
        method.num_virtual_tokens = 2
        method.apply(backbone)
        assert clip.images_are_frozen(backbone) is frozen
