"""The laws that every method keeps. A test file names its method, the models that it fits and its count of parameters:

class TestLoRA(MethodContract):
    method = LoRA(r=2)
    backbones = ("bert", "llama")

    def count(self, kind): ...
"""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft import (
    Method,
    TuningError,
    activate,
    collect,
    combine,
    list_deltas,
    load_delta,
    muted,
    prepare,
    remove_delta,
    routed,
    save_delta,
)
from lightning_peft.bases.merging import MergingMethod
from lightning_peft.core.delta import metadata
from lightning_peft.core.graft import grafts
from lightning_peft.core.tuning import tunings
from tests import fresh
from tests.kept import kept_tensors
from tests.models import HEADS, TWO_TOWERS, batch, known, tiny
from tests.modules import OfPairs, Tuned, loader, pairs, trainer
from tests.syncs import Syncs

ON_FEW_BACKBONES = {
    "test_a_named_backbone_is_known_from_inside_and_outside": 1,
    "test_muted_it_is_the_bare_backbone": 2,
    "test_deltas_of_two_names_are_each_as_alone": 2,
    "test_routed_each_row_is_as_alone": 1,
    "test_combined_with_weights_of_one_it_is_itself": 1,
}
"""How many backbones the laws of a mechanism need, in which these have little part."""
AT_ONCE = {
    "test_compiled_is_eager": 1,
    "test_a_half_precision_backbone": 2,
    "test_a_resumed_run_is_the_uninterrupted_one": 2,
    "test_a_fresh_module_validates_and_predicts_from_the_delta": 2,
    "test_gradient_checkpointing_gives_the_same_gradients": 3,
}
"""On how many backbones a law that takes long is tried each time; on the others with the slow tests."""


class MethodContract:
    """Inherit it, and pytest runs each law on each of the ``backbones``."""

    method: ClassVar[Method]
    backbones: ClassVar[tuple[str, ...]]
    identity_at_start: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True
    """Whether it trains on batches that are no mappings."""
    on_families: ClassVar[tuple[tuple[str, Method], ...]] = ()
    """Columns that ``docs/families.md`` has of it, each with the method as it is tried there."""
    compiled: ClassVar[tuple[str, ...] | None] = None
    """The backbones to compile, which takes seconds; None: the first."""
    traces_backward: ClassVar[bool] = False
    """Whether its backward pass is traced each time, as of a method of each joint; if not, with the slow tests."""

    def count(self, kind: str) -> int:
        """Return the number of parameters that the method's paper says it trains, the task head apart."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "kind" in metafunc.fixturenames:
            law = metafunc.function.__name__
            chosen = self.compiled or self.backbones[:1] if law == "test_compiled_is_eager" else self.backbones
            chosen = chosen[: ON_FEW_BACKBONES.get(law, len(chosen))]
            first = AT_ONCE.get(law, len(chosen))
            marks = [() if i < first else pytest.mark.slow for i in range(len(chosen))]
            metafunc.parametrize("kind", [pytest.param(k, marks=m) for k, m in zip(chosen, marks, strict=True)])
        if "backend" in metafunc.fixturenames:
            slow = {"eager": self.traces_backward, "aot_eager": not self.traces_backward}
            marks = {name: pytest.mark.slow if late else () for name, late in slow.items()}
            metafunc.parametrize("backend", [pytest.param(name, marks=mark) for name, mark in marks.items()])

    # What `apply` does to a backbone.

    def test_the_base_keeps_its_keys_classes_and_modes(self, kind: str) -> None:
        model = known(kind)
        values, shape = copy_of(model.state_dict()), {n: (type(m), m.training) for n, m in model.named_modules()}
        self.applied(model)
        assert_same(values, {name: model.state_dict()[name] for name in values})
        assert {n: (type(m), m.training) for n, m in model.named_modules() if n in shape} == shape
        assert not any(m.training for m in model.modules()), "a graft must be in the mode of its host"
        missing, unexpected = model.load_state_dict(values, strict=False)
        assert not unexpected
        assert not set(missing) & frozen_names(model)

    def test_it_trains_as_many_parameters_as_the_paper_says(self, kind: str) -> None:
        model = known(kind)
        self.applied(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == self.count(kind) + HEADS[kind]

    def test_the_delta_is_what_requires_gradients(self, kind: str) -> None:
        model = known(kind)
        self.applied(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(collect(model)) == trained | graft_buffers(model)

    def test_at_the_start_it_is_the_frozen_model(self, kind: str) -> None:
        # Frozen, since SDPA takes another kernel where T5's position bias requires gradients.
        frozen, model = tiny(kind).requires_grad_(False), known(kind)
        method = self.applied(model)
        same = torch.equal(output(frozen, kind), output(model, kind, method))
        assert same is self.identity_at_start

    def test_only_the_delta_trains(self, kind: str) -> None:
        model = known(kind)
        method = self.applied(model)
        before, frozen = copy_of(model.state_dict()), frozen_names(model)
        first = loss_of(model, kind, method).item()
        adam = torch.optim.Adam  # whose steps do not hang on the scale of a gradient: SigLIP's are tiny
        last = descend(model, kind, method, steps=4, lr=1e-2, optimizer=adam)
        assert last < 0.999 * first, "a fall by less could be rounding"
        after = model.state_dict()
        assert_same({name: before[name] for name in frozen}, {name: after[name] for name in frozen})
        assert any(not torch.equal(before[name], after[name]) for name in collect(model))

    def test_every_trained_parameter_gets_a_gradient(self, kind: str) -> None:
        model = known(kind)
        method = self.applied(model)
        loss_of(model, kind, method).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) is p.requires_grad, name
            assert p.grad is None or p.grad.isfinite().all(), name
        assert not kept_tensors(model)

    def test_twice_is_refused(self, kind: str) -> None:
        model = known(kind)
        method = self.applied(model)
        before, keys = output(model, kind, method), list(model.state_dict())
        for again in (method, copy.deepcopy(self.method)):
            with pytest.raises(TuningError, match=f"{type(method).__name__} is applied to this .* already"):
                again.apply(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(output(model, kind, method), before)

    def test_a_named_backbone_is_known_from_inside_and_outside(self, kind: str) -> None:
        model = known(kind)
        keys, module = list(model.state_dict()), nn.ModuleDict({"net": model})
        method = dataclasses.replace(self.method, backbone="net")
        method.apply(module)
        assert method.is_applied(module)
        assert method.is_applied(model)
        if isinstance(method, MergingMethod):
            method.merge(model)
            method.unmerge(module)
        if method.keeps_originals:
            method.remove(model)
            assert list(model.state_dict()) == keys
            assert not method.is_applied(module)

    def test_an_error_changes_nothing(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class BrokenError(RuntimeError):
            pass

        def graft(method: Method, backbone: nn.Module) -> Any:
            list(real(method, backbone))
            raise BrokenError

        real = type(self.method).graft
        model = known(kind)
        next(model.parameters()).requires_grad_(False)
        before = snapshot(model, kind)
        monkeypatch.setattr(type(self.method), "graft", graft)
        with pytest.raises(BrokenError):
            copy.deepcopy(self.method).apply(model)
        assert_same(before, snapshot(model, kind))
        monkeypatch.undo()
        self.applied(model)

    # What `remove` gives back.

    def test_remove_restores_everything(self, kind: str) -> None:
        model = tiny(kind)
        next(model.parameters()).requires_grad_(False)
        before = snapshot(model, kind)
        method = self.applied(model)
        method.remove(model)
        assert_same(before, snapshot(model, kind))
        with pytest.raises(TuningError, match="is not applied"):
            method.remove(model)

    def test_remove_after_training(self, kind: str) -> None:
        model = known(kind)
        before = snapshot(model, kind)
        method = self.applied(model)
        descend(model, kind, method, steps=2)
        if method.keeps_originals:
            method.remove(model)
            model.zero_grad()
            assert_same(before, snapshot(model, kind))
        else:
            trained = output(model, kind, method)
            with pytest.raises(TuningError, match="kept no copy"):
                method.remove(model)
            assert torch.equal(output(model, kind, method), trained), "a refusal must change nothing"

    # Many deltas on one backbone.

    def test_muted_it_is_the_bare_backbone(self, kind: str) -> None:
        frozen, model = tiny(kind).requires_grad_(False), known(kind)
        method = self.applied(model)
        shake(model)
        before, flags = output(model, kind, method), {n: p.requires_grad for n, p in model.named_parameters()}
        if not method.keeps_originals:
            with pytest.raises(TuningError, match="no copy of it was kept"), muted(model):
                pass
        else:
            with muted(model):
                assert torch.equal(output(model, kind), output(frozen, kind))
                if any(tuning.parked for _, _, tuning in tunings(model)):
                    with pytest.raises(TuningError, match="let it compute first"):
                        metadata(model)
            assert not torch.equal(output(frozen, kind), before)
        assert torch.equal(output(model, kind, method), before)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags

    def test_deltas_of_two_names_are_each_as_alone(self, kind: str, tmp_path: Path) -> None:
        bare, model, alone = snapshot(tiny(kind), kind), known(kind), {}
        for seed, name in enumerate(("films", "books")):
            single = known(kind)
            method = self.applied(single)
            torch.manual_seed(seed)
            shake(single)
            save_delta(single, tmp_path / f"{name}.safetensors")
            alone[name] = output(single, kind, method)
            load_delta(model, tmp_path / f"{name}.safetensors", name)
        assert not torch.equal(alone["films"], alone["books"])
        for name, expected in alone.items():
            activate(model, name)
            assert torch.equal(at_work(model, kind), expected)
            model.zero_grad()
            model(**prepare(model, batch(kind))).loss.backward()
            assert all(f"_{name}." in n or f"_{name}_" in n for n, p in model.named_parameters() if p.grad is not None)
            save_delta(model, tmp_path / "again.safetensors", name)
            with pytest.raises(TuningError, match=r"is applied to this .* already as"):
                dataclasses.replace(self.method, name=name).apply(model)
        remove_delta(model, "films")
        assert torch.equal(at_work(model, kind), alone["books"])
        assert [delta.name for delta in list_deltas(model)] == ["books"]
        remove_delta(model, "books")
        model.eval().zero_grad()
        assert_same(bare, snapshot(model, kind))
        load_delta(model, tmp_path / "again.safetensors", "others")
        assert torch.equal(at_work(model, kind), alone["books"])

    def test_routed_each_row_is_as_alone(self, kind: str, tmp_path: Path) -> None:
        model, rows, alone = known(kind), ["films", "books", None, "films"], {}
        for seed, name in enumerate(("films", "books")):
            single = known(kind)
            self.applied(single)
            torch.manual_seed(seed)
            shake(single)
            save_delta(single, tmp_path / f"{name}.safetensors")
            load_delta(model, tmp_path / f"{name}.safetensors", name)
        plain = {n: v for n, v in batch(kind).items() if n != "labels" or kind == "t5"}
        with torch.no_grad():
            for i, name in enumerate(rows):
                activate(model, *filter(None, [name]))
                alone[i] = model(**prepare(model, {n: v[i : i + 1] for n, v in plain.items()})).logits[0]
            with routed(model, rows):
                if kind in TWO_TOWERS:  # whose texts are of classes, and not of the rows
                    with pytest.raises(TuningError, match=r"which are no batch|is routed by 4 names"):
                        model(**prepare(model, plain))
                    return
                found = model(**prepare(model, plain)).logits
        for i, expected in alone.items():
            torch.testing.assert_close(found[i][: len(expected)], expected, atol=1e-5, rtol=1e-4)

    def test_combined_with_weights_of_one_it_is_itself(self, kind: str, tmp_path: Path) -> None:
        """One delta of weight 1, and two that are equal, of weights that add up to 1."""
        single, file = known(kind), tmp_path / "delta.safetensors"
        method = self.applied(single)
        shake(single)
        save_delta(single, file)
        expected = output(single, kind, method)
        for name, files, weights in (("one", [file], [1.0]), ("two", [file, file], [0.7, 0.3])):
            model = known(kind)
            combine(files, weights, tmp_path / f"{name}.safetensors", backbone=model)
            assert not list_deltas(model)
            load_delta(model, tmp_path / f"{name}.safetensors", name)
            assert_near({"": expected}, {"": at_work(model, kind)}, 1e-6 if name == "one" else 1e-5)

    # How it lives with the rest of torch.

    def test_copies_are_equal_and_independent(self, kind: str) -> None:
        model = known(kind)
        method = self.applied(model)
        shake(model)
        before = output(model, kind, method)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(other, kind, method), before)
            shake(other)
            assert not torch.equal(output(other, kind, method), before)
            assert torch.equal(output(model, kind, method), before)
            del other
            assert torch.equal(output(model, kind, method), before)

    def test_repr_rebuilds_it(self) -> None:
        rebuilt = eval(repr(self.method), vars(lightning_peft) | {type(self.method).__name__: type(self.method)})
        assert type(rebuilt) is type(self.method)
        assert rebuilt.init_args() == self.method.init_args()

    def test_compiled_is_eager(self, kind: str, backend: str) -> None:
        model = known(kind)
        method = self.applied(model)
        shake(model)
        eager = gradients(model, kind, method)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        result = compiled(**inputs(kind, method))
        penalty = method.penalty(model)
        (result.loss if penalty is None else result.loss + penalty).backward()
        assert_near(eager, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, 1e-5)
        assert_near({"": model(**inputs(kind, method)).logits}, {"": result.logits}, 1e-5)

    def test_gradient_checkpointing_gives_the_same_gradients(self, kind: str) -> None:
        model = known(kind)
        method = self.applied(model)
        shake(model)
        model.train()  # transformers checkpoints in training mode only
        if kind != "swin":  # whose embeddings give a tuple, which this function of transformers cannot take
            # As checkpointing does in text models; other kernels run for such inputs.
            model.enable_input_require_grads()
        torch.manual_seed(2)
        plain, once = count_calls(model, lambda: gradients(model, kind, method))
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        checkpointed, more = count_calls(model, lambda: gradients(model, kind, method))
        assert more > once, "nothing was checkpointed"
        # T5's decoder layers add up their gradients of the encoder output in another order.
        assert_near(plain, checkpointed, 1e-5)

    def test_a_half_precision_backbone(self, kind: str) -> None:
        frozen, model = half(tiny(kind)).requires_grad_(False), half(known(kind))
        before = snapshot(model, kind)
        method = self.applied(model)
        dtype = torch.float32 if method.keep_fp32 else torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        now = output(model, kind, method)
        assert now.dtype == torch.bfloat16
        assert torch.equal(output(frozen, kind), now) is self.identity_at_start
        for name, grad in gradients(model, kind, method).items():
            assert grad.dtype == dtype, name
            assert grad.isfinite().all(), name
        model.zero_grad()
        method.remove(model)
        assert_same(before, snapshot(model, kind))

    def test_a_fresh_process_gives_the_same_output(self, tmp_path: Path) -> None:
        expected = {}
        for kind in self.backbones:
            model = known(kind)
            method = self.applied(model)
            shake(model)
            save_delta(model, tmp_path / f"{kind}.safetensors")
            expected[kind] = output(model, kind, method)
        fresh.compute(tmp_path)
        assert_same(expected, torch.load(tmp_path / "outputs.pt"))

    # Its life in a Trainer.

    def test_a_fit_trains_the_delta_and_saves_no_more(self, kind: str, tmp_path: Path) -> None:
        method, module = (
            dataclasses.replace(self.method, backbone="model"),
            (OfPairs if self.takes_pairs else Tuned)(kind),
        )
        full = ModelCheckpoint(tmp_path, filename="full")
        light = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True, every_n_train_steps=3)
        syncs = Syncs()
        rows = pairs(loader(kind)) if self.takes_pairs else loader(kind)
        trainer(tmp_path, syncs, method, syncs.end, full, light).fit(module, rows, rows)
        assert syncs.found == {}  # a step waits for no GPU
        delta, pristine = collect(module), tiny(kind).state_dict()
        now = module.model.state_dict()
        frozen = pristine.keys() & frozen_names(module.model)
        assert_same({n: pristine[n] for n in frozen}, {n: now[n] for n in frozen})
        assert any(not torch.equal(t, Tuned(kind).state_dict().get(n, torch.zeros(()))) for n, t in delta.items())
        for name in ("full", "light"):
            saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
            assert_same(delta, saved["state_dict"])
            assert ("optimizer_states" in saved) is (name == "full")
        size = sum(t.numel() * t.element_size() for t in delta.values())
        assert (tmp_path / "light.ckpt").stat().st_size <= 1.05 * size + 2**16

    def test_a_fresh_module_validates_and_predicts_from_the_delta(self, kind: str, tmp_path: Path) -> None:
        module, file = Tuned(kind), tmp_path / "delta.ckpt"
        fit = trainer(tmp_path, copy.deepcopy(self.method))
        fit.fit(module, loader(kind), loader(kind))
        fit.save_checkpoint(file)
        (loss,) = fit.validate(module, loader(kind), verbose=False)
        torch.manual_seed(1)
        other = trainer(tmp_path, copy.deepcopy(self.method))
        for run in (other.validate, other.test):
            assert run(Tuned(kind), loader(kind), file, verbose=False) == [loss]
        predicted = other.predict(Tuned(kind), loader(kind), ckpt_path=file)
        for ours, theirs in zip(fit.predict(module, loader(kind)), predicted, strict=True):
            assert torch.equal(ours, theirs)

    def test_a_resumed_run_is_the_uninterrupted_one(self, kind: str, tmp_path: Path) -> None:
        """Bit for bit, with dropout and shuffling, though the second process has drawn other random numbers."""

        def run(ckpt_path: Path | None = None) -> tuple[Tuned, L.Trainer]:
            every = ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1)
            method = dataclasses.replace(self.method, backbone_mode="train")
            module = Tuned(kind, dropout=0.2)
            fit = trainer(tmp_path, method, every, max_epochs=2)
            fit.fit(module, loader(kind, shuffle=True), loader(kind), ckpt_path=ckpt_path)
            return module, fit

        straight, first = run()
        middle = (tmp_path / "run" / "epoch=0.ckpt").rename(tmp_path / "middle.ckpt")
        (tmp_path / "run" / "epoch=1.ckpt").unlink()  # Lightning warns of a folder that is not empty
        torch.manual_seed(4)
        resumed, second = run(middle)
        assert second.global_step == first.global_step
        assert_same(collect(straight), collect(resumed))
        assert_same(moments(first), moments(second))

    def applied(self, model: nn.Module, **changes: Any) -> Method:
        """Apply a copy of the method, its random values being the same each time."""
        method = dataclasses.replace(self.method, **changes)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            method.apply(model)
        return method


def inputs(kind: str, method: Method | None = None) -> dict[str, Tensor]:
    """Return the batch of a kind as the method prepares it."""
    plain = batch(kind)
    return dict(plain if method is None else method.prepare(plain))


def output(model: nn.Module, kind: str, method: Method | None = None) -> Tensor:
    """Return the logits that the tuned model gives for the batch of its kind."""
    with torch.no_grad():
        return model(**inputs(kind, method)).logits


@torch.no_grad()
def at_work(model: nn.Module, kind: str) -> Tensor:
    """Return the logits that a model gives with the deltas that compute on it."""
    return model(**prepare(model, batch(kind))).logits


def loss_of(model: nn.Module, kind: str, method: Method | None = None) -> Tensor:
    """Return the loss that the tuned model gives for the batch of its kind, with what the method adds to it."""
    loss = model(**inputs(kind, method)).loss
    penalty = method.penalty(model) if method is not None else None
    return loss if penalty is None else loss + penalty


def gradients(model: nn.Module, kind: str, method: Method) -> dict[str, Tensor]:
    """Return the gradient of each trained parameter; none is left on the model."""
    model.zero_grad()
    loss_of(model, kind, method).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def descend(
    model: nn.Module,
    kind: str,
    method: Method | None,
    steps: int,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> float:
    """Take steps of the optimizer and return the last loss before its step."""
    stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        stepper.zero_grad()
        loss = loss_of(model, kind, method)
        loss.backward()
        stepper.step()
    return loss.item()


@torch.no_grad()
def shake(model: nn.Module, by: float = 0.1) -> None:
    """Add noise to whatever is trained, so that the delta is no identity."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=by)


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of all tensors in the state dict that are not the delta's; a tied weight has several."""
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return model.state_dict().keys() - trained - graft_buffers(model)


def graft_buffers(model: nn.Module) -> set[str]:
    """Return the names of the saved buffers in grafts, which are part of the delta."""
    names = {f"{path}.{name}.{b}".lstrip(".") for path, _, name, g in grafts(model) for b, _ in g.named_buffers()}
    return names & model.state_dict().keys()  # a constant that is not saved is none


def snapshot(model: nn.Module, kind: str) -> dict[str, Any]:
    """Return all that a caller can see of a model, and how many hooks and grafts it has."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return {
        "output": output(model, kind),
        "state": copy_of(model.state_dict()),
        "modules": {name: (type(m), m.training) for name, m in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "attributes": sorted(name for m in model.modules() for name in vars(m)),
        "hooks": hooks,
        "grafts": len(list(grafts(model))),
    }


def half(model: nn.Module) -> nn.Module:
    """Cast a model, and the images that it will be given, to bf16."""

    def cast(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {n: v.bfloat16() if n == "pixel_values" else v for n, v in kwargs.items()}

    model.register_forward_pre_hook(cast, with_kwargs=True)
    return model.bfloat16()


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict with storage of their own."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def moments(fit: L.Trainer) -> dict[str, Any]:
    """Return the state of the optimizer of a Trainer."""
    (optimizer,) = fit.optimizers
    return {str(i): state for i, state in optimizer.state_dict()["state"].items()}


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Assert that two nested structures are equal, tensors bit for bit and of one dtype."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right) or set(left) == set(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    """Assert that tensors differ by at most ``tolerance`` times the larger of 1 and their greatest entry."""
    assert set(left) == set(right)
    for name, tensor in left.items():
        scale = max(1.0, tensor.abs().max().item())
        assert (tensor - right[name]).abs().max().item() <= tolerance * scale, name


def count_calls(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what ``run`` returns, and how often it called a linear layer of the model in a backward pass."""
    calls: list[nn.Module] = []

    def count(module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            calls.append(module)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    result = run()
    for handle in handles:
        handle.remove()
    return result, len(calls)
