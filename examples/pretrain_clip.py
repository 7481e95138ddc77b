r"""Train a small CLIP on drawn shapes and their names, so that methods can be tried on names where no hub is.

It learns pictures with captions such as "a photo of a red star." on one CPU thread. Filled and striped shapes are
common, outlines and dark pictures rare, so that there is something to learn in these. One in three captions names the
style; outlines are always said to be drawings and never a photo, so that the usual "a photo of a" is the wrong wording
for them, as it is for the sketches of the web. In one batch of four a story comes before the name, so that the text
tower has read long texts. Some of the pairs of colour and shape are left out: they are new to it though their words are
not. It is saved as a folder with its tokenizer and image processor.

    python examples/pretrain_clip.py                          # runs/clip, in minutes
    python examples/pretrain_clip.py --steps 300 --count 20   # worse and sooner
    lightning-peft fit --config configs/tasks/clip_classification.yaml --config configs/data/clip_shapes.yaml \
        --model.model runs/clip --method CoOp --trainer.max_epochs 20
"""

import argparse
import math
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from lightning_peft import ColouredShapes
from lightning_peft.data.coloured_shapes import COLOURS, SHAPES, STYLES
from lightning_peft.data.drawing import draw_shape

SIZE, PATCH, POSITIONS = 32, 8, 77
TEMPLATES = ("a photo of a {}.", "{}.", "a {}.", "this is a {}.", "a picture of one {}.")
COMMON = ("filled", "striped")
STYLE_WORDS = {
    "filled": ("a filled {}.", "a plain {}."),
    "outline": ("a drawing of a {}.", "the outline of a {}.", "a {} drawn with a pen."),
    "striped": ("a striped {}.", "a {} with stripes."),
    "dark": ("a {} in the dark.", "a {} at night."),
}
DRAWN = "outline"
STORIES = (
    "on a cold morning in spring we went to the harbour",
    "my sister keeps this on the wall of her room",
    "it was sold at the market for two coins",
    "nobody knows who made it or when",
    "seen from the window of a slow train",
)


def save_tokenizer(folder: Path) -> hf.PreTrainedTokenizerFast:
    """Save a tokenizer of whole words; the end of a text has the highest id, as CLIP's."""
    texts = " ".join([*TEMPLATES, *sum(STYLE_WORDS.values(), ()), *STORIES, *COLOURS, *SHAPES])
    found = dict.fromkeys(texts.replace("{}", " ").replace(".", " ").split())
    words = ["[unknown]", ".", ",", "_", *found, "[start]", "[end]"]
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
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
    }
    text = tower | {
        "num_hidden_layers": layers // 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_hidden_layers": layers, "image_size": SIZE, "patch_size": PATCH}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    embeddings = model.vision_model.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] = waves(SIZE // PATCH, width) / 2
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    return model


def waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of the row and the column of each of ``side`` by ``side`` patches, [N, width]."""
    frequency = math.pi / 2 * torch.exp(-torch.arange(width // 4) / (width // 4) * math.log(2 * side))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten().unsqueeze(1) * frequency for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def pictures(counts: dict[str, int], leave_out: int, seed: int) -> tuple[Tensor, list[str], list[str]]:
    """Return pixels [N, 3, 32, 32], the name of each and its style, without every ``leave_out``-th class."""
    pairs = ColouredShapes(colours=list(COLOURS), shapes=list(SHAPES)).class_pairs
    kept = [pair for i, pair in enumerate(pairs) if i % leave_out != leave_out - 1]
    random = np.random.default_rng(seed)
    drawn = [
        (np.asarray(draw_shape(COLOURS[colour], shape, style, SIZE, random)), f"{colour} {shape}", style)
        for style, count in counts.items()
        for colour, shape in kept
        for _ in range(count)
    ]
    pixels, names, styles = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, list(names), list(styles)


def moved(pixels: Tensor) -> Tensor:
    """Return the pictures moved a little."""
    down, right = (int(torch.randint(0, 7, ())) for _ in range(2))
    return F.pad(pixels, (3, 3, 3, 3), mode="replicate")[:, :, down : down + SIZE, right : right + SIZE]


def captions(names: list[str], styles: list[str]) -> tuple[list[str], Tensor]:
    """Return a caption for each picture, and whether it tells its style from others, [N]; some batches tell stories."""
    stories = int(torch.randint(4, ())) == 0
    styled = torch.rand(len(names)) < torch.tensor([1 if style == DRAWN else 1 / 3 for style in styles])
    found = []
    for name, style, says in zip(names, styles, styled.tolist(), strict=True):
        templates = STYLE_WORDS[style] if says else TEMPLATES
        count = int(torch.randint(len(STORIES) + 1, ())) if stories else 0
        before = [STORIES[i] for i in torch.randperm(len(STORIES))[:count].tolist()]
        found.append(" . ".join([*before, templates[int(torch.randint(len(templates), ()))].format(name)]))
    return found, styled


def loss_of(model: hf.CLIPModel, pixels: Tensor, ids: Tensor, names: Tensor, styles: Tensor, styled: Tensor) -> Tensor:
    """Return the contrastive loss; a text is right for all pictures of its name, and of its style if it names one.

    No other text is right for a drawing.
    """
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    drawn = styles == STYLES.index(DRAWN)
    right = ((names[:, None] == names) & ((styles[:, None] == styles) | ~(styled | drawn[:, None]))).float()
    texts = F.cross_entropy(logits, right / right.sum(1, keepdim=True))
    return (texts + F.cross_entropy(logits.t(), (right / right.sum(0)).t())) / 2


def train(
    model: hf.CLIPModel,
    tokenizer: hf.PreTrainedTokenizerFast,
    data: tuple[Tensor, list[str], list[str]],
    steps: int,
    batch: int = 96,
    lr: float = 2e-3,
) -> None:
    pixels, names, styles = data
    classes = list(dict.fromkeys(names))
    name_numbers = torch.tensor([classes.index(name) for name in names])
    style_numbers = torch.tensor([STYLES.index(style) for style in styles])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    begun, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rows = torch.randint(len(pixels), (batch,))
        texts, styled = captions([names[i] for i in rows], [styles[i] for i in rows])
        ids = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
        loss = loss_of(model, moved(pixels[rows]), ids, name_numbers[rows], style_numbers[rows], styled)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {total / 100:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
            total = 0.0
    model.eval()


@torch.no_grad()
def accuracy(model: hf.CLIPModel, tokenizer: hf.PreTrainedTokenizerFast, pixels: Tensor, names: list[str]) -> float:
    """Return how often a picture's own name is the likeliest of all, by the first template."""
    classes = list(dict.fromkeys(names))
    texts = tokenizer([TEMPLATES[0].format(name) for name in classes], return_tensors="pt", padding=True)
    logits = torch.cat([model(texts["input_ids"], part).logits_per_image for part in pixels.split(256)])
    return fmean(classes[i] == name for i, name in zip(logits.argmax(1).tolist(), names, strict=True))


def make(
    folder: Path,
    steps: int = 2000,
    count: int = 100,
    leave_out: int = 4,
    width: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Save a trained model in the folder and return its zero-shot accuracy on other pictures of each style."""
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder)
    save_processor(folder)
    model = build(tokenizer, width, layers)
    counts = {style: count if style in COMMON else max(1, count // 4) for style in STYLES}
    train(model, tokenizer, pictures(counts, leave_out, seed), steps)
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")
    others = {style: pictures({style: 5}, leave_out, seed + 1)[:2] for style in STYLES}
    return {style: accuracy(model, tokenizer, *other) for style, other in others.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/clip"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--count", type=int, default=100, help="pictures of each class and common style")
    parser.add_argument("--leave-out", type=int, default=4, help="every n-th class is new to the model")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the vision tower; the text tower has half")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for style, value in make(**vars(arguments)).items():
        print(f"zero-shot accuracy on other pictures, {style}: {value:.3f}")


if __name__ == "__main__":
    main()
