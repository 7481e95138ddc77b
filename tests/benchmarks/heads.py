"""Time and memory of one training step of adapters, heads, blocks and side networks, against the floor.

    python -m tests.benchmarks.heads --shape bert vit --rounds 11

It measures as ``tests.benchmarks.step`` does. "(cached)" is a step whose rows have been through the frozen part before.
"""

import argparse
import warnings

import torch

from lightning_peft import (
    Adapter,
    BitFit,
    LadderSideTuning,
    LinearProbe,
    Method,
    MLPHead,
    PartialK,
    SideTuning,
    TinyTL,
    TuningError,
)
from tests.benchmarks import measure, step
from tests.benchmarks.backbones import SHAPES

METHODS: dict[str, Method] = {
    "Adapter houlsby 32": Adapter(bottleneck=32),
    "Adapter houlsby 32, norms frozen": Adapter(bottleneck=32, train_norms=False),
    "Adapter pfeiffer 32": Adapter(form="pfeiffer", bottleneck=32),
    "Adapter parallel 32": Adapter(form="parallel", bottleneck=32),
    "BitFit": BitFit(),
    "BitFit query+intermediate": BitFit(biases="query+intermediate"),
    "LinearProbe": LinearProbe(),
    "LinearProbe (cached)": LinearProbe(cache_features=True),
    "MLPHead 3": MLPHead(),
    "PartialK 1": PartialK(k=1),
    "PartialK 2": PartialK(k=2),
    "PartialK 1 (cached)": PartialK(k=1, cache_features=True),
    "SideTuning 1/4": SideTuning(),
    "LadderSideTuning 1/8": LadderSideTuning(),
    "TinyTL": TinyTL(),
}


def steps(shape: str, names: list[str], fused: bool = False) -> dict[str, step.Step]:
    """Return the floor, the floor again and the steps of the methods that fit the shape.

    The frozen part is in eval mode where features are cached, as a Trainer has it.
    """
    backbone = SHAPES[shape]
    batch = backbone.batch()
    found = {name: step.Step(step.floor(backbone), batch, fused) for name in (step.FLOOR, step.CONTROL)}
    for name in names:
        method = METHODS[name]
        model = backbone.build()
        torch.manual_seed(1)
        try:
            method.apply(model)
        except TuningError:
            continue
        if getattr(method, "cache_features", False):
            model.eval()
        own = step.Step(model, batch, fused, method.prepare)
        loss = own.loss()
        loss.backward()
        assert all(p.grad is not None for p in own.trained), name
        found[name] = own
    return found


def run(shape: str, names: list[str], rounds: int, fused: bool = False) -> str:
    """Measure one shape and return its table."""
    every = steps(shape, names, fused)
    times = measure.interleave(every, rounds)
    rows = []
    for label, one in every.items():
        tensors = [*one.model.parameters(), *one.model.buffers(), *one.batch.values()]
        middle, low, high = measure.ratio(times[label].cpu, times[step.FLOOR].cpu)
        kept, peak = measure.kept(one.loss, tensors), measure.peak(one)
        trained = sum(p.numel() for p in one.trained)
        cells = [f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{kept / 2**20:.1f}", f"{peak / 2**20:.1f}"]
        rows.append([label, f"{trained:,}", *cells])
    return measure.table(["step", "trained", "× floor (quartiles)", "kept MiB", "peak MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["bert", "vit"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) instead of the default of torch")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"CPU, 1 thread, {args.rounds} rounds, {measure.versions()}")
    for shape in args.shape:
        print(f"\n### {shape}\n\n{run(shape, args.method, args.rounds, args.fused)}")


if __name__ == "__main__":
    main()
