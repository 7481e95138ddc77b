"""What `test_two_towers` runs in each of two processes: the gradients of CLIP with contexts under FSDP2."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lightning_peft import DAPL, IVLP, CoCoOp, CoOp, MaPLe, Method, collect
from lightning_peft.core.sharded import whole
from lightning_peft.towers import clip
from tests.models import batch, tiny


def cases() -> dict[str, Method]:
    return {
        "CoOp": CoOp(num_virtual_tokens=4),
        "CoCoOp": CoCoOp(num_virtual_tokens=4, init=None),
        "DAPL": DAPL(num_virtual_tokens=3, num_domain_tokens=2),
        "MaPLe": MaPLe(init=None, depth=2),
        "IVLP": IVLP(init=None, depth=2),
    }


def tuned(method: Method) -> nn.Module:
    model = tiny("clip")
    torch.manual_seed(1)
    method.apply(model)
    return model.towers


def losses(towers: nn.Module, texts: Tensor, rows: slice) -> dict[str, Tensor]:
    """Return the loss by the model's own forward pass, and by the features of each tower."""
    inputs = {name: value[rows] for name, value in batch("clip").items()}
    logits = towers(input_ids=texts, pixel_values=inputs["pixel_values"]).logits_per_image
    images = clip.image_features(towers, inputs["pixel_values"])
    own = clip.similarity(towers, images, clip.text_features(towers, texts, images))
    return {name: F.cross_entropy(x, inputs["labels"]) for name, x in (("forward", logits), ("features", own))}


def gradients(towers: nn.Module, texts: Tensor, rows: slice = slice(None)) -> dict[str, Tensor]:
    found = {}
    for way, loss in losses(towers, texts, rows).items():
        towers.zero_grad()
        loss.backward()
        for name, parameter in towers.named_parameters():
            if parameter.requires_grad:
                found[f"{way} {name}"] = whole(parameter.grad).clone()
    return found


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    texts = tiny("clip").texts
    for name, method in cases().items():
        towers = tuned(method)
        trained = set(collect(towers))
        fully_shard(towers, ignored_params={towers.logit_scale})
        for entry in ("get_text_features", "get_image_features"):
            register_fsdp_forward_method(towers, entry)
        found = gradients(towers, texts, slice(2 * rank, 2 * rank + 2))
        assert {key.split()[1] for key in found} == trained
        torch.save(found, folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
