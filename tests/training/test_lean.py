"""Lean training has the gradients of the plain one, keeps less for the backward pass, and is gone afterwards."""

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightning_peft import BitFit, CausalLM, Lean, LoRA, Method, PrefixTuning, PromptTuning, TuningError, muted
from lightning_peft.core.graft import detach, grafts
from lightning_peft.features.activation_memory import Kept
from lightning_peft.features.no_cache import NoCache
from lightning_peft.features.offload import Offloaded
from lightning_peft.features.one_kernel import OneKernel, fuse, kernel_of
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

METHODS: dict[str, Method] = {
    "lora": LoRA(r=2, target_modules="all-linear"),
    "prompt": PromptTuning(num_virtual_tokens=2, init="random_uniform"),
    "prefix": PrefixTuning(num_virtual_tokens=2),
    "bias": BitFit(),
}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("gelu_python", "gelu"), ("gelu", None), ("silu", None),
     ("quick_gelu", None), ("gelu_10", None)],
)  # fmt: skip
def test_kernels_are_found_by_computing(name: str, kernel: str | None) -> None:
    assert kernel_of(ACT2FN[name]) == kernel


def test_what_is_no_activation_is_left_alone_and_no_random_number_is_drawn() -> None:
    modules = (nn.Dropout(0.5), nn.Linear(2, 2), nn.Identity(), nn.Flatten(), nn.GELU(), nn.MaxPool2d(2))
    state = torch.get_rng_state()
    assert all(kernel_of(module) is None for module in modules)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_rate_zero_keeps_no_mask() -> None:
    """PyTorch leaves it out by itself, so `Lean` need not."""
    x = torch.ones(2, requires_grad=True)
    assert nn.Dropout(0.0).train()(x) is x
    assert nn.functional.dropout(x, 0.0, training=True) is x


def prepared(method: Method, recomputed: bool = False) -> nn.Module:
    """Return a tuned GPT-2 whose delta is not zero."""
    model = tiny("gpt2")
    method.apply(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    if recomputed:
        model.activation_checkpointing_enable()
        model.train()
    return model


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_same_and_bare_outputs_bit_for_bit(name: str, recomputed: bool) -> None:
    method = type(METHODS[name])(**METHODS[name].init_args())
    model, rows = prepared(method, recomputed), batch("gpt2")
    inputs = method.prepare(rows)
    plain, before = gradients(model, inputs), model(**inputs).logits
    with muted(model), torch.set_grad_enabled(not recomputed):  # recomputation lets a gradient through all of it
        bare = model(**rows).logits
    places = list(fuse(model, "lean"))
    assert len(places) == 2
    lean = gradients(model, inputs)
    assert plain.keys() == lean.keys()
    assert all((plain[n] - lean[n]).abs().max() <= 1e-6 * max(1, plain[n].abs().max()) for n in plain)
    assert not torch.equal(model(**inputs).logits, before)
    with muted(model), torch.set_grad_enabled(not recomputed):
        assert torch.equal(model(**rows).logits, bare)
    copied = copy.deepcopy(model)
    for place in places:
        detach(place.host, place.name)
    assert torch.equal(model(**inputs).logits, before)
    assert all((lean[n] - g).abs().max() <= 1e-6 for n, g in gradients(copied, inputs).items())


@pytest.mark.slow
def test_it_compiles_whole() -> None:
    model, inputs = prepared(LoRA(r=2)), batch("gpt2")
    plain = gradients(model, inputs)
    assert len(list(fuse(model, "lean"))) == 2
    model.compile(backend="eager", fullgraph=True)
    lean = gradients(model, inputs)
    assert all((plain[n] - lean[n]).abs().max() <= 1e-6 for n in plain)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_step_keeps_half_of_what_it_keeps_in_peft() -> None:
    """LoRA on all linear layers of the shape that docs/performance.md measures, a third as wide and as deep."""
    config = hf.GPT2Config(
        n_layer=2, n_embd=192, n_head=4, vocab_size=3072, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    ids = torch.arange(256).reshape(4, 64)
    task = CausalLM.__new__(CausalLM)
    L.LightningModule.__init__(task)
    task.backbone, task.loss_chunk, task._in_chunks = copy.deepcopy(model), 512, {}
    LoRA(r=8, target_modules="all-linear").apply(task.backbone)
    assert len(list(fuse(task.backbone, "lean"))) == 2
    settings = peft.LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(model, settings)
    sizes = []
    for part, call in ((task, lambda: task.loss({"input_ids": ids, "labels": ids})),
                       (theirs, lambda: theirs(input_ids=ids, labels=ids).loss)):  # fmt: skip
        with Kept([*part.parameters(), *part.buffers(), ids]) as kept:
            call().backward()
        sizes.append(kept.bytes)
    assert 2 * sizes[0] <= sizes[1]


class Looking(Tuned):
    """Notes what a step sees."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen = [place.graft for place in grafts(self.model, "")]
        self.cached = [self.model(**batch, use_cache=use).past_key_values is not None for use in (None, True)]
        return super().training_step(batch, batch_idx)


def test_the_grafts_are_there_while_a_fit_lasts(tmp_path: Path) -> None:
    module = Looking("gpt2")
    before = module.model(**batch("gpt2")).logits
    trainer(tmp_path, LoRA(r=2), Lean(), max_steps=1).fit(module, loader("gpt2"), loader("gpt2"))
    assert [type(graft) for graft in module.seen] == [NoCache, OneKernel, OneKernel]
    assert module.cached == [False, True]
    assert not list(grafts(module.model, ""))
    with muted(module.model):
        assert torch.equal(module.model(**batch("gpt2")).logits, before)
    plain = Looking("gpt2")
    trainer(tmp_path, LoRA(r=2), max_steps=1).fit(plain, loader("gpt2"), loader("gpt2"))
    assert plain.cached == [True, True]
    assert plain.seen == []


def test_nothing_is_left_of_a_fit_that_fails(tmp_path: Path) -> None:
    class Failing(Tuned):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            raise ValueError("stop")

    module = Failing("gpt2")
    with pytest.raises(ValueError, match="stop"):
        trainer(tmp_path, LoRA(r=2), Lean(offload_activations=True)).fit(module, loader("gpt2"), loader("gpt2"))
    assert not list(grafts(module.model, ""))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_offloading_does_nothing_on_a_cpu(tmp_path: Path, recomputed: bool) -> None:
    trained = []
    for offload in (False, True):
        L.seed_everything(0, verbose=False)
        module = Tuned("gpt2")
        if recomputed:
            module.model.activation_checkpointing_enable()
        method = LoRA(r=2, backbone_mode="train")
        trainer(tmp_path, method, Lean(offload_activations=offload), max_steps=2).fit(
            module, loader("gpt2"), loader("gpt2")
        )
        trained.append(module.delta_state() if hasattr(module, "delta_state") else module.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_offloaded_is_what_is_large_and_no_weight(recomputed: bool) -> None:
    """Tensors of the CPU go to the CPU here: they are copied, as those of a GPU are."""
    model, inputs = prepared(LoRA(r=2), recomputed), batch("gpt2")
    plain = gradients(model, inputs)
    own = [*model.parameters(), *model.buffers()]
    context = Offloaded(own, least=512, at_home="cuda")
    with context:
        offloaded = gradients(model, inputs)
    assert all(torch.equal(plain[name], value) for name, value in offloaded.items())
    assert context.goes(torch.empty(8, 16))
    assert not context.goes(torch.empty(127))
    assert not context.goes(model.lm_head.weight.t())
    assert not Offloaded(own).goes(torch.empty(2**16))


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fit(kernels: Any) -> None:
        trainer(tmp_path, LoRA(r=2), Lean(kernels=kernels), max_steps=1).fit(
            Tuned("llama"), loader("llama"), loader("llama")
        )

    with pytest.raises(
        TuningError, match=r"kernels='liger' needs liger-kernel: run pip install 'lightning-peft\[liger"
    ):
        fit("liger")
    fit("torch")
    with pytest.raises(TuningError, match="kernels='triton' is unknown: take 'torch' or 'liger'"):
        Lean(kernels="triton")  # type: ignore[arg-type]
    with pytest.raises(TuningError, match="loss_chunk=0 is out of range: take 1 or more, or null"):
        Lean(loss_chunk=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(TuningError, match="needs a GPU, and there is none: give kernels='torch'"):
        fit("liger")


def test_liger_computes_the_norms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its function of the same arguments, by plain operations, stands for the kernel."""
    calls: list[tuple[float, float, str]] = []

    def norm(x: Tensor, w: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        calls.append((eps, offset, casting))
        return (offset + w) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    kernels = ModuleType("liger_kernel.transformers.functional")
    vars(kernels)["liger_rms_norm"] = norm
    vars(kernels)["liger_swiglu"] = lambda a, b: nn.functional.silu(a) * b
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr("lightning_peft.training.lean.check_liger", lambda: None)
    trained = []
    for kind in ("torch", "liger"):
        L.seed_everything(0, verbose=False)
        module = Tuned("llama", optimizer="SGD")
        for layer in module.model.model.layers:
            layer.input_layernorm.weight.data.uniform_(0.5, 1.5)
        trainer(tmp_path, LoRA(r=2), Lean(kernels=kind), max_steps=2).fit(module, loader("llama"), loader("llama"))
        trained.append({name: p for name, p in module.named_parameters() if p.requires_grad})
    assert set(calls) == {(module.model.config.rms_norm_eps, 0.0, "llama")}
    assert all((value - trained[1][name]).abs().max() <= 1e-6 for name, value in trained[0].items())
