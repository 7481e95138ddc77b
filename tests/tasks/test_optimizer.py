"""Which parameters have which learning rate and weight decay, and how the rate goes from step to step."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_peft import (
    BitFit,
    FullFineTuning,
    LoRA,
    Method,
    PartialK,
    PrefixTuning,
    PTuning,
    PTuningV2,
    TuningError,
)
from lightning_peft.bases.prefix import BARE, NETWORK
from lightning_peft.core.rates import Rates, head_rate, rates_of
from lightning_peft.core.tuning import Tuning
from lightning_peft.methods import every_method
from lightning_peft.reports.tuning_report import learning_rates
from lightning_peft.tasks import TextClassification
from lightning_peft.tasks.optimizer import rates_in
from tests import text
from tests.models import tiny
from tests.modules import trainer


def configured(task: TextClassification, tmp_path: Path, *methods: Method, **kwargs: Any) -> L.Trainer:
    """Return a Trainer after a fit, with what configure_optimizers gave it."""
    run = trainer(tmp_path, *methods, **kwargs)
    run.fit(task, text.data(task.hparams["model"], tmp_path))
    return run


def test_groups_of_the_optimizer(model: str, tmp_path: Path) -> None:
    task = text.task(model, lr=1e-3, head_lr=5e-3, weight_decay=0.1)
    method = LoRA(r=2, also_train=r"bert\.pooler\..*")
    (optimizer,) = configured(task, tmp_path, method, limit_train_batches=1).optimizers
    names = {id(p): name.removeprefix("backbone.") for name, p in task.named_parameters()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    loras = {
        f"bert.encoder.layer.{layer}.attention.self.{host}.lora.{matrix}"
        for layer in (0, 1)
        for host in ("query", "value")
        for matrix in "AB"
    }
    expected = {
        "delta": (loras | {"bert.pooler.dense.weight"}, 1e-3, 0.1),
        "delta without decay": ({"bert.pooler.dense.bias"}, 1e-3, 0.0),
        "head": ({"classifier.weight"}, 5e-3, 0.1),
        "head without decay": ({"classifier.bias"}, 5e-3, 0.0),
    }
    for name, (members, lr, decay) in expected.items():
        group = groups.pop(name)
        assert {names[id(p)] for p in group["params"]} == members
        assert (group["initial_lr"], group["weight_decay"]) == (lr, decay)
    assert not groups
    assert optimizer.defaults["fused"]


def test_vectors_have_no_decay(model: str, tmp_path: Path) -> None:
    (optimizer,) = configured(text.task(model), tmp_path, FullFineTuning(), limit_train_batches=1).optimizers
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def test_schedule(model: str, tmp_path: Path) -> None:
    class Rates(L.Callback):
        seen: list[float]

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.seen = [trainer.optimizers[0].param_groups[0]["lr"]]

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    run = trainer(tmp_path, LoRA(r=2), rates, max_epochs=2)
    run.fit(text.task(model, lr=1.0, warmup=0.25), text.data(model, tmp_path))
    assert run.global_step == 12
    rising, falling = [0, 1 / 3, 2 / 3, 1], [i / 9 for i in range(8, -1, -1)]
    assert rates.seen == pytest.approx(rising + falling)


def test_steps_are_counted_after_accumulation(model: str, tmp_path: Path) -> None:
    run = configured(text.task(model, lr=1.0, warmup=0), tmp_path, LoRA(r=2), accumulate_grad_batches=3, max_epochs=3)
    assert run.global_step == 6
    assert run.optimizers[0].param_groups[0]["lr"] == 0


def test_no_end_of_the_schedule(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="and there is none: set max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(text.task(model), text.data(model, tmp_path))


def test_the_rates_that_methods_recommend(model: str, tmp_path: Path) -> None:
    """Each group has the rate of its method, the head the smallest, and a rate that is given wins."""
    (optimizer,) = configured(text.task(model), tmp_path, LoRA(r=2), BitFit(), limit_train_batches=1).optimizers
    expected = {
        f"delta at {LoRA.advised.delta:g}": LoRA.advised.delta,
        f"delta at {BitFit.advised.delta:g}": BitFit.advised.delta,
        "head": min(LoRA.advised.head, BitFit.advised.head),
    }
    assert LoRA.advised.delta != BitFit.advised.delta
    assert rates_in([optimizer]) == expected
    run = configured(text.task(model, lr=5e-3), tmp_path, FullFineTuning(), limit_train_batches=1)
    assert rates_in(run.optimizers) == {"delta": 5e-3, "head": FullFineTuning.advised.head}
    shown = learning_rates(run, run.lightning_module)
    assert shown["delta"] == "0.005 (given)"
    assert shown["head"].endswith(f"(recommended: FullFineTuning, {FullFineTuning.advised.source})")


@pytest.mark.parametrize(
    ("method", "kind", "rates"),
    [
        (PartialK(), "bert", PartialK.advised),
        (PartialK(), "vit", PartialK.advised.images),
        (PTuning(), "gpt2", PTuning.advised),
        (PTuning(), "bert", PTuning.advised.headed),
        (PrefixTuning(mid_dim=8), "gpt2", NETWORK),
        (PrefixTuning(mid_dim=None), "gpt2", BARE),
        (PrefixTuning(mid_dim=None, form="infix"), "gpt2", NETWORK),
        (PTuningV2(), "bert", BARE),
        (PTuningV2(mid_dim=8), "bert", NETWORK),
    ],
)
def test_images_new_heads_and_networks_have_rates_of_their_own(method: Method, kind: str, rates: Rates | None) -> None:
    backbone = tiny(kind)
    method.apply(backbone)
    tuning = Tuning.of(backbone)
    assert tuning is not None
    assert rates is not None
    assert set(rates_of(backbone, tuning).values()) == {rates.delta}
    assert head_rate(backbone, tuning) == rates.head


def test_each_method_says_its_rates() -> None:
    for name, method in every_method().items():
        for rates in filter(None, (method.advised, method.advised.images, method.advised.headed)):
            assert 0 < rates.delta < 1, name
            assert 0 < rates.head < 1, name
            assert rates.source, name
