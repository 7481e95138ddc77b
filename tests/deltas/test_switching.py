"""Several deltas on one backbone: named, muted, activated, saved and loaded apart, and trained by a Trainer."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from lightning import seed_everything
from torch import Tensor, nn

from lightning_peft import (
    BitFit,
    DiffPruning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TuningError,
    activate,
    collect,
    from_delta,
    list_deltas,
    load_delta,
    merge,
    muted,
    prepare,
    read_delta,
    remove_delta,
    save_delta,
)
from tests.contract import assert_near, assert_same, copy_of, shake
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer


def tuned(kind: str, *methods: Method) -> nn.Module:
    model = tiny(kind)
    for seed, method in enumerate(methods):
        before = {n: t.clone() for n, t in collect(model).items()} if seed else {}
        torch.manual_seed(seed)
        dataclasses.replace(method).apply(model)
        shake(model)
        for name, tensor in before.items():
            model.state_dict()[name].copy_(tensor)
    return model


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    return model(**prepare(model, batch(kind))).logits


def test_loras_of_two_names_add_up() -> None:
    both = tuned("gpt2", LoRA(name="films"), LoRA(name="books", r=2))
    assert [(d.name, d.methods, d.is_active) for d in list_deltas(both)] == [
        ("films", ("LoRA",), True),
        ("books", ("LoRA",), True),
    ]
    sum_of = dict(merge(copy.deepcopy(both)).named_parameters())
    plain = tiny("gpt2")
    for name, weight in plain.named_parameters():
        parts = [torch.zeros_like(weight)]
        for only in ("films", "books"):
            single = copy.deepcopy(both)
            remove_delta(single, "books" if only == "films" else "films")
            parts.append(dict(merge(single).named_parameters())[name] - weight)
        torch.testing.assert_close(sum_of[name], weight + sum(parts), atol=1e-6, rtol=1e-6)
    activate(both, "books")
    only = logits(both, "gpt2")
    remove_delta(both, "films")
    assert torch.equal(logits(both, "gpt2"), only)


def test_methods_of_one_name_are_one_delta(tmp_path: Path) -> None:
    model = tuned("gpt2", LoRA(name="films"), PrefixTuning(name="films", num_virtual_tokens=2), BitFit(name="books"))
    assert [(d.name, d.methods) for d in list_deltas(model)] == [
        ("films", ("LoRA", "PrefixTuning")),
        ("books", ("BitFit",)),
    ]


def test_bad_names_are_refused() -> None:
    model = tiny("bert")
    with pytest.raises(TuningError, match=r"name='a\.b' is no name of a delta: take letters"):
        LoRA(name="a.b").apply(model)
    LoRA(name="a_b").apply(model)
    with pytest.raises(TuningError, match=r"is applied to this .* already as 'a_b': give this one another name="):
        LoRA(name="a_b").apply(model)
    activate(model)
    LoRA(name="other").apply(model)
    for wrong in (
        lambda: activate(model, "a-b"),
        lambda: remove_delta(model, "a-b"),
        lambda: muted(model, "a-b").__enter__(),
    ):
        with pytest.raises(TuningError, match=r"'a-b' is no delta of this .*it has e\.g\. a_b"):
            wrong()


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (LoRA(name="one"), LoRA(name="other"), "one and other both bring classifier.weight"),
        (BitFit(), LoRA(name="other"), "bitfit and other both bring classifier.weight"),
        (
            PromptTuning(name="one", init="random_uniform"),
            PromptTuning(name="other", init="random_uniform"),
            "virtual tokens",
        ),
    ],
    ids=["heads", "in place", "prompts"],
)
def test_what_cannot_live_together_is_refused(one: Method, other: Method, why: str) -> None:
    model = tiny("bert")
    one.apply(model)
    before, state = logits(model, "bert"), list(model.state_dict())
    with pytest.raises(TuningError, match=why):
        other.apply(model)
    assert list(model.state_dict()) == state
    activate(model)
    other.apply(model)
    assert not list_deltas(model)[0].is_active
    with pytest.raises(TuningError, match=why):
        activate(model, one.delta, other.delta)
    assert [delta.is_active for delta in list_deltas(model)] == [False, True]
    activate(model, one.delta)
    assert torch.equal(logits(model, "bert"), before)


def test_two_magnitudes_cannot_be_at_work_together() -> None:
    model = tiny("gpt2")
    LoRA(name="one", use_dora=True).apply(model)
    activate(model)
    LoRA(name="other", use_dora=True).apply(model)
    with pytest.raises(TuningError, match=r"lora_one already changes the output of .* activate one of the two"):
        activate(model, "one", "other")
    activate(model, "one")


METHODS = [LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=2), DiffPruning(), LoRA(name="films", bias="lora_only")]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
def test_muting_in_the_middle_of_a_step_leaves_gradients_right(method: Method) -> None:
    """As DPO does, whose reference is the bare model; with layers that are computed anew in the backward pass."""
    expected = None
    for checkpointed in (False, True):
        model = tuned("bert", method).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        for reference in (False, True):
            model.zero_grad()
            torch.manual_seed(0)
            loss = model(**batch("bert")).loss
            if reference:
                with torch.no_grad(), muted(model):
                    bare = model(**batch("bert")).loss
                assert torch.equal(bare, tiny("bert")(**batch("bert")).loss.detach())
            loss.backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            expected = expected or found
            assert_near(expected, found, 1e-5)


def test_gradients_of_the_rest_flow_through_a_muted_delta() -> None:
    model = tuned("gpt2", LoRA(name="films"), LoRA(name="books"))
    single = tuned("gpt2", LoRA(name="films"), LoRA(name="books"))
    remove_delta(single, "books")
    with muted(model, "books"):
        loss = model(**batch("gpt2")).loss
    loss.backward()
    single(**batch("gpt2")).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(collect(single))
    assert_same(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in single.named_parameters() if p.grad is not None},
    )


def test_muted_under_compile() -> None:
    model = tuned("bert", LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=2))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = logits(model, "bert")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(**batch("bert")).logits, before)
            with muted(model):
                torch.testing.assert_close(compiled(**batch("bert")).logits, tiny("bert")(**batch("bert")).logits)


def test_a_merged_delta_cannot_rest() -> None:
    model, method = tiny("gpt2"), LoRA(name="films")
    method.apply(model)
    method.merge(model)
    with pytest.raises(TuningError, match=r"lora_films is merged into .*: unmerge it first"), muted(model):
        pass
    method.unmerge(model)
    with muted(model):
        pass


def test_an_error_inside_ends_the_muting() -> None:
    model = tuned("bert", BitFit())
    before = logits(model, "bert")
    with pytest.raises(ZeroDivisionError), muted(model):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model, "bert"), before)


# Files.


def test_files_of_one_and_of_several_deltas(tmp_path: Path) -> None:
    model = tuned("gpt2", LoRA(name="films"), LoRA(name="books", r=2), BitFit())
    file = save_delta(model, tmp_path / "all.safetensors")
    expected = logits(model, "gpt2")
    assert torch.equal(logits(from_delta(file, tiny("gpt2")), "gpt2"), expected)
    one = save_delta(model, tmp_path / "books.safetensors", "books")
    tensors, meta = read_delta(one)
    assert all(".lora_books." in name for name in tensors)
    assert [entry["init_args"]["name"] for entry in meta["methods"]] == ["books"]
    for name in ("films", "books", "bitfit"):
        activate(model, name)
        other = tiny("gpt2")
        load_delta(other, file, name)
        assert torch.equal(logits(other, "gpt2"), logits(model, "gpt2")), name
    with pytest.raises(TuningError, match=r"holds the deltas films, books, bitfit, but none of the name 'x': name one"):
        load_delta(tiny("gpt2"), file, "x")
    activate(model, "films")
    with pytest.raises(TuningError, match="has its base value while the method that trained it rests"):
        save_delta(model, tmp_path / "resting.safetensors", "bitfit")


def test_a_file_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    file = save_delta(tuned("gpt2", LoRA(name="films")), tmp_path / "films.safetensors")
    for model in (tiny("gpt2", seed=1), tuned("bert", LoRA())):
        state = copy_of(model.state_dict())
        kinds, active = list_deltas(model), [d.is_active for d in list_deltas(model)]
        with pytest.raises(TuningError, match="was trained on"):
            load_delta(model, file, "films")
        assert_same(state, copy_of(model.state_dict()))
        assert (kinds, active) == (list_deltas(model), [d.is_active for d in list_deltas(model)])


def test_a_loaded_delta_computes_alone_and_replaces_one_of_its_name(tmp_path: Path) -> None:
    a, b = tuned("gpt2", LoRA()), tuned("gpt2", BitFit(), LoRA())
    remove_delta(b, "bitfit")
    files = [save_delta(m, tmp_path / f"{i}.safetensors") for i, m in enumerate((a, b))]
    model = tuned("gpt2", BitFit())
    load_delta(model, files[0], "films")
    assert torch.equal(logits(model, "gpt2"), logits(a, "gpt2"))
    load_delta(model, files[1], "films")
    assert torch.equal(logits(model, "gpt2"), logits(b, "gpt2"))
    assert [d.name for d in list_deltas(model)] == ["bitfit", "films"]
    activate(model, "bitfit")
    assert torch.equal(logits(model, "gpt2"), logits(tuned("gpt2", BitFit()), "gpt2"))


# In a Trainer.


def test_a_trainer_trains_the_deltas_of_its_callbacks(tmp_path: Path) -> None:
    module = Tuned("gpt2")
    LoRA(name="films", r=2).apply(module)
    shake(module)
    films = copy_of({n: t for n, t in module.state_dict().items() if "lora_films" in n})
    fit = trainer(tmp_path, LoRA(name="books", r=2))
    with pytest.warns(UserWarning, match="LoRA, applied to Tuned before, computes beside LoRA, frozen"):
        fit.fit(module, loader("gpt2"), loader("gpt2"))
    assert_same(films, copy_of({n: t for n, t in module.state_dict().items() if "lora_films" in n}))
    fit.save_checkpoint(tmp_path / "books.ckpt")
    tensors, meta = read_delta(tmp_path / "books.ckpt")
    assert tensors.keys() == collect(module).keys()
    assert all(".lora_books." in name for name in tensors)
    assert [entry["init_args"]["name"] for entry in meta["methods"]] == ["books"]
    held = fit.optimizers[0].param_groups[0]["params"]
    assert list(held) == [p for n, p in module.named_parameters() if "books" in n]
    # The other way round: what was frozen is thawed, and the other rests.
    other = trainer(tmp_path, LoRA(name="films", r=2))
    with pytest.warns(UserWarning, match="computes beside LoRA, frozen"):
        other.fit(module, loader("gpt2"), loader("gpt2"))
    assert_same(dict(tensors), copy_of({n: t for n, t in module.state_dict().items() if n in tensors}))
    now = copy_of({n: t for n, t in module.state_dict().items() if "lora_films" in n})
    assert all(not torch.equal(now[n], films[n]) for n in films)
    model = Tuned("gpt2")
    load_delta(model, tmp_path / "books.ckpt", "again")
    activate(module, "books")
    assert torch.equal(logits(model.model, "gpt2"), logits(module.model, "gpt2"))


def test_a_callback_whose_delta_rests_is_refused(tmp_path: Path) -> None:
    module = Tuned("gpt2")
    LoRA(name="films", r=2).apply(module)
    activate(module)
    with pytest.raises(TuningError, match=r"films is a callback of this Trainer, but rests: .*, 'films'\)"):
        trainer(tmp_path, LoRA(name="films", r=2)).fit(module, loader("gpt2"), loader("gpt2"))
    activate(module, "films")
    trainer(tmp_path, LoRA(name="films", r=2)).fit(module, loader("gpt2"), loader("gpt2"))


def test_named_callbacks_are_saved_and_resumed(tmp_path: Path) -> None:
    """A classifier whose head is a copy, and prompts of a delta that is no callback."""

    def run(epochs: int, ckpt_path: Path | None = None) -> Tuned:
        seed_everything(0, verbose=False)
        module = Tuned("bert")
        fit = trainer(tmp_path, LoRA(name="films", r=2), BitFit(name="films"), max_epochs=epochs)
        fit.fit(module, loader("bert"), loader("bert"), ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(1)
    straight, resumed = run(2), run(2, tmp_path / "1.ckpt")
    assert_same(copy_of(collect(straight)), copy_of(collect(resumed)))
    assert torch.equal(straight.model.classifier.weight, tiny("bert").classifier.weight)
    assert "model.classifier.lora_films_own.values.weight" in collect(straight)
    fresh = trainer(tmp_path, LoRA(name="films", r=2), BitFit(name="films"))
    (loss,) = fresh.validate(Tuned("bert"), loader("bert"), tmp_path / "2.ckpt", verbose=False)
    assert loss == fresh.validate(straight, loader("bert"), verbose=False)[0]


def test_prompts_that_are_no_callback_go_into_the_batches(tmp_path: Path) -> None:
    module = Tuned("bert")
    PromptTuning(name="words", num_virtual_tokens=3, init="random_uniform", exclude="classifier.*").apply(module)
    seen: list[int] = []
    table = module.model.bert.embeddings.word_embeddings
    table.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    with pytest.warns(UserWarning, match="PromptTuning, applied to Tuned before"):
        trainer(tmp_path, LoRA(r=2)).fit(module, loader("bert"), loader("bert"))
    assert set(seen) == {batch("bert")["input_ids"].shape[1] + 3}


def test_options_of_the_optimizer_reach_copies(tmp_path: Path) -> None:
    module = Tuned("bert", optimizer="AdamW")
    fit = trainer(tmp_path, BitFit(name="films", exclude=".*pooler.*"))
    fit.fit(module, loader("bert"), loader("bert"))
    decays = {id(p): group["weight_decay"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    names = {n: decays[id(p)] for n, p in module.named_parameters() if id(p) in decays}
    assert {n.rpartition(".")[2] for n, decay in names.items() if decay == 0} == {"bias"}
