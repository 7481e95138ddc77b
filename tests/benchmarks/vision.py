"""Time of one training step of the visual prompts, in one process, in interleaved rounds.

    python -m tests.benchmarks.vision --rounds 11

Floors: a frozen forward pass and the gradient of the activations with as many tokens as the prompts make, which stand
in the input as one trained tensor ("floor, long"). L2P's two passes and its cached queries are against VPT with as many
prompts. Before anything is timed, each trained tensor must get a gradient, and cached queries must give the same loss.
"""

import argparse
import json
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import L2P, VPT, Method
from tests.benchmarks import measure

PROMPTS = 25
PAIRS = (
    ("VPT shallow", "floor, long", 1.05),
    ("VPT deep", "floor, long", 1.05),
    ("L2P two passes", "VPT shallow", 1.4),
    ("L2P cached", "VPT shallow", 1.05),
    ("VPT deep folded, inference", "VPT deep, inference", 1.0),
)
"""Which step is compared with which, and the ratio that is promised."""


def build(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=4 * width,
        num_labels=10,
    )
    return hf.ViTForImageClassification(config).eval()


class Step:
    """One training step: forward, what the method adds to the loss, backward, AdamW."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], method: Method | None = None) -> None:
        self.model, self.batch, self.method = model, batch, method
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def loss(self) -> Tensor:
        loss: Tensor = self.model(**self.batch).loss
        penalty = self.method.penalty(self.model) if self.method is not None else None
        return loss if penalty is None else loss + penalty

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def check(self) -> float:
        loss = self.loss()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in self.model.parameters() if p.requires_grad)
        return loss.item()


class Long(nn.Module):
    """The backbone with a longer sequence and one trained tensor in it, and the head on its [CLS]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        self.rows = nn.Parameter(torch.randn(1, PROMPTS, model.config.hidden_size) * 0.02)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        vit = self.model.vit
        x = vit.embeddings(pixel_values)
        x = torch.cat((x, self.rows.expand(len(x), -1, -1)), dim=1)
        for layer in vit.layers:
            x = layer(x)
        logits = self.model.classifier(vit.layernorm(x)[:, 0])
        return hf.modeling_outputs.ImageClassifierOutput(loss=nn.functional.cross_entropy(logits, labels))


def tuned(method: Method, width: int, layers: int) -> nn.Module:
    model = build(width, layers)
    torch.manual_seed(1)
    method.apply(model)
    return model


def run(width: int, layers: int, size: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(2)
    batch = {"pixel_values": torch.randn(size, 3, 64, 64), "labels": torch.randint(0, 10, (size,))}
    methods: dict[str, Method] = {
        "VPT shallow": VPT(num_virtual_tokens=PROMPTS, deep=False),
        "VPT deep": VPT(num_virtual_tokens=PROMPTS, dropout=0.0),
        "L2P two passes": L2P(pool_size=10, prompt_length=5, top_n=5),
        "L2P cached": L2P(pool_size=10, prompt_length=5, top_n=5, cache_queries=True),
    }
    steps: dict[str, Any] = {"floor, long": Step(Long(build(width, layers)), batch)}
    steps |= {name: Step(tuned(method, width, layers), batch, method) for name, method in methods.items()}
    losses = {name: step.check() for name, step in steps.items()}
    assert abs(losses["L2P cached"] - losses["L2P two passes"]) < 1e-5, losses
    assert abs(steps["L2P cached"].loss().item() - losses["L2P cached"]) < 1e-5
    calls: dict[str, Any] = dict(steps)
    for name, fold in (("VPT deep, inference", False), ("VPT deep folded, inference", True)):
        model, method = build(width, layers), VPT(num_virtual_tokens=PROMPTS)
        method.apply(model)
        if fold:
            method.to_key_values(model)
        calls[name] = torch.no_grad()(lambda model=model: model(pixel_values=batch["pixel_values"]).logits)
    times = measure.interleave(calls, rounds)
    rows = [{"step": name, "cpu_ms": 1e3 * median(times[name].cpu), "against": "", "ratio": None} for name in calls]
    for name, other, promised in PAIRS:
        row = next(row for row in rows if row["step"] == name)
        row |= {"against": other, "ratio": measure.ratio(times[name].cpu, times[other].cpu), "promised": promised}
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        ratio = "" if row["ratio"] is None else "{:.3f} ({:.3f} to {:.3f})".format(*row["ratio"])
        cells.append([row["step"], f"{row['cpu_ms']:.1f}", row["against"], ratio, str(row.get("promised", ""))])
    return measure.table(["step", "ms", "against", "ratio (quartiles)", "at most"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=4, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles need that many")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = run(args.width, args.layers, args.size, args.rounds)
    print(f"CPU, 1 thread, {args.rounds} rounds, {measure.versions()}\n\n{render(rows)}")
    if args.json:
        args.json.write_text(
            json.dumps({"versions": measure.versions(), "arguments": vars(args), "rows": rows}, default=str)
        )


if __name__ == "__main__":
    main()
