"""Time and memory of a training step with and without what `Lean` does, and of HF PEFT, on GPT-2's shape.

    python -m tests.benchmarks.lean --rounds 15
    python -m tests.benchmarks.lean --words 150000 --tokens 4096      # the peak of a loss over many words

All three have the same weights and the same loss, which is checked. `Lean` chunks the loss at 512 tokens, twice a batch
has; see `step` for how it is measured.
"""

import argparse
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.features.one_kernel import fuse
from lightning_peft.tasks.chunked_loss import chunked_cross_entropy
from tests.benchmarks import measure
from tests.benchmarks.backbones import SHAPES
from tests.benchmarks.step import METHODS, Step, ours, theirs

ORDER = ("HF PEFT", "plain", "lean")


class LeanStep(Step):
    """A step as the task `CausalLM` takes it beside the callback."""

    def loss(self) -> Tensor:
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        total, count = chunked_cross_entropy(self.model, inputs, self.batch["labels"][:, 1:], 512, check=False)
        return total / count


def steps(name: str) -> dict[str, Step]:
    """Return the three steps of a method, whose losses are equal."""
    shape, batch = SHAPES["gpt2"], SHAPES["gpt2"].batch()
    tuned, lean = ours(shape, METHODS[name]), ours(shape, METHODS[name])
    peft = theirs(shape, METHODS[name], tuned)
    assert isinstance(peft, nn.Module)
    assert list(fuse(lean, "lean"))
    found = dict(
        zip(ORDER, (Step(peft, batch, False), Step(tuned, batch, False), LeanStep(lean, batch, False)), strict=True)
    )
    losses = [step.check() for step in found.values()]
    assert max(losses) - min(losses) < 1e-5, losses
    return found


def table(name: str, rounds: int) -> list[str]:
    """Return the lines of a method."""
    found = steps(name)
    calls: dict[str, Callable[[], object]] = {**found, "lean again": found["lean"]}
    times = measure.interleave(calls, rounds)
    lines = []
    for label in calls:
        step = found[label.removesuffix(" again")]
        ignore = [*step.model.parameters(), *step.model.buffers(), *step.batch.values()]
        kept = measure.kept(step.loss, ignore) / 2**20
        middle, low, high = measure.ratio(times[label].cpu, times["HF PEFT"].cpu)
        peak = measure.peak(step) / 2**20
        lines.append(f"| {name}, {label} | {middle:.3f} ({low:.3f} to {high:.3f}) | {kept:.1f} | {peak:.1f} |")
    return lines


def over_words(words: int, tokens: int) -> list[str]:
    """Return the lines of a model of one layer on a row of so many tokens, whose loss is plain and in chunks."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=tokens,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    LoRA(r=8, target_modules="all-linear").apply(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.05)
    ids = torch.randint(0, words, (1, tokens))

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def chunked() -> None:
        total, count = chunked_cross_entropy(model, {"input_ids": ids}, ids[:, 1:], 512, False)
        (total / count).backward()

    peaks, found = [], []
    for call in (plain, chunked):
        model.zero_grad()
        peaks.append(measure.peak(call) / 2**20)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    apart = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(*found, strict=True))
    return [
        f"| plain | {peaks[0]:.0f} | |",
        f"| in chunks | {peaks[1]:.0f} ({peaks[1] / peaks[0]:.3f}) | {apart:.1e} |",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--words", type=int, help="measure the loss of a model with so many words alone")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.words is not None:
        print("| loss | peak MiB | gradients, of the greatest |\n|---|---:|---:|")
        print(*over_words(arguments.words, arguments.tokens), sep="\n")
        return
    print("| step | x HF PEFT (quartiles) | kept MiB | peak MiB |\n|---|---:|---:|---:|")
    for name in ("LoRA q+v", "LoRA all linears"):
        print(*table(name, arguments.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
