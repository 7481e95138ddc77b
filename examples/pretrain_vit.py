r"""Train a small vision transformer on drawn shapes, so that methods can be tried on images where no hub is.

It learns half of the pairs of colour and shape, in all four styles, on one CPU thread, and is saved as a folder. The
other half, and the digits of scikit-learn, are new to it.

    python examples/pretrain_vit.py                          # runs/vit, in minutes
    python examples/pretrain_vit.py --epochs 2 --count 20    # worse and sooner
    lightning-peft fit --config configs/tasks/image_classification.yaml --config configs/data/digits.yaml \
        --model.model runs/vit --method VPT --trainer.max_epochs 5
"""

import argparse
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import ColouredShapes
from lightning_peft.data.coloured_shapes import COLOURS, SHAPES, STYLES

SIZE, PATCH = 32, 8


def pictures(count: int, split: str) -> tuple[Tensor, Tensor]:
    """Return pixels [N, 3, 32, 32] and classes [N] of the pairs to learn."""
    data = ColouredShapes(
        style=list(STYLES),
        colours=list(COLOURS),
        shapes=list(SHAPES),
        classes="base",
        per_class=count,
        test_per_class=5,
        validation_per_class=0,
        drawing=1,  # other pictures than those that methods are tried on
    )
    images = data.images(split)
    batch = images[[(0, i) for i in range(len(images))]]
    return batch["pixel_values"], batch["labels"]


def build(classes: int, width: int, layers: int) -> hf.ViTForImageClassification:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=SIZE,
            patch_size=PATCH,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=classes,
        )
    )


def moved(pixels: Tensor) -> Tensor:
    """Return the pictures moved a little, lighter or darker."""
    down, right = (int(torch.randint(-3, 4, ())) for _ in range(2))
    pixels = F.pad(pixels, (3, 3, 3, 3), mode="replicate")[
        :, :, 3 + down : 3 + down + SIZE, 3 + right : 3 + right + SIZE
    ]
    return pixels * torch.empty(len(pixels), 1, 1, 1).uniform_(0.7, 1.2)


def train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, batch: int = 64, lr: float = 1e-3) -> None:
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        begun, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(pixels)).split(batch):
            if len(rows) < batch:
                continue
            loss = F.cross_entropy(model(pixel_values=moved(pixels[rows])).logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total * batch / len(pixels):.3f}, {time.perf_counter() - begun:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in pixels.split(256)])
    return (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/vit"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--count", type=int, default=60, help="pictures of each class in each style")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    torch.manual_seed(args.seed)
    pixels, labels = pictures(args.count, "train")
    print(f"{len(pixels):,} pictures of {int(labels.max()) + 1} classes")
    model = build(int(labels.max()) + 1, args.width, args.layers)
    train(model, pixels, labels, args.epochs)
    print(f"accuracy on pictures held out: {accuracy(model, *pictures(args.count, 'test')):.3f}")
    model.save_pretrained(args.folder)
    hf.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(args.folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.folder}")


if __name__ == "__main__":
    main()
