"""Time to apply, save, load and merge LoRA: lightning_peft and HF PEFT on the shape of GPT-2 small, 124 M parameters.

    python -m tests.benchmarks.checkpoint --rounds 11

Each package lives one life a round, by turns: apply; save, and save again; load in place, into the model that was
saved; load into a bare backbone; merge. What was read must be what was written. Files are read warm.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, load_delta, merge, save_delta
from tests.benchmarks import measure

METHOD = LoRA(r=8, alpha=16.0, target_modules="all-linear")
Clock = Callable[[str], object]


def ours(backbone: nn.Module, folder: Path, clock: Clock) -> None:
    file = folder / "delta.safetensors"
    with clock("apply"):
        METHOD.apply(backbone)
    written = shake([p for p in backbone.parameters() if p.requires_grad])
    with clock("save"):
        save_delta(backbone, file)
    with clock("save again"):
        save_delta(backbone, file)
    shake([p for p in backbone.parameters() if p.requires_grad])
    with clock("load in place"):
        load_delta(backbone, file)
    assert_same(written, [p for p in backbone.parameters() if p.requires_grad])
    METHOD.remove(backbone)
    with clock("load into a bare backbone"):
        METHOD.apply(backbone)
        load_delta(backbone, file)
    assert_same(written, [p for p in backbone.parameters() if p.requires_grad])
    with clock("merge"):
        merge(backbone)


def theirs(backbone: nn.Module, folder: Path, clock: Clock) -> None:
    import peft

    hosts = [name for name, module in backbone.named_modules() if type(module).__name__ == "Conv1D"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=hosts, fan_in_fan_out=True, task_type="CAUSAL_LM")
    with clock("apply"):
        model = peft.get_peft_model(backbone, config)
    written = shake([p for p in model.parameters() if p.requires_grad])
    with clock("save"):
        model.save_pretrained(folder)
    with clock("save again"):
        model.save_pretrained(folder)
    shake([p for p in model.parameters() if p.requires_grad])
    with clock("load in place"):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    assert_same(written, [p for p in model.parameters() if p.requires_grad])
    with clock("load in place, as load_adapter"):
        model.load_adapter(folder, "another")
        model.set_adapter("another")
    assert_same(written, [p for p in model.parameters() if p.requires_grad])
    model.unload()
    vars(backbone).pop("peft_config", None)
    with clock("load into a bare backbone"):
        model = peft.PeftModel.from_pretrained(backbone, folder, is_trainable=True)
    assert_same(written, [p for p in model.parameters() if p.requires_grad])
    with clock("merge"):
        model.merge_and_unload()
    vars(backbone).pop("peft_config", None)


def whole(backbone: nn.Module, folder: Path, clock: Clock) -> None:
    """A checkpoint of all weights, which is what a Trainer writes without a method's help."""
    with clock("save"):
        torch.save(backbone.state_dict(), folder / "all.pt")
    with clock("load in place"):
        backbone.load_state_dict(torch.load(folder / "all.pt", weights_only=True))


def shake(tensors: list[Tensor]) -> list[Tensor]:
    """Fill the tensors with random numbers and return copies of them."""
    for tensor in tensors:
        nn.init.normal_(tensor, std=0.02)
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(written: list[Tensor], read: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(written, read, strict=True))


def run(rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Return stage -> package -> median seconds, and package -> bytes of what it wrote."""
    packages = {"ours": ours, "peft": theirs, "all weights": whole}
    backbones = {name: hf.GPT2LMHeadModel(hf.GPT2Config()) for name in packages}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    sizes = {}
    for i in range(rounds + 1):
        for name in list(packages)[:: 1 if i % 2 == 0 else -1]:
            gc.collect()

            @contextmanager
            def clock(stage: str, name: str = name, warm: bool = i > 0) -> Iterator[None]:
                start = time.perf_counter()
                yield
                if warm:
                    seconds[stage, name].append(time.perf_counter() - start)

            with tempfile.TemporaryDirectory() as folder:
                packages[name](backbones[name], Path(folder), clock)
                sizes[name] = sum(file.stat().st_size for file in Path(folder).iterdir() if file.suffix != ".md")
    stages: dict[str, dict[str, float]] = defaultdict(dict)
    for (stage, name), values in seconds.items():
        stages[stage][name] = median(values)
    return stages, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    stages, sizes = run(args.rounds)
    names = list(sizes)
    rows = [[stage, *(f"{1e3 * of[name]:.1f}" if name in of else "" for name in names)] for stage, of in stages.items()]
    rows.append(["size of the file [MB]", *(f"{sizes[name] / 1e6:.2f}" for name in names)])
    print(f"CPU, {args.threads} thread(s), medians of {args.rounds} rounds, {measure.versions()}\n")
    print(measure.table(["wall ms", *names], rows))
    if args.json:
        args.json.write_text(json.dumps({"versions": measure.versions(), "seconds": stages, "bytes": sizes}))


if __name__ == "__main__":
    main()
