"""Several deltas trained in one step: each is what it is alone, in its seed, rank, learning rate and clipping."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    VPT,
    Adapter,
    BitFit,
    LoRA,
    Method,
    Population,
    PrefixTuning,
    PromptTuning,
    TuningError,
    activate,
    from_delta,
    list_deltas,
    load_delta,
)
from tests.contract import at_work
from tests.models import tiny
from tests.modules import Tuned, loader, trainer

VARY: dict[str, list[Any]] = {"r": [2, 3, 4], "lr": [1e-2, 3e-3, 2e-2]}


def alone(kind: str, method: Method, seed: int, lr: float, epochs: int = 2, drop: float = 0.0) -> nn.Module:
    """Train one delta by a plain loop, its random numbers being those after its seed."""
    model, batches = tiny(kind, drop), list(loader(kind)) * epochs  # a loader draws, too
    torch.manual_seed(seed)
    method.apply(model)
    head = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("classifier")]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not h for h in head)]
    groups = [{"params": rest, "lr": lr}] + ([{"params": head, "lr": 1e-2}] if head else [])
    optimizer = torch.optim.Adam(groups)
    model.train(method.backbone_mode == "train")
    for graft in (m for n, m in model.named_modules() if n.endswith(method.key)):
        graft.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**method.prepare(batch)).loss.backward()
        nn.utils.clip_grad_norm_(rest + head, 0.5)
        optimizer.step()
    return model.eval()


def together(kind: str, population: Population, folder: Path, drop: float = 0.0, **kwargs: Any) -> Tuned:
    module = Tuned(kind, drop)
    trainer(folder, population, **{"max_epochs": 2} | kwargs).fit(module, loader(kind), loader(kind))
    return module


@pytest.mark.parametrize(
    ("kind", "method", "vary", "drop"),
    [
        ("bert", LoRA(dropout=0.3), {"lr": [1e-2, 3e-3]}, 0.2),
        ("bert", LoRA(alpha=3.0, dropout=0.3), VARY, 0.0),
        ("gpt2", LoRA(alpha=3.0, dropout=0.3), VARY, 0.0),
        ("t5", IA3(), {"lr": [1e-2, 2e-2]}, 0.0),
        ("vit", Adapter(), {"bottleneck": [4, 6]}, 0.0),
        ("bert", BitFit(), {"lr": [1e-2, 3e-3]}, 0.0),
        ("bert", PrefixTuning(num_virtual_tokens=2), {"lr": [1e-3, 3e-4]}, 0.0),
        ("bert", PromptTuning(num_virtual_tokens=2, init="random_uniform"), {"lr": [1e-2, 3e-3]}, 0.0),
        ("vit", VPT(num_virtual_tokens=2), {"lr": [1e-2, 3e-3]}, 0.0),
    ],
    ids=[
        "dropout of the backbone",
        "encoder",
        "decoder",
        "IA3",
        "adapters",
        "biases",
        "prefixes",
        "prompts",
        "prompts in images",
    ],
)
def test_each_member_is_as_alone(
    kind: str, method: Method, vary: dict[str, list[Any]], drop: float, tmp_path: Path
) -> None:
    size = len(next(iter(vary.values())))
    population = Population(method, seeds=list(range(5, 5 + size)), vary=vary)
    module = together(kind, population, tmp_path, drop=drop, gradient_clip_val=0.5)
    for i, member in enumerate(population.members):
        lr = vary["lr"][i] if "lr" in vary else 1e-2
        expected = at_work(alone(kind, member, 5 + i, lr, drop=drop), kind)
        activate(module, member.delta)
        torch.testing.assert_close(at_work(module.model.eval(), kind), expected, atol=1e-5, rtol=1e-5)


def test_the_backbone_runs_once_and_the_best_is_named(tmp_path: Path) -> None:
    population, module = Population(LoRA(), vary={"lr": [0.0, 3e-2]}, name="films"), Tuned("bert")
    calls: list[int] = []
    module.model.bert.encoder.layer[0].attention.self.register_forward_pre_hook(
        lambda part, args, kwargs: calls.append(len(kwargs.get("hidden_states", args[0] if args else None))),
        with_kwargs=True,
    )
    fit = trainer(tmp_path, population, ModelCheckpoint(tmp_path, filename="last"), max_epochs=3)
    fit.fit(module, loader("bert", rows=4), loader("bert", rows=4))
    assert calls == [4, 4, *[8, 4, 4] * 3]  # two sanity checks, then a step of both and a validation of each
    scores = {name: float(fit.callback_metrics[f"val_loss_{name}"]) for name in ("films_0", "films_1")}
    assert population.scores == scores
    assert scores["films_1"] < scores["films_0"]
    assert float(fit.callback_metrics["val_loss"]) == pytest.approx(sum(scores.values()) / 2)
    assert population.best == "films_1"
    assert [delta.name for delta in list_deltas(module) if delta.is_active] == ["films_1"]
    best = at_work(module.model.eval(), "bert")
    for file in (tmp_path / "last.ckpt", population.save(module, tmp_path / "each")[1]):
        other = tiny("bert")
        load_delta(other, file, name="films_1")
        torch.testing.assert_close(at_work(other, "bert"), best, atol=0, rtol=0)
    with pytest.raises(TuningError, match="holds 2 deltas that were trained side by side") as refused:
        from_delta(tmp_path / "last.ckpt", tiny("bert"))
    assert "load_delta(model, file, name='films_0')" in str(refused.value)
    assert torch.equal(at_work(from_delta(tmp_path / "each/films_1.safetensors", tiny("bert")), "bert"), best)


def test_a_resumed_population_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def states(module: Tuned) -> dict[str, Tensor]:
        return {name: p for name, p in module.named_parameters() if "lora_lora_" in name}

    method = LoRA(dropout=0.4)
    whole = together("bert", Population(method, size=2), tmp_path)
    first = trainer(tmp_path, Population(method, size=2), max_epochs=1)
    first.fit(Tuned("bert"), loader("bert"), loader("bert"))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Tuned("bert")
    again = trainer(tmp_path, Population(method, size=2), max_epochs=2)
    again.fit(resumed, loader("bert"), loader("bert"), ckpt_path=tmp_path / "half.ckpt")
    assert states(whole)
    assert all(torch.equal(value, states(resumed)[name]) for name, value in states(whole).items())


class Clipping(Tuned):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 1.0, "norm")


class Stepping(Tuned):
    automatic_optimization = False


class Outside(Tuned):
    def __init__(self) -> None:
        super().__init__("bert")
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss * self.scale.sum()


class Masking(Tuned):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch | {"input_ids": torch.randint_like(batch["input_ids"], 5, 20)}).loss


@pytest.mark.parametrize(
    ("module", "callbacks", "why"),
    [
        (Clipping, [], "Clipping clips gradients itself, those of all members together"),
        (Stepping, [], "Stepping steps its optimizers itself"),
        (Outside, [], "this run trains scale, too, which all members would share"),
        (Masking, [], "calls the BertModel with other inputs for lora_1 than for lora_0"),
        (Tuned, [IA3(exclude="classifier.*")], "this run trains ia3, too"),
    ],
    ids=["clipping", "steps of its own", "a parameter outside", "random inputs", "another method"],
)
def test_what_members_would_share_is_refused(
    module: type[Tuned], callbacks: list[Method], why: str, tmp_path: Path
) -> None:
    population = Population(LoRA(), size=2)
    with pytest.raises(TuningError, match=why):
        trainer(tmp_path, population, *callbacks).fit(module(), loader("bert"), loader("bert"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "size=None with nothing that varies does not say how many"),
        ({"size": 3, "seeds": [1, 2]}, "size=3 with 2 of seeds does not say how many"),
        ({"vary": {"r": [1, 2], "lr": [1e-3]}}, "size=None with 2 of r, 1 of lr does not say"),
        ({"vary": {"rr": [1, 2]}}, "vary has 'rr', which is no argument of LoRA; it has e.g. r, lr"),
        ({"size": 0}, "Population's size=0 is out of range"),
        ({"size": 2, "method": Population(LoRA(), size=2)}, "a Population of a Population has no members"),
        (
            {"vary": {"r": [2, 500], "target_modules": [["query"], ["query"]], "init": ["pissa"] * 2}},
            "r=500 does not fit",
        ),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(arguments: dict[str, Any], why: str) -> None:
    model = tiny("bert")
    before = {name for name, _ in model.named_parameters()}
    with pytest.raises(TuningError, match=why):
        Population(**{"method": LoRA()} | arguments).apply(model)
    assert {name for name, _ in model.named_parameters()} == before
    assert list_deltas(model) == []


def test_predicting_asks_for_a_member(tmp_path: Path) -> None:
    population, module = Population(LoRA(), size=2), Tuned("bert")
    population.apply(module)
    with pytest.raises(TuningError, match=r"none of lora_0, lora_1 computes.*activate\(module, 'lora_0'\) first"):
        trainer(tmp_path, population).predict(module, loader("bert"))
    activate(module, "lora_0")
    assert trainer(tmp_path, population).predict(module, loader("bert"))
    population.remove(module)
    assert list_deltas(module) == []


@pytest.mark.slow
def test_eight_loras_are_as_eight_alone_after_fifty_steps(tmp_path: Path) -> None:
    seeds = list(range(8))
    vary = {"r": [1, 2, 3, 4, 5, 6, 7, 8], "lr": [1e-3, 2e-3] * 4}
    population = Population(LoRA(dropout=0.1), seeds=seeds, vary=vary)
    module = together("bert", population, tmp_path, max_epochs=17, gradient_clip_val=0.5)
    for i, member in enumerate(population.members):
        expected = at_work(alone("bert", member, i, vary["lr"][i], 17), "bert")
        activate(module, member.delta)
        torch.testing.assert_close(at_work(module.model.eval(), "bert"), expected, atol=1e-6, rtol=0)
