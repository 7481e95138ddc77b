"""Hugging Face PEFT as a differential oracle: from equal weights, equal logits, equal training, equal merged weights.

Where we differ on purpose (peft 0.21.2), so that nobody mends us towards it:

* A soft prompt on BERT: peft puts it before [CLS] and pools the first virtual token; ours goes after [CLS].
* Token labels under a soft prompt: peft raises; ours are widened. Answer spans: peft does not shift them; ours move.
* The first token of a causal text: peft predicts it from the prompt and counts that in the loss, ours has no output
  for the prompt's positions, so that a text counts as much as without a prompt.
* A soft prompt on T5: peft's default makes rows for the decoder too, which no gradient ever reaches; ours has none.
  Here it is asked for one set (``num_transformer_submodules=1``).
* IA3 on GPT-2: peft scales the queries of ``c_attn`` too; ours only keys and values, unless that layer is named.
* PiSSA and OLoRA: peft changes the base weights; ours stay, and the factors of the start are saved beside the delta.
* The task head: peft trains it when ``task_type`` says so, in the dtype of the backbone; ours always, in fp32. Here it
  is left out.
* Names: peft wraps layers, so the keys of the backbone change; ours stay.
"""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, LoRA, Method, PromptTuning, merge
from lightning_peft.core.graft import grafts
from tests.contract import assert_near
from tests.models import batch, tiny

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 calls names that transformers 5.23 has renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
KINDS = pytest.mark.parametrize("kind", TARGETS)
TABLES = {"bert": "word_embeddings", "llama": "embed_tokens"}


def theirs(kind: str, **settings: Any) -> nn.Module:
    """Return the tiny model under peft's LoRA, A and B random."""
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 16.0, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | settings
    )
    model = peft.get_peft_model(tiny(kind), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def ours(kind: str, like: nn.Module, **arguments: Any) -> tuple[nn.Module, Method]:
    """Return the tiny model under our LoRA, with the A and B of peft's."""
    head = "classifier.*" if kind == "bert" else None
    model, method = tiny(kind), LoRA(**{"r": 2, "target_modules": TARGETS[kind], "exclude": head} | arguments)
    method.apply(model)
    with torch.no_grad():
        for place in grafts(model):
            for ours_, theirs_ in zip(parts(place.graft), pair(like, place.path), strict=True):
                ours_.copy_(theirs_)
    return model, method


def parts(graft: nn.Module) -> list[Tensor]:
    """Return A and B and, for DoRA, the magnitudes of our graft."""
    return [p for p in (graft.A, graft.B, graft.m) if p is not None]


def pair(model: nn.Module, path: str) -> list[Tensor]:
    """Return peft's A and B and, for DoRA, its magnitudes at the host of this path."""
    host = model.get_submodule(f"base_model.model.{path}")
    magnitudes = [host.lora_magnitude_vector["default"].weight] if len(host.lora_magnitude_vector) else []
    if hasattr(host, "lora_embedding_A") and "default" in host.lora_embedding_A:
        return [host.lora_embedding_A["default"], host.lora_embedding_B["default"], *magnitudes]
    return [host.lora_A["default"].weight, host.lora_B["default"].weight, *magnitudes]


def train(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Take three SGD steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


def deltas(mine: nn.Module, other: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return our A, B and magnitudes and peft's, by our names."""
    left = {f"{place.path}.{i}": p for place in grafts(mine) for i, p in enumerate(parts(place.graft))}
    right = {f"{place.path}.{i}": p for place in grafts(mine) for i, p in enumerate(pair(other, place.path))}
    return left, right


def assert_same_life(other: nn.Module, model: nn.Module, kind: str) -> None:
    """Assert equal logits, equal deltas after three steps, and equal merged weights."""
    with torch.no_grad():
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-5)
        assert not torch.allclose(model(**batch(kind)).logits, tiny(kind)(**batch(kind)).logits, atol=0.05)
    start = {name: p.detach().clone() for name, p in deltas(model, other)[0].items()}
    for each in (model, other):
        train(each, batch(kind))
    left, right = deltas(model, other)
    assert_near(right, left, 1e-5)
    assert all(not torch.equal(left[name], start[name]) for name in start)
    assert_near(dict(other.merge_and_unload().state_dict()), dict(merge(model).state_dict()), 1e-5)


@KINDS
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_gives_the_logits_of_peft(kind: str, rslora: bool) -> None:
    other = theirs(kind, use_rslora=rslora)
    model, _ = ours(kind, other, use_rslora=rslora)
    with torch.no_grad():
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-5)
        assert not torch.allclose(model(**batch(kind)).logits, tiny(kind)(**batch(kind)).logits, atol=0.1)


@KINDS
def test_lora_trains_as_peft_does(kind: str) -> None:
    other = theirs(kind)
    model, _ = ours(kind, other)
    start = {name: p.detach().clone() for name, p in deltas(model, other)[0].items()}
    for each in (model, other):
        train(each, batch(kind))
    left, right = deltas(model, other)
    assert_near(right, left, 1e-5)
    assert all(not torch.allclose(left[name], start[name], atol=1e-4) for name in start)


@KINDS
def test_lora_merges_as_peft_does(kind: str) -> None:
    other = theirs(kind)
    model, _ = ours(kind, other)
    merged = other.merge_and_unload()
    assert_near(dict(merged.state_dict()), dict(merge(model).state_dict()), 1e-5)
    assert not torch.equal(merged(**batch(kind)).logits, tiny(kind)(**batch(kind)).logits)


@KINDS
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}], ids=str)
def test_dora_is_that_of_peft(kind: str, settings: dict[str, Any]) -> None:
    outside = {"exclude_modules": ".*(pooler|classifier).*"} if kind == "bert" and "target_modules" in settings else {}
    other = theirs(kind, use_dora=True, lora_alpha=4.0, **outside, **settings)
    model, _ = ours(kind, other, use_dora=True, alpha=4.0, **settings)
    assert_same_life(other, model, kind)


@pytest.mark.parametrize("kind", TABLES)
def test_dora_on_the_embedding_is_that_of_peft(kind: str) -> None:
    settings = {"use_dora": True, "target_modules": [TABLES[kind]]}
    other = theirs(kind, **settings)
    model, _ = ours(kind, other, **settings)
    assert_same_life(other, model, kind)


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_is_that_of_peft(dora: bool) -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    config = peft.LoraConfig(r=2, lora_alpha=4.0, target_modules=["conv"], use_dora=dora, init_lora_weights=False)
    other, model, x = peft.get_peft_model(Convolved(), config), Convolved(), torch.randn(2, 3, 8, 8)
    LoRA(r=2, alpha=4.0, target_modules=["conv"], use_dora=dora).apply(model)
    with torch.no_grad():
        for mine, their in zip(parts(model.conv.lora), pair(other, "conv"), strict=True):
            assert mine.shape == their.shape
            mine.copy_(their)
    for each in (model, other):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert_near({"": other(x)}, {"": model(x)}, 1e-5)
    assert_near(*reversed(deltas(model, other)), 1e-5)
    assert_near(dict(other.merge_and_unload().state_dict()), dict(merge(model).state_dict()), 1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("dora", [False, True])
def test_biases_are_trained_as_peft_does(kind: str, bias: str, dora: bool) -> None:
    other = theirs(kind, bias=bias, use_dora=dora)
    exclude = {"all": r"classifier\.weight", "lora_only": "classifier.*"}[bias] if kind == "bert" else None
    model, _ = ours(kind, other, bias=bias, use_dora=dora, exclude=exclude)
    assert_same_life(other, model, kind)


@pytest.mark.parametrize(
    ("init", "kind"), [("pissa", "bert"), ("pissa", "gpt2"), ("olora", "bert"), ("olora", "llama")]
)
def test_an_init_of_the_weight_trains_as_that_of_peft(kind: str, init: str) -> None:
    """Theirs starts from a residual in the base, ours from the base and the same factors.

    peft's OLoRA does not know GPT-2's layout.
    """
    config = peft.LoraConfig(
        r=2, lora_alpha=4.0, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", init_lora_weights=init
    )
    other = peft.get_peft_model(tiny(kind), config).eval()
    model = tiny(kind)
    LoRA(
        r=2, alpha=4.0, target_modules=TARGETS[kind], init=init, exclude="classifier.*" if kind == "bert" else None
    ).apply(model)
    with torch.no_grad():
        for place in grafts(model):
            a, b = pair(other, place.path)
            assert_near({"": b @ a}, {"": place.graft.B @ place.graft.A}, 1e-4)
            for mine, start, their in ((place.graft.A, place.graft.A0, a), (place.graft.B, place.graft.B0, b)):
                mine.copy_(their)
                start.copy_(their)
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-4)
    for each in (model, other):
        train(each, batch(kind))
    left, right = deltas(model, other)
    assert_near(right, left, 1e-4)  # their residual has been rounded
    assert_near(dict(other.merge_and_unload().state_dict()), dict(merge(model).state_dict()), 1e-5)


SCALED = {
    "bert": (["key", "value"], r".*layer\.\d+\.output\.dense"),
    "gpt2": (["c_attn"], r".*mlp\.c_proj"),
    "llama": (["k_proj", "v_proj"], r".*down_proj"),
    "t5": (["k", "v"], r".*\.wo"),
}


@pytest.mark.parametrize("kind", SCALED)
def test_ia3_is_that_of_peft(kind: str) -> None:
    outputs, inputs = SCALED[kind]
    targets = rf"(?:.*\.)?(?:{'|'.join(outputs)})|{inputs}"
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=kind == "gpt2")
    other = peft.get_peft_model(tiny(kind), config).eval()
    model = tiny(kind)
    # Named, c_attn is scaled as a whole, as in peft.
    IA3(target_modules=outputs if kind == "gpt2" else None, exclude="classifier.*" if kind == "bert" else None).apply(
        model
    )

    def scales() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        places = {place.path: place.graft.l for place in grafts(model)}
        hosts = {path: other.get_submodule(f"base_model.model.{path}") for path in places}
        return places, {path: host.ia3_l["default"].flatten() for path, host in hosts.items()}

    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    with torch.no_grad():
        for mine, their in zip(*(found.values() for found in scales()), strict=True):
            their.copy_(mine.add_(0.3 * torch.randn_like(mine)))
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-5)
    for each in (model, other):
        train(each, batch(kind))
    assert_near(*reversed(scales()), 1e-5)
    assert_near(dict(other.merge_and_unload().state_dict()), dict(merge(model).state_dict()), 1e-5)


@pytest.mark.parametrize("kind", TABLES)
def test_lora_on_the_embedding_is_that_of_peft(kind: str) -> None:
    other = theirs(kind, target_modules=[TABLES[kind]])
    model, _ = ours(kind, other, target_modules=[TABLES[kind]])
    with torch.no_grad():
        assert_near({"": other(**batch(kind)).logits}, {"": model(**batch(kind)).logits}, 1e-5)
    for each in (model, other):
        train(each, batch(kind))
    assert_near(*reversed(deltas(model, other)), 1e-5)
    assert_near(dict(other.merge_and_unload().state_dict()), dict(merge(model).state_dict()), 1e-5)


def test_patterns_of_rank_and_alpha_are_those_of_peft() -> None:
    patterns = {"rank_pattern": {"value": 4}, "alpha_pattern": {"query": 3.0}}
    other = theirs("bert", **patterns)
    model, _ = ours("bert", other, **patterns)
    with torch.no_grad():
        assert_near({"": other(**batch("bert")).logits}, {"": model(**batch("bert")).logits}, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_prompt_tuning_is_that_of_peft(kind: str) -> None:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4, num_transformer_submodules=1)
    other = peft.get_peft_model(tiny(kind), config).eval()
    model, method = tiny(kind), PromptTuning(num_virtual_tokens=4, init="random_uniform")
    method.apply(model)
    with torch.no_grad():
        prompt = other.prompt_encoder["default"].embedding.weight.copy_(method.rows(model))
    inputs = batch(kind, padded=False)
    if kind != "t5":
        inputs["labels"][:, 0] = -100
    with torch.no_grad():
        ours, theirs = model(**method.prepare(inputs)).logits, other(**inputs).logits
        assert_near({"": theirs[:, -ours.shape[1] :]}, {"": ours}, 1e-5)
        assert_near({"": other(**inputs).loss}, {"": model(**method.prepare(inputs)).loss}, 1e-5)
    start = method.rows(model).detach().clone()
    train(other, inputs)
    train(model, dict(method.prepare(inputs)))
    assert_near({"": prompt}, {"": method.rows(model)}, 1e-5)
    assert not torch.allclose(prompt, start, atol=1e-4)
