"""Diff-pruning: gates, the penalty as a product, exactly k entries, what is kept for backward, two phases of a fit."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_peft import DiffPruning, DiffPruningMixin, LoRA, TuningError, collect, from_delta, merge, save_delta
from lightning_peft.core.graft import grafts
from lightning_peft.updates.hard_concrete import ExpectedCount, Masked, gate, probability_open, uniform
from lightning_peft.updates.sparse_difference import SparseDifference
from tests.contract import MethodContract, assert_near, assert_same, copy_of, descend, inputs, loss_of, output, shake
from tests.models import BERT_LARGE, meta, tiny
from tests.modules import Tuned, loader, trainer

GROUPS = {"bert": 39, "gpt2": 28, "t5": 47, "vit": 38}
"""Tensors of the tiny backbones, tied ones once and the head apart."""


class TestDiffPruning(MethodContract):
    method = DiffPruning(sparsity=0.01)
    backbones = ("bert", "gpt2", "t5", "vit")
    traces_backward = True
    compiled = ("gpt2",)

    def count(self, kind: str) -> int:
        """A difference and a gate for every entry, and a gate for every tensor."""
        model = tiny(kind)
        head = {"bert": "classifier", "vit": "classifier"}.get(kind, "no head")
        sizes = [p.numel() for name, p in model.named_parameters() if not name.startswith(head)]
        assert len(sizes) == GROUPS[kind]
        return 2 * sum(sizes) + len(sizes)


def pruned(kind: str = "bert", **arguments: object) -> tuple[nn.Module, DiffPruning]:
    model, method = tiny(kind), DiffPruning(**arguments)
    method.apply(model)
    return model, method


# Gates.


@pytest.mark.parametrize(
    ("alpha", "low", "high", "expected"),
    [(5.0, -1.5, 1.5, 0.9933), (0.0, -1.5, 1.5, 0.5), (-2.0, -1.5, 1.5, 0.1192), (0.0, -0.1, 1.1, 0.9167)],
)
def test_the_probability_of_an_open_gate(alpha: float, low: float, high: float, expected: float) -> None:
    logits = torch.full((1_000_000,), alpha)
    z = gate(logits, uniform(logits, 1), low, high)
    assert (z > 0).float().mean().item() == pytest.approx(expected, abs=1e-3)
    assert probability_open(logits[:1], low, high).item() == pytest.approx(expected, abs=1e-4)
    at_one = torch.sigmoid(logits[:1] - torch.logit(torch.tensor((1 - low) / (high - low)))).item()
    assert (z == 1).float().mean().item() == pytest.approx(at_one, abs=1e-3)
    if alpha == 5:
        assert at_one == pytest.approx(0.9674, abs=1e-4)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("seed", [None, 4])
def test_the_gradient_is_that_of_autograd(grouped: bool, seed: int | None) -> None:
    torch.manual_seed(0)
    base, w, alpha = torch.randn(5, 7), torch.randn(5, 7), torch.randn(5, 7)
    group = torch.tensor([0.3]) if grouped else None
    upstream = torch.randn(5, 7)

    def plain(w: Tensor, alpha: Tensor, group: Tensor | None) -> Tensor:
        value = w
        for i, logits in enumerate((alpha, group)):
            if logits is not None:
                noise = 0.0
                if seed is not None:
                    u = uniform(logits, (seed + i * 2654435761) % 2**32)
                    noise = u.log() - (1 - u).log()
                value = value * (torch.sigmoid(logits + noise) * 3 - 1.5).clamp(0, 1)
        return base + value

    def leaves() -> list[Tensor | None]:
        return [None if t is None else t.clone().requires_grad_() for t in (w, alpha, group)]

    ours, theirs = leaves(), leaves()
    result = Masked.apply(base, *ours, seed, -1.5, 1.5)
    expected = plain(*theirs)
    assert_near({"": expected}, {"": result}, 1e-6)
    (result * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None:
            assert (mine.grad - other.grad).abs().max() <= 1e-6
            assert mine.grad.abs().sum() > 0


def test_the_noise_is_drawn_anew_for_each_pass_and_each_tensor() -> None:
    model, _method = pruned(alpha=0.0)
    shake(model)
    quiet = output(model, "bert")
    assert torch.equal(quiet, output(model, "bert")), "nothing is random in eval mode"
    for place in grafts(model):
        place.graft.train()
    assert not torch.equal(output(model, "bert"), output(model, "bert"))
    torch.manual_seed(1)
    first = output(model, "bert")
    torch.manual_seed(1)
    assert torch.equal(first, output(model, "bert"))
    a, b = (uniform(torch.zeros(50), seed) for seed in (5, (5 + 2654435761) % 2**32))
    assert (a - b).abs().mean() > 0.2


def test_compiled_in_training_it_draws_noise_too() -> None:
    model, _ = pruned("gpt2", alpha=0.0)
    shake(model)
    for place in grafts(model):
        place.graft.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = (compiled(**inputs("gpt2")) for _ in range(2))
    assert not torch.equal(first.logits, second.logits)
    second.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# The penalty.


def test_the_penalty_is_a_product() -> None:
    model, method = pruned(penalty_weight=1.0)
    with torch.no_grad():
        for place in grafts(model):
            if isinstance(place.graft, SparseDifference):
                for name in place.graft.weights:
                    place.graft.part(name, "alpha").normal_()
                    place.graft.part(name, "group").normal_()
    expected = 0.0
    for name, parameter in model.named_parameters():
        if name.endswith("_alpha"):
            group = model.get_parameter(name.removesuffix("alpha") + "group")
            expected += (torch.sigmoid(parameter).sum() * torch.sigmoid(group)).item()  # c = log(1.5 / 1.5) = 0
    assert method.penalty(model).item() == pytest.approx(expected, rel=1e-5)
    assert method.achieved(model) * sum(p.numel() for p in tiny("bert").bert.parameters()) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_gradient_of_the_penalty() -> None:
    alpha, group = (
        torch.randn(4, 3, dtype=torch.double, requires_grad=True),
        torch.zeros(1, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda a, g: ExpectedCount.apply(a, g, -0.1, 1.1), (alpha, group))
    assert torch.autograd.gradcheck(lambda a: ExpectedCount.apply(a, None, -1.5, 1.5), (alpha,))


def test_unstructured_has_no_groups() -> None:
    model, method = pruned(structured=False)
    assert not any(name.endswith("_group") for name in collect(model))
    assert method.penalty(model).item() == pytest.approx(
        1.25e-7 * 0.993307 * sum(p.numel() for p in tiny("bert").bert.parameters()), rel=1e-5
    )


def test_groups_of_bert_large() -> None:
    """391 tensors of the backbone, and with the two of the head the 393 that the paper counts."""
    model = meta(BERT_LARGE, hf.AutoModelForSequenceClassification)
    method = DiffPruning()
    method.apply(model)
    head = sum(name.startswith("classifier.") for name, p in model.named_parameters() if p.requires_grad)
    assert (method.groups(model), method.groups(model) + head) == (391, 393)


# What is kept for backward.


def kept_bytes(model: nn.Module, method: DiffPruning | None, train: bool = True) -> int:
    """Return the bytes that autograd keeps of a forward pass, parameters and buffers apart, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, "bert")
        if method is not None:
            loss = loss + method.penalty(model) if method.penalty(model) is not None else loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("train", [True, False])
def test_one_dense_copy_of_a_weight_is_kept_and_no_more(train: bool) -> None:
    """The weight that a linear layer multiplies by; no noise, no gate, no difference beside it."""
    full = tiny("bert").train(train)
    model, method = pruned()
    model.train(train)
    dense = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_w"))
    extra = kept_bytes(model, method) - kept_bytes(full, None)
    assert extra <= 4 * dense
    method.project(model)
    assert kept_bytes(model, method) - kept_bytes(full, None) <= 4 * dense


# The projection.


@pytest.mark.parametrize("sparsity", [0.0001, 0.005, 0.3])
def test_the_projection_keeps_exactly_the_greatest(sparsity: float) -> None:
    model, method = pruned(sparsity=sparsity)
    shake(model)
    plain = dict(tiny("bert").named_parameters())
    every = {}
    for place in grafts(model):
        if isinstance(place.graft, SparseDifference):
            for name in place.graft.weights:
                every[f"{place.path}.{name}"] = place.graft.delta(name).detach().abs().reshape(-1)
    sizes = sum(len(values) for values in every.values())
    budget = method.project(model)
    assert (
        budget
        == max(1, round(sparsity * sizes))
        == sum(t.numel() for n, t in collect(model).items() if n.endswith("_values"))
    )
    kept, dropped = [], []
    for place in grafts(model):
        if isinstance(place.graft, SparseDifference):
            for name in place.graft.weights:
                magnitudes = every[f"{place.path}.{name}"]
                indices = place.graft.part(name, "indices")
                mask = torch.zeros(len(magnitudes), dtype=torch.bool)
                if indices is not None:
                    assert indices.dtype == torch.int32
                    mask[indices.long()] = True
                    assert torch.equal(place.graft.part(name, "values").detach().abs(), magnitudes[mask])
                kept.append(magnitudes[mask])
                dropped.append(magnitudes[~mask])
    assert torch.cat(kept).min() >= torch.cat(dropped).max()
    assert method.achieved(model) == pytest.approx(budget / sizes)
    assert plain.keys() >= every.keys()
    with pytest.raises(TuningError, match="chosen already"):
        method.project(model)


def test_ties_do_not_overshoot_the_budget() -> None:
    model, method = pruned(sparsity=0.01)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_w"):
                parameter.fill_(0.5)
    total = sum(p.numel() for p in tiny("bert").bert.parameters())
    assert (
        method.project(model)
        == round(0.01 * total)
        == sum(t.numel() for n, t in collect(model).items() if n.endswith("_values"))
    )


def test_entries_that_were_not_kept_stay_exactly_as_pretrained() -> None:
    model, method = pruned(sparsity=0.01, exclude="classifier.*")
    descend(model, "bert", method, steps=2, lr=0.1)
    method.project(model)
    first = descend(model, "bert", method, steps=1, lr=0.01)
    assert descend(model, "bert", method, steps=3, lr=0.01) < first
    expected = output(model, "bert")
    changed = total = 0
    merged = merge(model)
    for (_name, before), (_, after) in zip(
        tiny("bert").bert.named_parameters(), merged.bert.named_parameters(), strict=True
    ):
        changed += (before != after).sum().item()
        total += before.numel()
    assert 0 < changed <= round(0.01 * total)
    assert_near({"": expected}, {"": output(merged, "bert")}, 1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_merged_is_live(sparse: bool) -> None:
    model, method = pruned("vit", sparsity=0.2)
    shake(model)
    if sparse:
        method.project(model)
    live = output(model, "vit")
    assert not torch.allclose(live, output(tiny("vit"), "vit"), atol=1e-3)
    merged = merge(model)
    assert_near({"": live}, {"": output(merged, "vit")}, 1e-5)
    assert not list(grafts(merged))


def test_a_projected_delta_is_small_and_gives_the_same_output(tmp_path: Path) -> None:
    model, method = pruned(sparsity=0.01, exclude="classifier.*")
    shake(model)
    save_delta(model, tmp_path / "dense.safetensors")
    budget = method.project(model)
    save_delta(model, tmp_path / "sparse.safetensors")
    delta = collect(model)
    assert sum(tensor.nbytes for tensor in delta.values()) == 8 * budget
    again = from_delta(tmp_path / "sparse.safetensors", tiny("bert"))
    assert_same(copy_of(delta), copy_of(collect(again)))
    assert torch.equal(output(again, "bert"), output(model, "bert"))
    dense = from_delta(tmp_path / "dense.safetensors", tiny("bert"))
    assert method.is_dense(dense)


# Its life in a Trainer.


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_a_fit_has_two_phases_and_resumes_in_either(tmp_path: Path) -> None:
    def run(path: Path | None = None, seed: int = 0) -> tuple[Tuned, L.Trainer]:
        torch.manual_seed(seed)
        every = (
            [ModelCheckpoint(tmp_path / "run", filename="{step}", save_top_k=-1, every_n_train_steps=1)]
            if path is None
            else []
        )
        module = Tuned("bert", dropout=0.1)
        fit = trainer(tmp_path, DiffPruning(sparsity=0.02, prune_steps=5, alpha=1.0), *every, max_epochs=3)
        fit.fit(module, loader("bert", shuffle=True), loader("bert"), ckpt_path=path)
        return module, fit

    straight, fit = run()
    steps = fit.global_step
    form = {
        step: any(
            n.endswith("_values")
            for n in torch.load(tmp_path / "run" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        )
        for step in range(1, steps + 1)
    }
    assert form == {step: step > 5 for step in form}
    assert {step > 5 for step in form} == {True, False}
    (optimizer,) = fit.optimizers
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    for seed, step in enumerate((3, 5, 7), start=1):
        resumed, _ = run(tmp_path / "run" / f"step={step}.ckpt", seed)
        assert_same(copy_of(collect(straight)), copy_of(collect(resumed)), f"from step {step}")


def test_gates_learn_at_their_own_rate_and_the_schedule_goes_on(tmp_path: Path) -> None:
    class Scheduled(Tuned):
        def configure_optimizers(self) -> dict:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

        def on_train_batch_end(self, *args: object) -> None:
            (optimizer,) = self.trainer.optimizers
            rates.append({(round(group["lr"], 6), group["weight_decay"]) for group in optimizer.param_groups})

    rates: list[set[tuple[float, float]]] = []
    module = Scheduled("bert")
    trainer(tmp_path, DiffPruning(prune_steps=2, alpha_lr=0.1), max_epochs=2).fit(
        module, loader("bert"), loader("bert")
    )
    assert rates[0] == {(0.0099, 0.1), (0.099, 0.0)}
    assert rates[2] == {(0.0097, 0.1)}
    assert len(rates) == round(100 * (1 - max(lr for lr, _ in rates[-1]) / 0.01))


def test_the_gates_close_under_the_penalty(tmp_path: Path) -> None:
    module, method = Tuned("bert"), DiffPruning(penalty_weight=0.01, prune_steps=15, alpha=0.0)
    open_at_first = 0.5 * 0.5

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            if trainer.global_step == 14:
                shares.append(method.achieved(module))

    shares: list[float] = []
    trainer(tmp_path, method, Look(), max_epochs=6).fit(module, loader("bert"), loader("bert"))
    assert shares[0] < 0.5 * open_at_first


def test_the_mixin_has_the_verb(tmp_path: Path) -> None:
    class Module(DiffPruningMixin, Tuned):
        pass

    module = Module("gpt2")
    module.method = DiffPruning(sparsity=0.02)
    trainer(tmp_path).fit(module, loader("gpt2"), loader("gpt2"))
    assert module.sparsity() == pytest.approx(0.02, rel=1e-2)


def test_a_fit_that_ends_too_early_says_so(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            trainer.should_stop = True

    fit = trainer(tmp_path, DiffPruning(prune_steps=2), Stop())
    with pytest.warns(UserWarning, match="the delta is dense"):
        fit.fit(Tuned("bert"), loader("bert"), loader("bert"))


def test_it_lives_beside_lora() -> None:
    model = tiny("bert")
    LoRA(r=2).apply(model)
    method = DiffPruning()
    method.apply(model)
    assert method.groups(model) == GROUPS["bert"]
    descend(model, "bert", method, steps=1)


# What does not fit.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.0}, "sparsity=0.0 is no share"),
        ({"sparsity": 1.0}, "sparsity=1.0 is no share"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"low": 0.0}, "low=0.0, high=1.5 must be below 0 and above 1"),
        ({"high": 1.0}, "high=1.0 must be"),
        ({"prune_steps": 0}, "prune_steps=0 leaves no time"),
        ({"prune_steps": 3, "prune_epochs": 1}, "give one"),
        ({"exclude": ".*"}, "leaves no parameter to tune"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny("bert")
    with pytest.raises(TuningError, match=message):
        DiffPruning(**arguments).apply(model)
    assert not list(grafts(model))


def test_a_projection_after_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"after step 99 of \d+, so never"):
        trainer(tmp_path, DiffPruning(prune_steps=99)).fit(Tuned("bert"), loader("bert"), loader("bert"))
