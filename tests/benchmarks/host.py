"""What a grafted layer costs the host beyond its arithmetic, which bounds small steps on a GPU.

    python -m tests.benchmarks.host --rounds 60

A hundred linear layers of 8 x 8 with LoRA of rank 2, one thread: time above that of the plain layers, for a layer, of a
forward pass, of a backward pass, and of a forward pass without gradients; of an input [2, 8], and of one [2, 1, 8], as
transformers give to their layers. Ours and HF PEFT's by turns.
"""

import argparse
from collections import OrderedDict
from itertools import pairwise
from statistics import median, quantiles
from time import process_time

import peft
import torch
from torch import Tensor, nn

from lightning_peft import LoRA

LAYERS, SIZE, RANK = 100, 8, 2
SHAPES = (2, SIZE), (2, 1, SIZE)
PHASES = ("forward", "backward", "forward without gradients")


def build(kind: str) -> nn.Module:
    """Return the layers: plain, ours or peft."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(OrderedDict(lin=nn.Linear(SIZE, SIZE))) for _ in range(LAYERS))
    net: nn.Module = nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate(blocks)))
    if kind == "ours":
        LoRA(r=RANK, target_modules=["lin"]).apply(net)
    elif kind == "peft":
        net = peft.get_peft_model(net, peft.LoraConfig(r=RANK, target_modules=["lin"]))
    else:
        net.requires_grad_(False)
    return net.train()


def round_of(net: nn.Module, x: Tensor) -> list[float]:
    """Return the seconds of each phase."""
    marks = [process_time()]
    out = net(x)
    marks.append(process_time())
    out.sum().backward()
    marks.append(process_time())
    with torch.no_grad():
        net(x)
    marks.append(process_time())
    return [end - start for start, end in pairwise(marks)]


def measure(shape: tuple[int, ...], rounds: int) -> None:
    """Print the rows of the table for one shape of the input."""
    x = torch.randn(shape, requires_grad=True)
    nets = {kind: build(kind) for kind in ("plain", "ours", "peft")}
    times: dict[str, list[list[float]]] = {kind: [] for kind in nets}
    for number in range(rounds + 10):
        for kind in list(nets)[:: 1 if number % 2 else -1]:
            found = round_of(nets[kind], x)
            if number >= 10:
                times[kind].append(found)
    for phase, name in enumerate(PHASES):
        above = {
            kind: [
                1e6 * (own[phase] - plain[phase]) / LAYERS
                for own, plain in zip(times[kind], times["plain"], strict=True)
            ]
            for kind in ("ours", "peft")
        }
        low, middle, high = quantiles([a / b for a, b in zip(above["ours"], above["peft"], strict=True)], n=4)
        cells = f"{median(above['ours']):.1f} | {median(above['peft']):.1f} | {middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {list(shape)} | {name} | {cells} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(
        "| input | phase | ours [us a layer] | peft [us a layer] | ours / peft (quartiles) |\n|---|---|---:|---:|---:|"
    )
    for shape in SHAPES:
        measure(shape, rounds)


if __name__ == "__main__":
    main()
