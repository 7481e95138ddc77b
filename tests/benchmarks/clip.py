"""Time and memory of a training step of CoOp and CoCoOp: the form of the reference code against ours, in one process.

    python -m tests.benchmarks.clip --classes 10 50 --rounds 11

The reference runs all 77 positions of every class, and for CoCoOp one image after the other; ours computes what prompts
have in common once and nothing behind their ends, all images together. Both run the same transformers model with the
same graft, so only that differs. Before anything is timed, losses and gradients of the two must be equal. "Cached" has
the features of the images already, as ``cache_image_features`` of `CLIPClassification` gives them.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import CoCoOp, CoOp, Method
from lightning_peft.towers import clip
from tests.benchmarks import measure

SHAPES = {"tiny": (4, 256), "small": (6, 512)}
"""Name -> layers and width of both towers."""
START, END, STOP, LONGEST = 1998, 1999, 1990, 4


def build(shape: str) -> hf.CLIPModel:
    layers, width = SHAPES[shape]
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    torch.manual_seed(0)
    config = hf.CLIPConfig(
        text_config=tower | {"vocab_size": 2000, "max_position_embeddings": 77} | ids,
        vision_config=tower | {"image_size": 128, "patch_size": 16},
        projection_dim=width,
    )
    return hf.CLIPModel(config).eval()


def names(count: int) -> Tensor:
    """Return the ids of classes of one to four random words, filled up to 77 as the reference's are, [C, 77]."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        length = int(torch.randint(1, LONGEST + 1, (), generator=draw))
        words = torch.randint(1, STOP, (length,), generator=draw).tolist()
        rows.append([START, *words, STOP, *[END] * (77 - 2 - length)])
    return torch.tensor(rows)


def tuned(shape: str, method: Method) -> hf.CLIPModel:
    model = build(shape)
    torch.manual_seed(2)
    method.apply(model)
    return model


def step(
    model: nn.Module, ids: Tensor, pixels: Tensor, labels: Tensor, features: Tensor | None, loop: bool = False
) -> Callable[[], Tensor]:
    """Return a training step: features, prompts, loss, backward pass, SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def go() -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            images = clip.image_features(model, pixels) if features is None else features
        parts = images.split(1) if loop else [images]
        logits = torch.cat([clip.similarity(model, part, clip.text_features(model, ids, part)) for part in parts])
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return go


def check(steps: dict[str, Callable[[], Tensor]], models: dict[str, nn.Module], reference: str) -> None:
    """See that all steps have the same loss and the same gradients, none of them zero."""
    found = {}
    for name, call in steps.items():
        loss = call()
        grads = [p.grad.clone() for p in models[name].parameters() if p.grad is not None]
        assert grads, name
        assert all(bool(g.abs().max() > 0) for g in grads), name
        found[name] = (loss, grads)
    loss, grads = found[reference]
    for name, (other, others) in found.items():
        assert torch.allclose(loss, other, rtol=1e-4), name
        for a, b in zip(grads, others, strict=True):
            assert ((a - b).abs().max() <= 1e-3 * a.abs().max()).item(), name


def measured(shape: str, classes: int, batch: int, conditional: bool, rounds: int) -> list[dict[str, float | str]]:
    """Return a row for each form of one method; the first is the reference's."""
    kind, arguments = (CoCoOp, {"init": None}) if conditional else (CoOp, {})
    method = lambda share: kind(num_virtual_tokens=16, share_prefix=share, **arguments)  # noqa: E731
    full, ours = tuned(shape, method(False)), tuned(shape, method(True))
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randn(batch, 3, 128, 128, generator=draw)
    labels, ids = torch.randint(0, classes, (batch,), generator=draw), names(classes)
    with torch.no_grad():
        features = clip.image_features(full, pixels)
    data = (ids, pixels, labels)
    steps = {
        "reference": step(full, *data, None, loop=conditional),
        "ours": step(ours, *data, None),
        "ours, cached": step(ours, *data, features),
    }
    models = {"reference": full, "ours": ours, "ours, cached": ours}
    check(steps, models, "reference")
    times = measure.interleave(steps, rounds, warm_up=1)
    peaks = {name: measure.peak(call) for name, call in steps.items()}
    return [
        {
            "step": f"{kind.__name__}, {name}",
            "ms": 1e3 * median(times[name].cpu),
            "times faster": measure.ratio(times["reference"].cpu, times[name].cpu)[0],
            "peak MiB": peaks[name] / 2**20,
            "less memory": peaks["reference"] / peaks[name],
        }
        for name in steps
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cocoop-batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    everything = {}
    for classes in arguments.classes:
        rows = measured(arguments.shape, classes, arguments.batch, False, arguments.rounds)
        rows += measured(arguments.shape, classes, arguments.cocoop_batch, True, arguments.rounds)
        print(f"\nCLIP {arguments.shape} {SHAPES[arguments.shape]}, {classes} classes, 16 context tokens, "
              f"batch {arguments.batch} (CoCoOp {arguments.cocoop_batch}); {measure.versions()}\n")  # fmt: skip
        heads = list(rows[0])
        cells = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
        print(measure.table(heads, cells))
        everything[classes] = rows
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
