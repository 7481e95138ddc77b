"""Time and memory of one training step: lightning_peft and HF PEFT against the floor, in one process.

    python -m tests.benchmarks.step --shape gpt2 bert --rounds 11

The floor is a frozen forward pass and the gradient of the activations, which every method here needs: the backbone with
one trained scale on its embeddings. The step of a method is what a Trainer does for it: prepare the batch, forward,
backward, AdamW. Before anything is timed, each trained tensor must get a gradient, and where both packages compute the
same thing, their losses must be equal from equal weights.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    OFT,
    BitFit,
    HiRA,
    LoRA,
    Method,
    MiSS,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SHiRA,
    TrainableTokens,
    TuningError,
)
from lightning_peft.core.graft import grafts
from lightning_peft.core.structure import word_tables
from lightning_peft.interop import to_peft
from lightning_peft.methods.ia3 import ScaledInput
from lightning_peft.prompts.prefix import Prefix
from tests.benchmarks import measure
from tests.benchmarks.backbones import SHAPES, WIDTH, Shape
from tests.peft_cache import INSPECT

FLOOR, CONTROL = "floor", "floor again (A/A)"
R, PROMPT, LONG = 8, 20, 100
METHODS: dict[str, Method] = {
    "LoRA q+v": LoRA(r=R, alpha=2 * R),
    "LoRA all linears": LoRA(r=R, alpha=2 * R, target_modules="all-linear"),
    "DoRA all linears": LoRA(r=R, alpha=2 * R, target_modules="all-linear", use_dora=True),
    "IA3": IA3(),
    "MiSS q+v": MiSS(r=64),
    "SHiRA q+v": SHiRA(r=R),
    "HiRA q+v": HiRA(r=R),
    "OFT q+v": OFT(block_size=32),
    "OFT q+v, Neumann": OFT(block_size=32, use_cayley_neumann=True),
    "TrainableTokens 64": TrainableTokens(tokens=list(range(64))),
    "BitFit": BitFit(),
    f"PromptTuning {PROMPT}": PromptTuning(num_virtual_tokens=PROMPT, init="random_uniform"),
    f"PromptTuning {LONG}": PromptTuning(num_virtual_tokens=LONG, init="random_uniform"),
    f"PTuning {PROMPT}, half LSTM": PTuning(num_virtual_tokens=PROMPT),
    f"PTuning {PROMPT}, LSTM": PTuning(num_virtual_tokens=PROMPT, encoder="lstm"),
    f"PrefixTuning {PROMPT}": PrefixTuning(num_virtual_tokens=PROMPT, mid_dim=None),
    f"PrefixTuning {PROMPT}, network": PrefixTuning(num_virtual_tokens=PROMPT),
}


@dataclass
class Step:
    """One training step of a model whose trained parameters require gradients."""

    model: nn.Module
    batch: dict[str, Tensor]
    fused: bool
    prepare: Callable[[Any], Any] = lambda batch: batch

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=self.fused)

    def loss(self) -> Tensor:
        return self.model(**self.prepare(self.batch)).loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def check(self) -> float:
        """Return the loss; everything trained must get a gradient."""
        loss = self.loss()
        loss.backward()
        assert self.trained
        assert all(p.grad is not None and p.grad.any() for p in self.trained)
        return loss.item()


def floor(shape: Shape) -> nn.Module:
    model = shape.build().requires_grad_(False)
    scale = nn.Parameter(torch.ones(1))
    model.register_parameter("scale", scale)
    tables = word_tables(model).values() if shape.has_words else [model.get_input_embeddings()]
    for module in tables:
        module.register_forward_hook(lambda module, args, out: out * scale)
    return model


def ours(shape: Shape, method: Method) -> nn.Module:
    """Return the tuned backbone, somewhere past the start of training, where LoRA's B is zero."""
    model = shape.build()
    torch.manual_seed(1)
    method.apply(model)
    for place in grafts(model):
        with torch.no_grad():
            if isinstance(method, LoRA):
                nn.init.normal_(place.graft.B, std=0.02)
            elif isinstance(method, IA3):
                place.graft.l.add_(torch.randn_like(place.graft.l), alpha=0.02)
            elif method.twin is not None:
                for parameter in place.graft.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def theirs(shape: Shape, method: Method, tuned: nn.Module) -> nn.Module | None:
    """Return the same from HF PEFT, with the weights of ``tuned``; None where it has no such method."""
    import peft

    common: dict[str, Any] = {"task_type": shape.task, "modules_to_save": shape.head}
    if isinstance(method, LoRA):
        hosts = {place.path: place.graft for place in grafts(tuned)}
        config = peft.LoraConfig(
            r=method.r,
            lora_alpha=method.alpha,
            target_modules=list(hosts),
            fan_in_fan_out=shape.conv1d,
            use_dora=method.use_dora,
            **common,
        )
        model = peft.get_peft_model(shape.build(), config)
        with torch.no_grad():
            for path, graft in hosts.items():
                layer = model.base_model.model.get_submodule(path)
                layer.lora_A["default"].weight.copy_(graft.A)
                layer.lora_B["default"].weight.copy_(graft.B)
                if method.use_dora:
                    layer.lora_magnitude_vector["default"].weight.copy_(graft.m)
        return model.train()
    if isinstance(method, IA3):
        return their_ia3(shape, tuned, common)
    if method.twin is not None or isinstance(method, TrainableTokens):
        return their_twin(shape, tuned)
    return their_prompt(shape, method, tuned, common)


def their_twin(shape: Shape, tuned: nn.Module) -> nn.Module | None:
    """Return the model of peft with our adapter; None where it has none for such layers."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = to_peft(tuned, Path(folder) / "adapter")
        except TuningError:
            return None
        return peft.PeftModel.from_pretrained(shape.build(), path, is_trainable=True).train()


def their_prompt(shape: Shape, method: Method, tuned: nn.Module, common: dict[str, Any]) -> nn.Module | None:
    """Return the soft prompt or prefix of peft; its LSTM and its network start from other numbers than ours."""
    import peft

    peft.peft_model.inspect = INSPECT

    if isinstance(method, PromptTuning):
        count = method.num_virtual_tokens
        model = peft.get_peft_model(shape.build(), peft.PromptTuningConfig(num_virtual_tokens=count, **common))
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight[:count] = method.rows(tuned)
    elif isinstance(method, PTuning) and method.encoder == "lstm":
        config = peft.PromptEncoderConfig(
            num_virtual_tokens=PROMPT, encoder_reparameterization_type="LSTM", encoder_hidden_size=WIDTH, **common
        )
        model = peft.get_peft_model(shape.build(), config)
    elif isinstance(method, PrefixTuning):
        projected = method.mid_dim is not None
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=PROMPT, prefix_projection=projected, encoder_hidden_size=method.mid_dim, **common
        )
        model = peft.get_peft_model(shape.build(), config)
        if not projected and shape.task != "SEQ_2_SEQ_LM":  # there peft gives the decoder alone a prefix
            places = [place.graft for place in grafts(tuned) if isinstance(place.graft, Prefix)]
            flat = torch.stack([torch.stack((p.keys, p.values)) for p in places])  # [L, 2, H, P, e]
            with torch.no_grad():
                table = flat.permute(3, 0, 1, 2, 4).reshape(PROMPT, -1)
                model.prompt_encoder["default"].embedding.weight.copy_(table)
    else:
        return None
    return model.train()


def same(shape: Shape, method: Method) -> bool:
    """Tell whether peft computes the same from equal weights.

    It puts the prompt of an encoder before [CLS], so that what is pooled is virtual.
    """
    if isinstance(method, PrefixTuning):
        return method.mid_dim is None and shape.task != "SEQ_2_SEQ_LM"
    return not isinstance(method, PTuning) and not (isinstance(method, PromptTuning) and shape.task == "SEQ_CLS")


def their_ia3(shape: Shape, tuned: nn.Module, common: dict[str, Any]) -> nn.Module:
    """Return the IA3 of peft. Of a fused projection it scales the queries too, here by 1 at the start."""
    import peft

    hosts = {place.path: place.graft for place in grafts(tuned)}
    inputs = [path for path, graft in hosts.items() if isinstance(graft, ScaledInput)]
    config = peft.IA3Config(
        target_modules=list(hosts), feedforward_modules=inputs, fan_in_fan_out=shape.conv1d, **common
    )
    model = peft.get_peft_model(shape.build(), config)
    with torch.no_grad():
        for path, graft in hosts.items():
            vector = model.base_model.model.get_submodule(path).ia3_l["default"].view(-1)
            vector[len(vector) - len(graft.l) :] = graft.l
    return model.train()


def steps(shape: Shape, names: Iterable[str], fused: bool) -> dict[str, Step]:
    """Return the steps by name, after checking that they compute what they should.

    A method that does not fit the shape (BitFit on T5, which has no biases, a prompt on ViT) is left out.
    """
    batch = shape.batch()
    found = {name: Step(floor(shape), batch, fused) for name in (FLOOR, CONTROL)}
    found[FLOOR].check()
    for name in names:
        method = METHODS[name]
        try:
            tuned = ours(shape, method)
        except TuningError:
            continue
        found[f"{name}, ours"] = own = Step(tuned, batch, fused, method.prepare)
        loss = own.check()
        other = theirs(shape, method, tuned)
        if other is not None:
            found[f"{name}, peft"] = peer = Step(other, batch, fused)
            difference = abs(peer.check() - loss)
            assert difference < 1e-5 or not same(shape, method), f"{name}: losses differ by {difference}"
    return found


def run(name: str, chosen: Iterable[str], rounds: int, fused: bool) -> list[dict[str, Any]]:
    """Measure every step of one shape."""
    every = steps(SHAPES[name], chosen, fused)
    times = measure.interleave(every, rounds)
    rows = []
    for label, step in every.items():
        tensors = [*step.model.parameters(), *step.model.buffers(), *step.batch.values()]
        peer = times.get(label.removesuffix("ours") + "peft") if label.endswith("ours") else None
        rows.append(
            {
                "step": label,
                "trained": sum(p.numel() for p in step.trained),
                "cpu_ms": 1e3 * median(times[label].cpu),
                "floor_cpu": measure.ratio(times[label].cpu, times[FLOOR].cpu),
                "floor_wall": measure.ratio(times[label].wall, times[FLOOR].wall),
                "peft_cpu": measure.ratio(times[label].cpu, peer.cpu) if peer else None,
                "kept_mib": measure.kept(step.loss, tensors) / 2**20,
                "peak_mib": measure.peak(step) / 2**20,
            }
        )
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    heads = ["step", "trained", "ms", "× floor (quartiles)", "wall × floor", "ours / peft", "kept MiB", "peak MiB"]
    cells = []
    for row in rows:
        middle, low, high = row["floor_cpu"]
        cells.append(
            [
                row["step"],
                f"{row['trained']:,}",
                f"{row['cpu_ms']:.1f}",
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                f"{row['floor_wall'][0]:.3f}",
                f"{row['peft_cpu'][0]:.3f}" if row["peft_cpu"] else "",
                f"{row['kept_mib']:.1f}",
                f"{row['peak_mib']:.1f}",
            ]
        )
    return measure.table(heads, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["gpt2", "bert"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) instead of the default of torch")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles need that many")
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    found = {shape: run(shape, args.method, args.rounds, args.fused) for shape in args.shape}
    print(f"CPU, {args.threads} thread(s), {args.rounds} rounds, {measure.versions()}")
    for shape, rows in found.items():
        print(f"\n### {shape}\n\n{render(rows)}")
    if args.json:
        figures = {"versions": measure.versions(), "arguments": vars(args), "shapes": found}
        args.json.write_text(json.dumps(figures, default=str))


if __name__ == "__main__":
    main()
