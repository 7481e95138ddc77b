"""Step time of N LoRAs that are trained together, against N that are trained one after the other.

    python -m tests.benchmarks.population --rounds 5

GPT-2 of three layers, 768 wide, rows of 64 tokens: `together` is one step of N members, `one by one` are N steps of
one, `one, N x rows` is a step of one LoRA on as many rows as all members have.
"""

import argparse
import warnings
from collections.abc import Callable

import lightning as L
import torch
import transformers as hf
from torch import Tensor

from lightning_peft import LoRA, Population
from lightning_peft.deltas.member_steps import MemberSteps
from tests.benchmarks import measure

METHOD = LoRA(r=8, backbone_mode="eval")


class Writer(L.LightningModule):
    """GPT-2 with the loss that it computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=3, vocab_size=5000))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss


def stepper(size: int, rows: int, repeats: int = 1) -> Callable[[], None]:
    """Return what takes a step of a population, or of one LoRA for size 0, ``repeats`` times."""
    module = Writer()
    population = Population(METHOD, size=size or 1)
    if size:
        population.apply(module.model)
    else:
        METHOD.apply(module.model)
    module.model.eval()
    optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    ids = torch.randint(0, 5000, (rows, 64))
    steps = MemberSteps(population)

    def step() -> None:
        for _ in range(repeats):
            batch = {"input_ids": ids, "labels": ids}
            loss = steps.training_step(module, None, batch, 0) if size else module.training_step(batch, 0)
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="rows of a member")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    table = []
    for rows in args.rows:
        for size in (2, 4, 8):
            calls = {"together": stepper(size, rows), "one by one": stepper(0, rows, size)}
            calls["one, N x rows"] = stepper(0, rows * size)
            times = {name: found.cpu for name, found in measure.interleave(calls, args.rounds, warm_up=1).items()}
            ratios = [measure.ratio(times["together"], times[name])[0] for name in list(calls)[1:]]
            medians = [f"{1e3 * sorted(own)[len(own) // 2]:.0f}" for own in times.values()]
            table.append([str(rows), str(size), *medians, *(f"{ratio:.2f}" for ratio in ratios)])
    print(f"CPU, {args.threads} thread(s), {args.rounds} rounds, {measure.versions()}\n")
    heads = ["rows", "N", "together ms", "one by one ms", "one, N x rows ms", "/ one by one", "/ one, N x rows"]
    print(measure.table(heads, table))


if __name__ == "__main__":
    main()
