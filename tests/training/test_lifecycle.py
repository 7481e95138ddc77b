"""The life of a method in a Trainer: when it is applied, what the optimizer holds, what is refused before training."""

import copy
import pickle
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    BitFit,
    LinearProbe,
    LoRA,
    LoRAMixin,
    Method,
    PromptTuning,
    TuningError,
    load_from_checkpoint,
    merge,
)
from lightning_peft.core.graft import grafts
from lightning_peft.training import random_states
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The dirpath has changed from",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
)


class BuiltLate(Tuned):
    """Builds its backbone in configure_model."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.save_hyperparameters({"optimizer": "Adam", "lr": 1e-2})

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = tiny("bert")


class BuiltInSetup(Tuned):
    """Builds its backbone in setup."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.save_hyperparameters({"optimizer": "Adam", "lr": 1e-2})

    def setup(self, stage: str) -> None:
        if not hasattr(self, "model"):
            self.model = tiny("bert")


class Owner(LoRAMixin, Tuned):
    """Owns its method."""


def trained(module: nn.Module) -> list[str]:
    return sorted(name for name, p in module.named_parameters() if p.requires_grad)


def lora_count(module: nn.Module) -> int:
    return sum(place.name == "lora" for place in grafts(module))


@pytest.mark.parametrize("kind", [Tuned, BuiltLate, BuiltInSetup])
def test_applied_once_wherever_the_backbone_is_built(kind: type[Tuned], tmp_path: Path) -> None:
    module = kind()
    first = trainer(tmp_path, LoRA(r=2))
    first.fit(module, loader("bert"))
    first.validate(module, loader("bert"), verbose=False)
    first.test(module, loader("bert"), verbose=False)
    first.predict(module, loader("bert"))
    second = trainer(tmp_path, LoRA(r=2), max_epochs=2)
    second.fit(module, loader("bert"))
    assert lora_count(module) == 4
    assert len(second.optimizers[0].state) == len(trained(module)) == 10


@pytest.mark.parametrize("kind", [Tuned, BuiltLate, BuiltInSetup])
def test_methods_add_up_in_any_order(kind: type[Tuned], tmp_path: Path) -> None:
    names = []
    for methods in ([LoRA(r=2), BitFit()], [BitFit(), LoRA(r=2)]):
        module = kind()
        trainer(tmp_path, *methods).fit(module, loader("bert"))
        names.append(trained(module))
    assert names[0] == names[1]
    assert sum(".lora." in name for name in names[0]) == 8
    assert sum(name.endswith(".bias") for name in names[0]) == 19


def test_a_module_that_owns_its_method_needs_no_callback(tmp_path: Path) -> None:
    module = Owner()
    module.method = LoRA(r=3)
    checkpoint = ModelCheckpoint(tmp_path, filename="delta")
    trainer(tmp_path, checkpoint).fit(module, loader("bert"))
    assert lora_count(module) == 4
    loaded = Owner.load_from_checkpoint(tmp_path / "delta.ckpt")
    inputs = batch("bert")
    assert torch.equal(loaded.eval().model(**inputs).logits, module.eval().model(**inputs).logits)
    assert sorted(module.delta_state()) == trained(module)
    assert module.full_state_dict().keys() == module.state_dict().keys()
    before = module.model(**inputs).logits
    plain = module.merge()
    assert plain is module.model
    assert not list(grafts(module))
    torch.testing.assert_close(plain(**inputs).logits, before, atol=1e-5, rtol=0)


def test_the_module_keeps_no_trace_in_the_class(tmp_path: Path) -> None:
    hook = Tuned.on_load_checkpoint
    trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path, filename="delta")).fit(Tuned(), loader("bert"))
    load_from_checkpoint(Tuned, tmp_path / "delta.ckpt")
    assert Tuned.on_load_checkpoint is hook
    assert "on_load_checkpoint" not in vars(Tuned)


@pytest.mark.parametrize("kind", [Tuned, BuiltLate])
def test_load_from_checkpoint_of_a_plain_class(kind: type[Tuned], tmp_path: Path) -> None:
    module = kind()
    trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path, filename="delta")).fit(module, loader("bert"))
    loaded = load_from_checkpoint(kind, tmp_path / "delta.ckpt")
    inputs = batch("bert")
    assert torch.equal(loaded.eval().model(**inputs).logits, module.eval().model(**inputs).logits)


def test_optimizer_of_the_head_alone_gets_the_rest(tmp_path: Path) -> None:
    class HeadOnly(Tuned):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.model.classifier.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module = HeadOnly()
    run = trainer(tmp_path, LoRA(r=2))
    before = {name: p.clone() for name, p in module.named_parameters()}
    run.fit(module, loader("bert"))
    assert len(run.optimizers[0].param_groups) == 1
    assert len(run.optimizers[0].param_groups[0]["params"]) == len(trained(module))
    for name, parameter in module.named_parameters():
        if name in before and not parameter.requires_grad:
            assert torch.equal(parameter, before[name])
    assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if name.endswith("lora.B"))


def test_optimizer_that_holds_nothing_trained_is_refused(tmp_path: Path) -> None:
    class Elsewhere(Tuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([nn.Parameter(torch.zeros(1))])

    with pytest.raises(TuningError, match="no optimizer that holds one of the 10 trained parameters"):
        trainer(tmp_path, LoRA(r=2)).fit(Elsewhere(), loader("bert"))


def test_two_optimizers_may_hold_a_parameter(tmp_path: Path) -> None:
    class Twice(Tuned):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            head = self.model.classifier.parameters()
            return torch.optim.Adam(self.parameters()), torch.optim.SGD(head, lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    run = trainer(tmp_path, LoRA(r=2))
    run.fit(Twice(), loader("bert"))
    assert [sum(len(group["params"]) for group in o.param_groups) for o in run.optimizers] == [10, 2]


def test_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    class Unpooled(Tuned):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model.bert(batch["input_ids"]).last_hidden_state.sum()

    with (
        pytest.warns(UserWarning, match=r"3 trained parameters got no gradient in the first step, e\.g\. model\.bert"),
        pytest.raises(TuningError, match=r"3 trained parameters got no gradient, e\.g\. model\.bert\.pooler.*exclude="),
    ):
        trainer(tmp_path, BitFit()).fit(Unpooled(), loader("bert"))
    quiet = BitFit(exclude=r".*pooler.*|classifier.*")
    trainer(tmp_path, quiet).fit(Unpooled(), loader("bert"))


@pytest.mark.parametrize("bypassed", [False, True])
def test_experts_to_which_no_token_came_are_no_error_but_none_at_all_is_one(tmp_path: Path, bypassed: bool) -> None:
    class Routed(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
            self.net = nn.ModuleDict({"experts": experts, "last": nn.Linear(2, 2)})

        def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
            return self.net["last"](x if bypassed else self.net["experts"][batch_idx % 2](x)).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(tmp_path, LoRA(r=1, target_modules=r"experts\.\d|last", backbone="net"))
    said = pytest.raises(TuningError, match="8 trained parameters got no gradient") if bypassed else nullcontext()
    with (
        pytest.warns(UserWarning, match="no gradient in the first step|no token came to experts with 4 ") as seen,
        said,
    ):
        run.fit(Routed(), DataLoader(torch.ones(4, 2), batch_size=2))
    assert any("no token came" in str(each.message) for each in seen) != bypassed


@pytest.mark.parametrize("accumulated", [False, True])
def test_parameter_without_a_gradient_where_the_module_optimizes_by_hand(tmp_path: Path, accumulated: bool) -> None:
    """Two losses take turns, each of which uses a part; what neither uses is named after the epoch."""

    class ByHand(Tuned):
        def __init__(self, pooled: bool) -> None:
            super().__init__()
            self.automatic_optimization, self.pooled = False, pooled

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            out = self.model.bert(batch["input_ids"])
            loss = out.last_hidden_state.sum()
            if self.pooled and batch_idx % 2:
                loss = self.model.classifier(out.pooler_output).sum()
            self.manual_backward(loss)
            if not accumulated or batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    first = "no gradient in the first step"
    with pytest.warns(UserWarning, match=first) if not accumulated else nullcontext():
        trainer(tmp_path, BitFit(), LoRA(r=2)).fit(ByHand(pooled=True), loader("bert"))
    with (
        pytest.warns(UserWarning, match=first),
        pytest.raises(TuningError, match=r"3 trained parameters got no gradient, e\.g\. model\.bert\.pooler"),
    ):
        trainer(tmp_path, BitFit(), max_epochs=3).fit(ByHand(pooled=False), loader("bert"))


def test_the_only_network_of_a_module_is_its_backbone(tmp_path: Path) -> None:
    class Whole(Tuned):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.save_hyperparameters({"optimizer": "Adam", "lr": 1e-2})
            self.net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).sum()

    class Built(Whole):
        def configure_model(self) -> None:
            pass

    data, module, methods = DataLoader(torch.randn(4, 3), 2), Whole(), [LoRA(r=2, target_modules=["0"]), BitFit()]
    trainer(tmp_path, *methods).fit(module, data)
    assert [method.backbone for method in methods] == ["net", "net"]
    assert trained(module) == ["net.0.bias", "net.0.lora.A", "net.0.lora.B", "net.2.bias", "net.2.weight"]
    with pytest.raises(TuningError, match=r"name it with backbone= \(it has net\)"):
        trainer(tmp_path, LoRA(r=2, target_modules=["0"])).fit(Built(), data)


def test_module_without_a_backbone(tmp_path: Path) -> None:
    class Plain(Tuned):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.save_hyperparameters({"optimizer": "Adam", "lr": 1e-2})
            self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.body(batch)).sum()

    data = DataLoader(torch.randn(4, 3), 2)
    with pytest.raises(
        TuningError, match=r"no pretrained transformers model.*name it with backbone= \(it has body, head\)"
    ):
        trainer(tmp_path, LoRA()).fit(Plain(), data)
    module = Plain()
    trainer(tmp_path, LoRA(r=2, backbone="body", target_modules=r"")).fit(module, data)
    assert trained(module) == ["body.lora.A", "body.lora.B", "head.bias", "head.weight"]
    with pytest.raises(TuningError, match="no submodule 'bodi'"):
        trainer(tmp_path, LoRA(backbone="bodi")).fit(Plain(), data)


def test_compiled_backbone_is_refused(tmp_path: Path) -> None:
    module = Tuned()
    module.model.compile()
    with pytest.raises(TuningError, match="compiled"):
        trainer(tmp_path, LoRA(r=2)).fit(module, loader("bert"))


def test_averaging_must_come_after_the_method(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="EMAWeightAveraging copies the module before LoRA has changed it"):
        trainer(tmp_path, EMAWeightAveraging(), LoRA(r=2)).fit(Tuned(), loader("bert"))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning", "ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_averages_are_deltas_too_and_resume(average: Any, tmp_path: Path) -> None:
    def run(folder: str, resume: Path | None = None) -> Tuned:
        module = Tuned(dropout=0.1)
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, LoRA(r=2), average(), saving, max_epochs=3)
        fit.fit(module, loader("bert", shuffle=True), ckpt_path=resume)
        return module

    whole = run("whole")
    file = tmp_path / "whole" / "epoch=0.ckpt"
    assert file.stat().st_size < 80_000
    resumed = run("resumed", file)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Counting(DataLoader):
    """A loader that remembers which rows it has given, so that a run can stop in the middle of an epoch."""

    given = 0

    def __iter__(self) -> Any:
        start, self.given = self.given, 0
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(5)).tolist()
        for i in range(start, len(self)):
            self.given = i + 1
            rows = [self.dataset[k] for k in order[i * self.batch_size : (i + 1) * self.batch_size]]
            yield self.collate_fn(rows)
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def test_resume_inside_an_epoch_with_a_stateful_loader(tmp_path: Path) -> None:
    def run(folder: str, resume: Path | None = None) -> Tuned:
        module = Tuned(dropout=0.2)
        data = Counting(loader("bert", rows=24).dataset, 4)
        saving = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer(tmp_path, LoRA(r=2, backbone_mode="train"), saving, max_epochs=2).fit(module, data, ckpt_path=resume)
        return module

    whole = run("whole")
    torch.manual_seed(99)
    resumed = run("resumed", tmp_path / "whole" / "step=4.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_all_random_generators_go_on_where_they_were() -> None:
    state = random_states.random_state()
    drawn = (torch.rand(2), numpy.random.rand(2), random.random())
    random_states.set_random_state(state)
    again = (torch.rand(2), numpy.random.rand(2), random.random())
    assert torch.equal(drawn[0], again[0])
    assert numpy.array_equal(drawn[1], again[1])
    assert drawn[2] == again[2]


def test_moments_follow_their_parameters_when_the_order_changes(tmp_path: Path) -> None:
    class Reversed(Tuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(list(self.parameters())[::-1], lr=self.hparams.lr)

    def run(kind: type[Tuned], folder: str, resume: Path | None = None) -> L.Trainer:
        fit = trainer(
            tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1), max_epochs=2
        )
        fit.fit(kind(), loader("bert"), ckpt_path=resume)
        return fit

    whole = run(Tuned, "whole")
    resumed = run(Reversed, "resumed", tmp_path / "whole" / "epoch=0.ckpt")
    here = dict(whole.lightning_module.named_parameters())
    there = dict(resumed.lightning_module.named_parameters())
    for name in trained(whole.lightning_module):
        assert torch.equal(here[name], there[name])
        assert torch.equal(
            whole.optimizers[0].state[here[name]]["exp_avg"], resumed.optimizers[0].state[there[name]]["exp_avg"]
        )


def test_penalty_is_part_of_the_loss_whatever_the_accumulation(tmp_path: Path) -> None:
    class Decayed(LoRA):
        def penalty(self, module: nn.Module) -> Tensor:
            return sum(p.pow(2).sum() for p in module.parameters() if p.requires_grad)

    class Silent(Tuned):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)

    gradients = []
    for accumulate in (1, 3):
        module = Silent(optimizer="SGD", lr=0.0)
        trainer(tmp_path, Decayed(r=2), accumulate_grad_batches=accumulate, max_steps=1).fit(module, loader("bert"))
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[-1][name], 2 * parameter.detach())


def test_spawned_processes_are_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    run = trainer(tmp_path, LoRA(r=2))
    run.strategy._launcher = _MultiProcessingLauncher.__new__(_MultiProcessingLauncher)
    with pytest.raises(TuningError, match="strategy='ddp'"):
        run.callbacks[0].setup(run, Tuned(), "fit")


def test_module_is_copied_and_pickled_after_fit(tmp_path: Path) -> None:
    module = Tuned()
    trainer(tmp_path, LoRA(r=2)).fit(module, loader("bert"))
    inputs = batch("bert")
    expected = module.eval().model(**inputs).logits
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.model(**inputs).logits, expected)
        twin.model.bert.encoder.layer[0].attention.self.query.lora.B.data += 1
        assert not torch.equal(twin.model(**inputs).logits, expected)
        checkpoint = {"state_dict": twin.state_dict()}
        twin.on_save_checkpoint(checkpoint)
        theirs = checkpoint["state_dict"]["model.bert.encoder.layer.0.attention.self.query.lora.B"]
        assert torch.equal(theirs, twin.model.bert.encoder.layer[0].attention.self.query.lora.B)
    assert torch.equal(module.model(**inputs).logits, expected)


def test_checkpoint_saved_by_hand_after_fit_is_a_delta(tmp_path: Path) -> None:
    module = Tuned()
    run = trainer(tmp_path, LoRA(r=2))
    run.fit(module, loader("bert"))
    run.save_checkpoint(tmp_path / "by_hand.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("by_hand", "weights"):
        assert sorted(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]) == trained(module)


def test_batches_are_given_back_as_they_were(tmp_path: Path) -> None:
    class Watching(Tuned):
        def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            assert batch["input_ids"].shape == (4, 13)

    rows = [batch("bert", seed=i) for i in range(2)]
    before = copy.deepcopy(rows)
    prompt = PromptTuning(num_virtual_tokens=3, init="random_uniform")
    trainer(tmp_path, prompt, max_epochs=2).fit(Watching(), DataLoader(rows, batch_size=None))
    for now, then in zip(rows, before, strict=True):
        assert now.keys() == then.keys()
        assert all(torch.equal(now[name], then[name]) for name in then)


def test_modes_of_frozen_and_trained_modules(tmp_path: Path) -> None:
    class Modes(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Tuned, *args: Any) -> None:
            self.seen = {name: child.training for name, child in module.model.named_modules()}

    for mode in ("train", "eval"):
        seen = Modes()
        run = trainer(tmp_path, LoRA(r=2, backbone_mode=mode), seen)
        run.fit(Tuned(), loader("bert"), loader("bert"))
        assert seen.seen["bert.encoder.layer.0.output.dropout"] is (mode == "train")
        assert seen.seen["bert.encoder.layer.0.attention.self.query.lora"]
        assert seen.seen["classifier"]


def test_frozen_batch_norm_does_not_move(tmp_path: Path) -> None:
    class Normed(Tuned):
        def __init__(self) -> None:
            super().__init__()
            self.model.dropout = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.1))

    module = Normed()
    before = module.model.dropout[0].running_mean.clone()
    trainer(tmp_path, LoRA(r=2, backbone_mode="train", exclude=r"dropout\..*")).fit(module, loader("bert"))
    assert torch.equal(module.model.dropout[0].running_mean, before)


class Scaled(MixedPrecision):
    """fp16 autocast with a GradScaler on the CPU, where Lightning takes bf16 instead; it looks at each gradient."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        self.seen: set[torch.dtype] = set()

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        def looked() -> Any:
            result = closure()
            self.seen |= {p.grad.dtype for group in optimizer.param_groups for p in group["params"]}
            return result

        return super().optimizer_step(optimizer, model, looked, **kwargs)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("method", [LoRA(r=2), BitFit(), LinearProbe()], ids=lambda m: m.name)
def test_the_scaler_never_meets_an_fp16_gradient(method: Method, half: bool, tmp_path: Path) -> None:
    """16-mixed, also over a backbone that was loaded in fp16; the scale is resumed."""
    scales = []
    for epochs in (2, 1, 2):
        module, plugin = Tuned(), Scaled()
        if half:
            module.model.half()
        saving = ModelCheckpoint(tmp_path / str(len(scales)), filename="delta")
        options = {"plugins": [plugin], "gradient_clip_val": 0.01, "max_epochs": epochs}
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        run = trainer(tmp_path, eval(repr(method)), saving, **options)
        run.fit(module, loader("bert"), ckpt_path=tmp_path / "1" / "delta.ckpt" if len(scales) == 2 else None)
        assert plugin.seen == {torch.float32}
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
        assert any(not torch.equal(before.get(n, p * 0), p) for n, p in module.named_parameters() if p.requires_grad)
        assert all(torch.equal(before[n], p) for n, p in module.named_parameters() if not p.requires_grad)
        scales.append(plugin.scaler.state_dict())
    assert scales[0] == scales[2]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [LoRA(r=2), BitFit(), LinearProbe()], ids=lambda m: m.name)
def test_what_trains_stays_in_fp32(precision: Any, method: Method, tmp_path: Path) -> None:
    module = Tuned()
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    saving = ModelCheckpoint(tmp_path, filename="delta")
    trainer(tmp_path, method, saving, precision=precision, max_steps=1).fit(module, loader("bert"))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype is torch.float32, name
            if name in expected:  # one step of Adam at 1e-2, not a rounding to bf16
                assert (parameter - expected[name]).abs().max() <= 1.01e-2
        else:
            frozen = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
            assert parameter.dtype is frozen, name
    saved = torch.load(tmp_path / "delta.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.dtype is torch.float32 for tensor in saved.values())
    fresh = Tuned()
    run = trainer(tmp_path, eval(repr(method)), precision=precision)
    run.validate(fresh, loader("bert"), ckpt_path=tmp_path / "delta.ckpt", verbose=False)
    state = fresh.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())


def test_merged_module_is_plain(tmp_path: Path) -> None:
    module = Tuned()
    trainer(tmp_path, LoRA(r=2)).fit(module, loader("bert"))
    inputs = batch("bert")
    expected = module.eval().model(**inputs).logits
    merge(module)
    assert module.state_dict().keys() == Tuned().state_dict().keys()
    assert all(p.requires_grad for p in module.parameters())
    torch.testing.assert_close(module.model(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_an_exclusion_that_excludes_nothing_is_refused() -> None:
    model = tiny("bert")
    with pytest.raises(TuningError, match=r"exclude='poler' matches no module or parameter.*pooler"):
        BitFit(exclude="poler").apply(model)
    assert all(p.requires_grad for p in model.parameters())


def test_loggers_write_beside_a_method(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    run = trainer(tmp_path, LoRA(r=2), logger=loggers, log_every_n_steps=1)
    run.fit(Tuned(), loader("bert"), loader("bert"))
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    assert "val_loss" in next((tmp_path / "csv").rglob("metrics.csv")).read_text()


def test_gradient_checkpointing_needs_training_mode(tmp_path: Path) -> None:
    module = Tuned()
    module.model.activation_checkpointing_enable()
    with pytest.raises(TuningError, match=r"gradient checkpointing on.*backbone_mode='train'"):
        trainer(tmp_path, LoRA(r=2, backbone_mode="eval")).fit(module, loader("bert"))
    plain, checkpointed = Tuned(optimizer="SGD"), Tuned(optimizer="SGD")
    checkpointed.model.activation_checkpointing_enable()
    for one in (plain, checkpointed):
        torch.manual_seed(3)
        trainer(tmp_path, LoRA(r=2), BitFit(backbone_mode="eval")).fit(one, loader("bert"))
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True)
    )
