"""Two domains: losses, pseudo labels of the frozen model, no labels of the target."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_peft import DAPL, IVLP, ColouredShapes, CoOp, DomainAdaptation, DomainData, LoRA, TuningError, collect
from lightning_peft.data.domain_data import PairsOfBatches
from lightning_peft.reports.rows import ResultRows, read_rows
from lightning_peft.towers import clip
from tests import two_towers
from tests.modules import trainer
from tests.tasks.test_clip_classification import COLOURS, SHAPES

DAPL_SMALL = {"num_virtual_tokens": 3, "num_domain_tokens": 2}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(two_towers.save_model(tmp_path_factory.mktemp("clip")))


def shapes(model: str, style: str, **arguments: Any) -> ColouredShapes:
    defaults = {"per_class": 4, "validation_per_class": 2, "test_per_class": 3, "batch_size": 8, "pixels": 16}
    return ColouredShapes(style, **{"colours": COLOURS, "shapes": SHAPES, "processor": model} | defaults | arguments)


def data(model: str, per_class: int = 4, **arguments: Any) -> DomainData:
    return DomainData(shapes(model, "filled"), shapes(model, "dark", per_class=per_class), **arguments)


def prepared(model: str, **arguments: Any) -> tuple[DomainAdaptation, dict[str, dict[str, Tensor]]]:
    """Return a task with DAPL applied and a batch."""
    task, images = DomainAdaptation(model, **arguments), data(model)
    DAPL(**DAPL_SMALL).apply(task.backbone)
    task.check_data(images, "fit")
    images.setup("fit")
    task.log = task.log_dict = lambda *args, **kwargs: None
    return task, next(iter(images.train_dataloader()))


def domains_of(task: DomainAdaptation) -> torch.nn.Parameter:
    return task.backbone.text_model.embeddings.token_embedding.dapl.domains


@pytest.mark.parametrize("contrast", ["all", "own"])
def test_the_loss_is_that_of_the_formula(model: str, contrast: str) -> None:
    task, batch = prepared(model, contrast=contrast, weight=0.7)
    texts = clip.text_features(task.backbone, task.texts(task.labels))
    source, target = (
        clip.similarity(task.backbone, clip.image_features(task.backbone, batch[name]["pixel_values"]), texts)
        for name in ("source", "target")
    )
    plain = DomainAdaptation(model).backbone
    names = [f"a photo of a {name}." for name in task.labels]
    ids = task.tokenizer(names, return_tensors="pt", padding=True)["input_ids"]
    naive = plain(input_ids=ids, pixel_values=batch["target"]["pixel_values"]).logits_per_image.softmax(1)
    sure, classes = naive.max(1)
    task.threshold = sure.quantile(0.5).item()  # between two images, far enough from both
    mask = sure >= task.threshold
    assert 0 < mask.sum() < len(mask), "the test shall have images with and without a pseudo label"
    loss = task.training_step(batch, 0)
    columns = (slice(0, 12),) * 2 if contrast == "all" else (slice(0, 6), slice(6, 12))
    of_target = F.cross_entropy(target[mask][:, columns[1]], classes[mask] + (6 if contrast == "all" else 0))
    expected = F.cross_entropy(source[:, columns[0]], batch["source"]["labels"]) + 0.7 * of_target
    assert torch.allclose(loss, expected, atol=1e-5)
    gradients = [torch.autograd.grad(x, domains_of(task), retain_graph=True)[0] for x in (loss, expected)]
    assert torch.allclose(*gradients, atol=1e-5)


TEMPLATES = ["{} red.", "{} blue circle."]


@pytest.mark.parametrize("contrast", ["all", "own"])
def test_each_domain_has_texts_of_its_own(model: str, contrast: str) -> None:
    task, batch = prepared(model, contrast=contrast, weight=0.0, domain_templates=TEMPLATES)
    ids = [task.tokenizer([t.replace("{}", name) for name in task.labels]).input_ids for t in TEMPLATES]
    assert ids[0] != ids[1]
    texts = torch.cat(
        [
            clip.text_features(task.backbone, task.texts(task.labels, template), variant=domain)
            for domain, template in enumerate(TEMPLATES)
        ]
    )
    images = clip.image_features(task.backbone, batch["source"]["pixel_values"])
    columns = slice(0, 12) if contrast == "all" else slice(0, 6)
    logits = clip.similarity(task.backbone, images, texts)
    expected = F.cross_entropy(logits[:, columns], batch["source"]["labels"])
    assert torch.allclose(task.training_step(batch, 0), expected, atol=1e-5)
    assert torch.allclose(task._of_domain(images, 1), logits[:, 6:], atol=1e-5)


def test_texts_of_a_domain_need_no_method(model: str) -> None:
    task, images = DomainAdaptation(model, domain_templates=TEMPLATES), data(model)
    task.check_data(images, "test")
    images.setup("fit")
    features = clip.image_features(task.backbone, next(iter(images.train_dataloader()))["source"]["pixel_values"])
    for domain, template in enumerate(TEMPLATES):
        ids = task.tokenizer([template.replace("{}", name) for name in task.labels], return_tensors="pt", padding=True)
        plain = task.backbone.get_text_features(input_ids=ids["input_ids"]).pooler_output
        expected = clip.similarity(task.backbone, features, plain)
        assert torch.allclose(task._of_domain(features, domain), expected, atol=1e-5)


def test_templates_that_are_refused(model: str) -> None:
    with pytest.raises(TuningError, match="has 1 entries: give one for the source and one for the target"):
        DomainAdaptation(model, domain_templates=["{}."])
    with pytest.raises(TuningError, match="has no place for the name of a class"):
        DomainAdaptation(model, domain_templates=["{}.", "a photo."])


def test_no_pseudo_label_is_no_loss(model: str) -> None:
    task, batch = prepared(model, threshold=2.0, contrast="own")
    loss = task.training_step(batch, 0)
    alone, _ = prepared(model, weight=0.0, contrast="own")
    with torch.no_grad():
        for ours, theirs in zip(collect(task).values(), collect(alone).values(), strict=True):
            theirs.copy_(ours)
    assert loss.isfinite()
    assert torch.allclose(loss, alone.training_step(batch, 0))
    loss.backward()
    gradient = domains_of(task).grad
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


def test_pseudo_labels_are_of_the_frozen_model_and_have_no_gradient(model: str) -> None:
    task, batch = prepared(model)
    before = task.pseudo_labels(batch["target"])
    with torch.no_grad():
        for parameter in task.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    task._kept.clear()
    after = task.pseudo_labels(batch["target"])
    assert torch.equal(before[0], after[0])
    assert not before[0].is_floating_point()


@pytest.mark.parametrize("contrast", ["all", "own"])
def test_it_trains_and_scores(model: str, contrast: str, tmp_path: Path) -> None:
    task = DomainAdaptation(model, contrast=contrast, threshold=0.17, lr=1e-2, warmup_epochs=0)
    run = trainer(tmp_path, DAPL(**DAPL_SMALL), ResultRows(), max_epochs=3)
    images = data(model)
    run.fit(task, images)
    assert run.callback_metrics.keys() >= {
        "train_loss", "train_source_loss", "train_target_loss", "train_coverage", "val_loss", "val_accuracy"
    }  # fmt: skip
    (tested,) = run.test(task, images, verbose=False)
    assert tested.keys() == {
        "test_loss", "test_accuracy", "test_class_accuracy", "test_coverage", "test_pseudo_accuracy"
    }  # fmt: skip
    assert tested["test_accuracy"] == pytest.approx(tested["test_class_accuracy"])  # classes are of one size
    (row,) = (row for row in read_rows(tmp_path / "results.csv") if row["metric"] == "accuracy")
    assert row["dataset"] == "ColouredShapes to ColouredShapes"
    assert len(run.predict(task, images)[0]["labels"]) == 8


def test_the_coverage_of_an_epoch_is_that_of_all_its_batches(model: str, tmp_path: Path) -> None:
    """The pseudo labels are the frozen model's, so a pass over all images gives the same share in every epoch."""
    found: list[float] = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(float(trainer.callback_metrics["train_coverage"]))

    task, images = DomainAdaptation(model), data(model)
    task.check_data(images, "validate")
    images.setup("fit")

    targets = [batch["target"] for batch in images.train_dataloader()]

    def share(threshold: float) -> float:
        task.threshold = threshold
        return torch.cat([task.pseudo_labels(target)[1] for target in targets]).float().mean().item()

    low, high = 1 / 6, 1.0  # all images are sure at the one, none at the other
    while not 0 < (some := share((low + high) / 2)) < 1:
        low, high = ((low + high) / 2, high) if some == 1 else (low, (low + high) / 2)
    trainer(tmp_path, DAPL(**DAPL_SMALL), Keep(), max_epochs=3).fit(task, images)
    assert 0 < some < 1
    assert found == pytest.approx([some] * 3)


def test_other_prompts_adapt_too(model: str, tmp_path: Path) -> None:
    for method in (CoOp(num_virtual_tokens=4), IVLP(init=None, depth=2)):
        task = DomainAdaptation(model, threshold=0.1)
        run = trainer(tmp_path, method)
        run.fit(task, data(model))
        assert run.callback_metrics["train_coverage"] > 0


@pytest.mark.parametrize(("mode", "batches"), [("source", 3), ("longest", 6), ("shortest", 3)])
def test_an_epoch_is_as_long_as_asked(model: str, mode: str, batches: int) -> None:
    images = data(model, per_class=8, mode=mode)
    images.setup("fit")
    loader = images.train_dataloader()
    found = list(loader)
    assert len(found) == len(loader) == batches
    assert all(set(batch["target"]) == {"pixel_values"} for batch in found), "labels of the target must not leak"
    assert all(set(batch["source"]) == {"pixel_values", "labels"} for batch in found)


def test_the_shorter_domain_begins_anew_in_another_order() -> None:
    pairs = PairsOfBatches((12, 2), (4, 2))
    target = [batch for _, batch in pairs]
    rows = [sorted(row for _, row in target[i] + target[i + 1]) for i in (0, 2, 4)]
    assert rows == [[0, 1, 2, 3]] * 3
    assert len({str([row for _, row in target[i] + target[i + 1]]) for i in (0, 2, 4)}) > 1
    ranks = [list(PairsOfBatches((12, 1), (4, 1), num_replicas=2, rank=rank)) for rank in (0, 1)]
    for whole, one, two in zip(pairs, *ranks, strict=True):
        assert [sorted(w) for w in whole] == [sorted(a + b) for a, b in zip(one, two, strict=True)]


def test_a_run_resumes_as_if_it_had_not_stopped(model: str, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0 if ckpt_path is None else 5)
        task = DomainAdaptation(model, threshold=0.17, lr=1e-2)
        every = ModelCheckpoint(tmp_path / "run", filename="{step}", save_top_k=-1, every_n_train_steps=2)
        fit = trainer(tmp_path, DAPL(**DAPL_SMALL), every, max_epochs=2)
        fit.fit(task, data(model), ckpt_path=ckpt_path)
        return collect(task)

    straight = run()
    middle = (tmp_path / "run" / "step=4.ckpt").rename(tmp_path / "middle.ckpt")
    for file in (tmp_path / "run").glob("*.ckpt"):
        file.unlink()
    for name, tensor in run(middle).items():
        assert torch.equal(tensor, straight[name]), name


def test_labels_of_the_target_are_refused(model: str, tmp_path: Path) -> None:
    task, batch = prepared(model)
    batch["target"]["labels"] = batch["source"]["labels"]
    with pytest.raises(TuningError, match="the target domain has labels in training, which would leak"):
        task.training_step(batch, 0)
    with pytest.raises(TuningError, match="a batch of two domains has 'source' and 'target', this one pixel_values"):
        task.training_step({"pixel_values": batch["source"]["pixel_values"]}, 0)


def test_what_does_not_fit_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"source and target differ in their classes, e\.g\. in 'blue ring'"):
        DomainData(shapes(model, "filled"), shapes(model, "dark", colours=["red", "green"])).setup("fit")
    with pytest.raises(TuningError, match="mode='all' is no length"):
        data(model, mode="all")
    for arguments, said in (
        ({"contrast": "both"}, "contrast='both' is no set of prompts"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ):
        with pytest.raises(TuningError, match=said):
            DomainAdaptation(model, **arguments)
    with pytest.raises(TuningError, match="is trained in the model whose frozen form gives the pseudo labels"):
        trainer(tmp_path, LoRA(r=2)).fit(DomainAdaptation(model), data(model))
