"""Time of inference: the plain model, with LoRA live and with LoRA merged, and of adding grafts to a model of 7 B.

    python -m tests.benchmarks.merged --shape gpt2 bert --rounds 21

Merged weights are plain weights, so a merged model is to run as the plain one does, within the noise that "plain again"
shows; its output must be that of the live one. The model of 7 B lies on the meta device.
"""

import argparse
import time
import warnings
from functools import partial

import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, merge
from tests.benchmarks import measure, step
from tests.benchmarks.backbones import SHAPES

METHODS = {"LoRA": LoRA(r=step.R, target_modules="all-linear"), "DoRA": step.METHODS["DoRA all linears"]}


def models(shape: str) -> dict[str, nn.Module]:
    """Return the plain model twice, and each method live and merged, of equal output."""
    backbone = SHAPES[shape]
    found = {"plain": backbone.build().eval(), "plain again (A/A)": backbone.build().eval()}
    for name, method in METHODS.items():
        live, merged = (step.ours(backbone, method).eval() for _ in range(2))
        merge(merged)
        difference = (infer(live, backbone.batch()) - infer(merged, backbone.batch())).abs().max().item()
        assert difference < 1e-4, f"{name}: outputs differ by {difference}"
        found |= {f"{name}, live": live, f"{name}, merged": merged}
    return found


@torch.inference_mode()
def infer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def run(shape: str, rounds: int) -> str:
    batch = SHAPES[shape].batch()
    times = measure.interleave({name: partial(infer, m, batch) for name, m in models(shape).items()}, rounds)
    rows = []
    for name, own in times.items():
        middle, low, high = measure.ratio(own.cpu, times["plain"].cpu)
        rows.append([name, f"{1e3 * sorted(own.cpu)[rounds // 2]:.1f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"])
    return measure.table(["inference", "CPU ms", "× plain (quartiles)"], rows)


def seven_billion() -> str:
    """Return how long adding LoRA to all linear layers of LLaMA-7B takes."""
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig())
    start = time.process_time()
    LoRA(r=step.R, target_modules="all-linear").apply(model)
    seconds = time.process_time() - start
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"LLaMA-7B on the meta device, LoRA on all linear layers, {trained:,} trained: applied in {seconds:.2f} s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=[name for name in SHAPES if name != "t5"], default=["gpt2", "bert"]
    )
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"CPU, 1 thread, {args.rounds} rounds, {measure.versions()}")
    for shape in args.shape:
        print(f"\n### {shape}\n\n{run(shape, args.rounds)}")
    print(f"\n{seven_billion()}")


if __name__ == "__main__":
    main()
