r"""Train a small CLIP on drawn shapes and their names, so that methods can be tried on names where no hub is.

It learns pictures of all four styles with captions such as "a photo of a red star." on one CPU thread; some of the
pairs of colour and shape are left out, so they are new to it though their words are not. It is saved as a folder with
its tokenizer and image processor.

    python examples/pretrain_clip.py                          # runs/clip, in minutes
    python examples/pretrain_clip.py --epochs 2 --count 20    # worse and sooner
    lightning-peft fit --config configs/tasks/clip_classification.yaml --config configs/data/clip_shapes.yaml \
        --model.model runs/clip --method CoOp --trainer.max_epochs 20
"""

import argparse
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from lightning_peft import ColouredShapes
from lightning_peft.data.coloured_shapes import COLOURS, SHAPES, STYLES

SIZE, PATCH, POSITIONS = 32, 8, 77
TEMPLATES = ("a photo of a {}.", "{}.", "a {}.", "this is a {}.", "a picture of one {}.")
STYLE_WORDS = {
    "filled": "a filled {}.",
    "outline": "the outline of a {}.",
    "striped": "a striped {}.",
    "dark": "a {} in the dark.",
}


def save_tokenizer(folder: Path) -> hf.PreTrainedTokenizerFast:
    """Save a tokenizer of whole words; the end of a text has the highest id, as CLIP's."""
    texts = " ".join([*TEMPLATES, *STYLE_WORDS.values(), *COLOURS, *SHAPES]).replace("{}", " ").replace(".", " ")
    words = ["[unknown]", ".", ",", "_", *dict.fromkeys(texts.split()), "[start]", "[end]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unknown]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, words.index(token)) for token in ("[start]", "[end]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[start] $A [end]", special_tokens=special)
    named = {"bos_token": "[start]", "eos_token": "[end]", "pad_token": "[end]", "unk_token": "[unknown]"}
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **named)
    wrapped.save_pretrained(folder)
    return wrapped


def save_processor(folder: Path) -> None:
    square = {"height": SIZE, "width": SIZE}
    hf.CLIPImageProcessorPil(
        size=square, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def build(tokenizer: hf.PreTrainedTokenizerFast, width: int, layers: int) -> hf.CLIPModel:
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": SIZE, "patch_size": PATCH}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def pictures(folder: Path, count: int, leave_out: int) -> tuple[Tensor, list[str], list[str]]:
    """Return pixels [N, 3, 32, 32], the name of each and its style, without every ``leave_out``-th class."""
    data = ColouredShapes(
        style=list(STYLES),
        colours=list(COLOURS),
        shapes=list(SHAPES),
        per_class=count,
        validation_per_class=0,
        drawing=1,  # other pictures than those that methods are tried on
        processor=str(folder),
    )
    images = data.images("train")
    kept = [i for i, label in enumerate(images.labels) if label % leave_out != leave_out - 1]
    images = images.select(kept)
    pixels = torch.stack([images.pixels(i) for i in range(len(images))])
    return pixels, [data.label_names[label] for label in images.labels], images.rows["style"][:]


def moved(pixels: Tensor) -> Tensor:
    """Return the pictures moved a little."""
    down, right = (int(torch.randint(-3, 4, ())) for _ in range(2))
    wide = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    return wide[:, :, 3 + down : 3 + down + SIZE, 3 + right : 3 + right + SIZE]


def captions(names: list[str], styles: list[str]) -> list[str]:
    """Return a caption for each picture; one in three names the style."""
    drawn = torch.randint(3 * len(TEMPLATES), (len(names),)).tolist()
    found = []
    for name, style, draw in zip(names, styles, drawn, strict=True):
        template = TEMPLATES[draw % len(TEMPLATES)] if draw >= len(TEMPLATES) else STYLE_WORDS[style]
        found.append(template.format(name))
    return found


def loss_of(model: hf.CLIPModel, pixels: Tensor, ids: Tensor, names: list[str]) -> Tensor:
    """Return the contrastive loss; all pictures of the same name are right for its texts."""
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    label = torch.tensor([number[name] for name in names])
    right = (label[:, None] == label).float()
    target = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def train(
    model: hf.CLIPModel,
    tokenizer: hf.PreTrainedTokenizerFast,
    data: tuple[Tensor, list[str], list[str]],
    epochs: int,
    batch: int = 96,
    lr: float = 1e-3,
) -> None:
    pixels, names, styles = data
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        begun, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(pixels)).split(batch):
            if len(rows) < batch:
                continue
            own = [names[i] for i in rows]
            texts = tokenizer(captions(own, [styles[i] for i in rows]), return_tensors="pt", padding=True)
            loss = loss_of(model, moved(pixels[rows]), texts["input_ids"], own)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - begun
        print(f"epoch {epoch + 1} of {epochs}: loss {total / (len(pixels) // batch):.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/clip"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--count", type=int, default=30, help="pictures of each class and style")
    parser.add_argument("--leave-out", type=int, default=4, help="every n-th class is new to the model")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    datasets.disable_progress_bars()
    tokenizer = save_tokenizer(arguments.folder)
    save_processor(arguments.folder)
    model = build(tokenizer, arguments.width, arguments.layers)
    data = pictures(arguments.folder, arguments.count, arguments.leave_out)
    train(model, tokenizer, data, arguments.epochs)
    model.save_pretrained(arguments.folder)
    print(f"saved in {arguments.folder}")


if __name__ == "__main__":
    main()
