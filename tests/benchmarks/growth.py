"""How the cost of a LoRA step grows with layers, rank and tokens: ours and HF PEFT's, against the floor.

    python -m tests.benchmarks.growth --rounds 9

A Llama shape with LoRA on all linear layers, one thread, fp32; the floor is the frozen model with the gradient of its
activations. Ratios are taken within a round.
"""

import argparse
from collections.abc import Callable

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA
from tests.benchmarks import measure

WORDS, ROWS = 1000, 2
CASES = (
    *(("layers", {"layers": n, "width": 128, "rank": 8, "tokens": 32}) for n in (4, 16, 64)),
    *(("rank", {"layers": 4, "width": 256, "rank": n, "tokens": 64}) for n in (1, 8, 64)),
    *(("tokens", {"layers": 4, "width": 256, "rank": 8, "tokens": n}) for n in (16, 64, 256)),
)


def model(layers: int, width: int) -> nn.Module:
    """Return a Llama whose weights depend on its shape alone."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def stepping(net: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return a forward and a backward pass."""

    def step() -> None:
        net.zero_grad()
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    net.train()
    return step


def row(what: str, layers: int, width: int, rank: int, tokens: int, rounds: int) -> str:
    """Return the line of one case."""
    ids = torch.randint(0, WORDS, (ROWS, tokens))
    floor, ours = model(layers, width).requires_grad_(False), model(layers, width)
    floor.get_submodule("model.embed_tokens").requires_grad_(True)
    LoRA(r=rank, target_modules="all-linear").apply(ours)
    theirs = peft.get_peft_model(model(layers, width), peft.LoraConfig(r=rank, target_modules="all-linear"))
    calls = {name: stepping(net, ids) for name, net in (("floor", floor), ("ours", ours), ("peft", theirs))}
    times = measure.interleave(calls, rounds)
    own, other = (measure.ratio(times[name].cpu, times["floor"].cpu)[0] for name in ("ours", "peft"))
    middle, low, high = measure.ratio(times["ours"].cpu, times["peft"].cpu)
    value = {"layers": layers, "rank": rank, "tokens": tokens}[what]
    return f"| {what} {value} | {own:.2f} | {other:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| case | ours x floor | peft x floor | ours / peft (quartiles) |\n|---|---:|---:|---:|")
    for what, shape in CASES:
        print(row(what, **shape, rounds=rounds), flush=True)


if __name__ == "__main__":
    main()
