"""How many kernels a step takes for each tuned layer beyond those of the frozen model."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import OFT, HiRA, LoRA, Method, MiSS, SHiRA
from lightning_peft.core.graft import attach
from lightning_peft.updates import entry_gradients
from lightning_peft.updates.low_rank import LowRank

VIEWS = {
    *("view", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias", "permute"),
    *("_unsafe_view", "split", "as_strided", "reshape", "unbind", "split_with_sizes", "_reshape_alias", "empty"),
    "empty_like",
}


class Kernels(TorchDispatchMode):
    """Counts what runs and is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.__name__.split(".")[0]
        self.ran[name] += name not in VIEWS
        return op(*args, **kwargs or {})


def kernels(model: nn.Module) -> int:
    ids = torch.arange(24).view(2, 12)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    with Kernels() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    return seen.ran.total()


WHERE: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("method", "fp32", "bf16"),
    [
        (LoRA(r=4, **WHERE), 8, 10),
        (LoRA(r=4, dropout=0.1, **WHERE), 13, 15),
        (LoRA(r=4, use_dora=True, **WHERE), 22, 25),
        (MiSS(r=4, **WHERE), 7, 9),
        (HiRA(r=4, **WHERE), 10, 12),
        (SHiRA(r=4, **WHERE), 6, 8),
        (OFT(block_size=4, **WHERE), 22, 24),
    ],
    ids=["LoRA", "LoRA with dropout", "DoRA", "MiSS", "HiRA", "SHiRA", "OFT"],
)
def test_a_layer_takes_few_kernels(method: Method, fp32: int, bf16: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_gradients, "is_worth_it", lambda *_: False)  # a way for CPUs; a GPU launches kernels
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for dtype, most in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        base = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, vocab_size=50)).to(dtype)
        floor, tuned = copy.deepcopy(base).requires_grad_(False), copy.deepcopy(base)
        method.apply(tuned)
        assert kernels(tuned) - kernels(floor) <= 4 * most, dtype


def test_gradients_come_in_the_layout_of_their_factors() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        host = nn.Linear(24, 32).to(dtype)
        graft = attach(host, LowRank(host, 4, 4.0, 0.0, False), "lora")
        host(torch.randn(16, 24, dtype=dtype)).sum().backward()
        assert [p.grad.stride() for p in (graft.A, graft.B)] == [p.stride() for p in (graft.A, graft.B)]
        assert graft.A.grad.dtype is graft.B.grad.dtype is torch.float32


def test_a_second_derivative_reaches_factors_of_a_half_precision_layer() -> None:
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        host, x = nn.Linear(3, 3, bias=False), torch.ones(2, 3, dtype=dtype, requires_grad=True)
        host.weight.data = torch.eye(3)
        host.to(dtype)
        graft = attach(host, LowRank(host, 2, 2.0, 0.0, False), "lora")
        graft.A.data.fill_(0.5)
        graft.B.data.fill_(0.25)
        (slope,) = torch.autograd.grad((host(x) ** 2).sum(), x, create_graph=True)
        found.append([g.double() for g in torch.autograd.grad(slope.sum(), (graft.A, graft.B))])
    for exact, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
