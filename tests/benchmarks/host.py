"""What a grafted layer costs the host beyond its arithmetic, which bounds small steps on a GPU.

    python -m tests.benchmarks.host --rounds 60

A hundred linear layers of 8 x 8 with LoRA of rank 2, one thread: time above that of the plain layers, for a layer, of a
forward pass, of a backward pass, and of a forward pass without gradients; of an input [2, 8], and of one [2, 1, 8], as
transformers give to their layers. The third column is of a hook that asks nothing and adds the same in place: what a
hook costs at least. Which of them comes first is drawn anew in each round, since one that is run twice
in a row finds its own code in the caches; and they are built several times, since it matters where in memory they lie.
"""

import argparse
import random
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from statistics import median, quantiles
from time import process_time

import peft
import torch
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.updates import in_place

LAYERS, SIZE, RANK = 100, 8, 2
KINDS, BUILDS, WARM = ("plain", "ours", "peft", "bare"), 10, 3
SHAPES = (2, SIZE), (2, 1, SIZE)
PHASES = ("forward", "backward", "forward without gradients")


def build(kind: str) -> nn.Module:
    """Return the layers: plain, ours, peft or bare."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(OrderedDict(lin=nn.Linear(SIZE, SIZE))) for _ in range(LAYERS))
    net: nn.Module = nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate(blocks)))
    if kind == "ours":
        LoRA(r=RANK, target_modules=["lin"]).apply(net)
    elif kind == "peft":
        net = peft.get_peft_model(net, peft.LoraConfig(r=RANK, target_modules=["lin"]))
    else:
        net.requires_grad_(False)
    if kind == "bare":
        for layer in (module for module in net.modules() if isinstance(module, nn.Linear)):
            a, b = nn.Parameter(torch.rand(RANK, SIZE)), nn.Parameter(torch.zeros(SIZE, RANK))
            layer.register_forward_hook(partial(bare, a, b))
    return net.train()


def bare(a: Tensor, b: Tensor, host: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    """Return the output with an update, as a hook."""
    return in_place.add_low_rank(out, args[0], a, b, 4.0)


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
    times: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for _ in range(BUILDS):
        nets = {kind: build(kind) for kind in random.sample(KINDS, len(KINDS))}
        for number in range(rounds // BUILDS + WARM):
            for kind in random.sample(KINDS, len(KINDS)):
                found = round_of(nets[kind], x)
                if number >= WARM:
                    times[kind].append(found)
    for phase, name in enumerate(PHASES):
        above = {
            kind: [
                1e6 * (own[phase] - plain[phase]) / LAYERS
                for own, plain in zip(times[kind], times["plain"], strict=True)
            ]
            for kind in KINDS[1:]
        }
        low, middle, high = quantiles([a / b for a, b in zip(above["ours"], above["peft"], strict=True)], n=4)
        cells = " | ".join(f"{median(above[kind]):.1f}" for kind in KINDS[1:])
        print(f"| {list(shape)} | {name} | {cells} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    random.seed(0)
    print("| input | phase | ours [us a layer] | peft | bare hook | ours / peft (quartiles) |")
    print("|---|---|---:|---:|---:|---:|")
    for shape in SHAPES:
        measure(shape, rounds)


if __name__ == "__main__":
    main()
