"""One delta for each row of a batch: equal to each row alone with its delta."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import (
    IA3,
    VPT,
    Adapter,
    BitFit,
    DiffPruning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TuningError,
    activate,
    load_delta,
    muted,
    prepare,
    routed,
    save_delta,
)
from tests.contract import assert_near, shake
from tests.models import batch, tiny

NAMES = ["films", None, "books", "films", "books", None]
PROMPTS = [
    PromptTuning(num_virtual_tokens=3, init="random_uniform"),
    PromptTuning(num_virtual_tokens=2, init="random_uniform"),
]
CASES: dict[str, tuple[str, Method, Method]] = {
    "loras": ("bert", LoRA(r=2), LoRA(r=3, target_modules=["query", "dense"])),
    "a LoRA and biases": ("bert", LoRA(r=2, target_modules="all-linear", bias="all"), BitFit()),
    "magnitudes": ("llama", LoRA(r=2, use_dora=True), LoRA(r=2, use_dora=True, target_modules="all-linear")),
    "embeddings": ("gpt2", LoRA(r=2, target_modules=["wte", "wpe", "c_attn"]), IA3()),
    "an encoder-decoder": ("t5", LoRA(r=2), IA3()),
    "adapters": ("bert", Adapter(bottleneck=4), Adapter(bottleneck=8, form="parallel")),
    "convolutions": ("vit", LoRA(r=2, target_modules=["projection"]), LoRA(r=2)),
    "sparse": ("llama", DiffPruning(), LoRA(r=2)),
    "prefixes": ("bert", PrefixTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=2, mid_dim=4)),
    "prefixes of a decoder": ("llama", PrefixTuning(num_virtual_tokens=3), LoRA(r=2)),
    "prefixes with position biases": ("t5", PrefixTuning(num_virtual_tokens=3), LoRA(r=2)),
    "a prefix and a prompt": ("bert", PROMPTS[0], PrefixTuning(num_virtual_tokens=2)),
    "prompts": ("bert", *PROMPTS),
    "prompts of a decoder": ("gpt2", *PROMPTS),
    "prompts in images": ("vit", VPT(num_virtual_tokens=2), VPT(num_virtual_tokens=2, deep=False)),
}


def with_two(folder: Path, kind: str, *methods: Method) -> nn.Module:
    model = tiny(kind)
    for seed, (name, method) in enumerate(zip(("films", "books"), methods, strict=True)):
        single = tiny(kind)
        torch.manual_seed(seed)
        method.apply(single)
        shake(single)
        load_delta(model, save_delta(single, folder / f"{name}.safetensors"), name)
    return model


def rows_of(kind: str, rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in batch(kind, size=len(NAMES)).items()}


def inputs_of(kind: str, batch_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out the labels, but those that are the input of a decoder."""
    return batch_ if kind == "t5" else {n: v for n, v in batch_.items() if n != "labels"}


@pytest.mark.parametrize(("kind", "one", "other"), CASES.values(), ids=CASES)
def test_each_row_is_as_alone_with_its_delta(kind: str, one: Method, other: Method, tmp_path: Path) -> None:
    model = with_two(tmp_path, kind, one, other)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    alone, weights, expected = {}, torch.randn(len(NAMES), 3, generator=torch.Generator().manual_seed(1)), {}
    for name in ("films", "books", None):
        rows = [i for i, each in enumerate(NAMES) if each == name]
        activate(model, *([name] if name else []))
        out = model(**prepare(model, inputs_of(kind, rows_of(kind, rows)))).logits
        alone |= dict(zip(rows, out, strict=True))
        (out.flatten(1)[:, :3] * weights[rows]).sum().backward() if name else None
    expected = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    model.zero_grad()
    with routed(model, NAMES):
        found = model(**prepare(model, inputs_of(kind, rows_of(kind, list(range(len(NAMES))))))).logits
    (
        found.flatten(1)[[i for i, n in enumerate(NAMES) if n], :3] * weights[[i for i, n in enumerate(NAMES) if n]]
    ).sum().backward()
    for i, row in alone.items():
        torch.testing.assert_close(found[i][: len(row)], row, atol=1e-5, rtol=1e-5)
    assert_near(expected, {n: p.grad for n, p in parameters.items() if n in expected}, 3e-5)
    with muted(model):
        bare = model(**rows_of(kind, [0])).logits
    assert torch.equal(bare, tiny(kind).requires_grad_(False)(**rows_of(kind, [0])).logits)


@pytest.mark.parametrize(
    ("kind", "other", "beams"),
    [("gpt2", IA3(), 2), ("llama", BitFit(add_missing_bias=True), 1), ("t5", IA3(), 2), ("gpt2", PrefixTuning(), 1)],
    ids=["gpt2", "llama", "t5", "prefix"],
)
def test_generated_texts_are_those_of_each_row_alone(kind: str, other: Method, beams: int, tmp_path: Path) -> None:
    model = with_two(tmp_path, kind, LoRA(r=2), other)
    inputs = {n: v for n, v in rows_of(kind, list(range(6))).items() if n != "labels"}
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "use_cache": other.kind != "prefix"}
    alone = {}
    for name in ("films", "books", None):
        rows = [i for i, each in enumerate(NAMES) if each == name]
        activate(model, *([name] if name else []))
        out = model.generate(**{n: v[rows] for n, v in inputs.items()}, **settings)
        alone |= dict(zip(rows, out, strict=True))
    with routed(model, NAMES, copies=beams):
        found = model.generate(**inputs, **settings)
    for i, row in alone.items():
        assert torch.equal(found[i][: len(row)], row)


def test_layers_are_not_computed_anew_with_other_deltas(tmp_path: Path) -> None:
    model = with_two(tmp_path, "gpt2", LoRA(r=2), LoRA(r=3))
    found = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        for inside in (lambda: routed(model, NAMES), lambda: muted(model, "films")):
            activate(model, "films", "books")
            model.zero_grad()
            with inside():
                loss = model(**rows_of("gpt2", list(range(6)))).loss
            loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_near(found[0], found[2], 1e-6)
    assert_near(found[1], found[3], 1e-6)
    assert all("books" in name for name in found[1])


def test_bad_routes_are_refused(tmp_path: Path) -> None:
    model = with_two(tmp_path, "gpt2", LoRA(r=2), PROMPTS[0])
    rows = rows_of("gpt2", list(range(6)))
    with pytest.raises(TuningError, match=r"'film' is no delta of this GPT2LMHeadModel; it has e\.g\. films"):
        routed(model, ["film"]).__enter__()
    with pytest.raises(TuningError, match="names= is empty"):
        routed(model, []).__enter__()
    for names in (NAMES[:3], [*NAMES, None]):
        with routed(model, names), pytest.raises(TuningError, match=f"of 6 rows is routed by {len(names)} names: give"):
            model(**rows)
    with routed(model, NAMES), pytest.raises(TuningError, match="have no common loss: leave out labels"):
        model(**rows)
    with routed(model, NAMES), pytest.raises(TuningError, match="give use_cache=False"):
        model.generate(input_ids=rows["input_ids"], max_new_tokens=2)
    with routed(model, NAMES):
        assert model.generate(input_ids=rows["input_ids"], max_new_tokens=2, use_cache=False).shape == (6, 12)
    other = tiny("gpt2")
    BitFit().apply(other)
    with pytest.raises(TuningError, match=r"bitfit trains .* in place, which all rows share: load it under a name"):
        routed(other, ["bitfit"]).__enter__()
    activate(model, "films")
    before = model(**rows).logits
    with routed(model, NAMES), muted(model):
        assert torch.equal(model(**rows).logits, tiny("gpt2")(**rows).logits)
    assert torch.equal(model(**rows).logits, before)
    assert "forward" not in vars(model.transformer.h[0].attn.c_attn)
