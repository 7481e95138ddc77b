r"""Train a small vision transformer on drawn shapes, so that methods can be tried on images where no hub is.

It learns half of the pairs of colour and shape, in all four styles, on one CPU thread, and is saved as a folder. The
other half, and the digits of scikit-learn, are new to it.

    python examples/pretrain_vit.py                          # runs/vit, in minutes
    python examples/pretrain_vit.py --steps 300 --count 20   # worse and sooner
    lightning-peft fit --config configs/tasks/image_classification.yaml --config configs/data/digits.yaml \
        --model.model runs/vit --method VPT --trainer.max_epochs 5

Colours are learnt in seconds; shapes need to know which patch is where, so positions begin as sines and cosines.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import ColouredShapes
from lightning_peft.data.coloured_shapes import COLOURS, SHAPES, STYLES
from lightning_peft.data.drawing import draw_shape

SIZE, PATCH = 32, 8


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pixels [N, 3, 32, 32] and classes [N] of the pairs to learn, ``count`` of each pair and style."""
    pairs = ColouredShapes(colours=list(COLOURS), shapes=list(SHAPES)).class_pairs
    random = np.random.default_rng(seed)
    drawn = [
        (np.asarray(draw_shape(COLOURS[colour], shape, style, SIZE, random)), label)
        for label, (colour, shape) in enumerate(pairs[: len(pairs) // 2])
        for style in STYLES
        for _ in range(count)
    ]
    pixels, labels = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)


def build(classes: int, width: int, layers: int) -> hf.ViTForImageClassification:
    config = hf.ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=classes,
    )
    model = hf.ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = waves(SIZE // PATCH, width) / 2
    nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight, std=(3 * PATCH**2) ** -0.5)
    return model


def waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of the row and the column of each of ``side`` by ``side`` patches, [N, width]."""
    frequency = math.pi / 2 * torch.exp(-torch.arange(width // 4) / (width // 4) * math.log(2 * side))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten().unsqueeze(1) * frequency for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def moved(pixels: Tensor) -> Tensor:
    """Return the pictures moved a little."""
    down, right = (int(torch.randint(0, 7, ())) for _ in range(2))
    return F.pad(pixels, (3, 3, 3, 3), mode="replicate")[:, :, down : down + SIZE, right : right + SIZE]


def train(model: nn.Module, pixels: Tensor, labels: Tensor, steps: int, batch: int = 96, lr: float = 2e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    begun, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rows = torch.randint(len(pixels), (batch,))
        loss = F.cross_entropy(model(pixel_values=moved(pixels[rows])).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {total / 100:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in pixels.split(256)])
    return (logits.argmax(1) == labels).float().mean().item()


def make(folder: Path, steps: int = 1200, count: int = 120, width: int = 128, layers: int = 4, seed: int = 0) -> float:
    """Save a trained model in the folder and return its accuracy on other pictures of the same classes."""
    torch.manual_seed(seed)
    pixels, labels = pictures(count, seed)
    print(f"{len(pixels):,} pictures of {int(labels.max()) + 1} classes", flush=True)
    model = build(int(labels.max()) + 1, width, layers)
    train(model, pixels, labels, steps)
    model.save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")
    return accuracy(model, *pictures(5, seed + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/vit"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--count", type=int, default=120, help="pictures of each class in each style")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"accuracy on pictures held out: {make(**vars(args)):.3f}")


if __name__ == "__main__":
    main()
