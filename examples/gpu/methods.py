"""The methods that are tried, each with the small model that it tunes here."""

import tempfile
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models

import lightning_peft as lp

R: dict[str, Any] = {"init": "random_uniform"}


def methods() -> dict[str, tuple[str, Any]]:
    """Return each method with the kind of its model, by the name of the case."""
    return _of_texts() | _of_readers() | _of_images() | _of_two_towers()


def _of_texts() -> dict[str, tuple[str, Any]]:
    return {
        "LoRA": ("llama", lp.LoRA(r=4)),
        "LoRA, DoRA": ("llama", lp.LoRA(r=4, use_dora=True, dropout=0.1)),
        "MiSS": ("llama", lp.MiSS(r=4)),
        "HiRA": ("llama", lp.HiRA(r=4)),
        "SHiRA": ("llama", lp.SHiRA(r=4)),
        "OFT": ("llama", lp.OFT(block_size=8)),
        "LoReFT": ("llama", lp.LoReFT(r=2)),
        "IA3": ("llama", lp.IA3()),
        "TrainableTokens": ("llama", lp.TrainableTokens(tokens=[3, 5])),
        "PromptTuning": ("llama", lp.PromptTuning(num_virtual_tokens=4, **R)),
        "PrefixTuning": ("llama", lp.PrefixTuning(num_virtual_tokens=4, mid_dim=8)),
        "PrefixTuning, infix": ("llama", lp.PrefixTuning(num_virtual_tokens=4, mid_dim=None, form="infix")),
        "PromptEnsemble": ("llama", lp.PromptEnsemble(num_prompts=2, num_virtual_tokens=4, **R)),
    }


def _of_readers() -> dict[str, tuple[str, Any]]:
    return {
        "PTuning": ("bert", lp.PTuning(num_virtual_tokens=4)),
        "PTuningV2": ("bert", lp.PTuningV2(num_virtual_tokens=4)),
        "WARP": ("masked", lp.WARP(num_virtual_tokens=4, words=["good", "bad"], tokenizer=save_words())),
        "Adapter": ("bert", lp.Adapter(bottleneck=4)),
        "BitFit": ("bert", lp.BitFit()),
        "DiffPruning": ("bert", lp.DiffPruning()),
        "LadderSideTuning": ("bert", lp.LadderSideTuning()),
        "SideTuning": ("bert", lp.SideTuning()),
        "LinearProbe": ("bert", lp.LinearProbe()),
        "MLPHead": ("bert", lp.MLPHead()),
        "PartialK": ("bert", lp.PartialK(k=1)),
        "FullFineTuning": ("bert", lp.FullFineTuning()),
    }


def _of_images() -> dict[str, tuple[str, Any]]:
    layers: dict[str, Any] = {"general_layers": [0], "expert_layers": [1]}
    return {
        "VPT": ("vit", lp.VPT(num_virtual_tokens=4)),
        "L2P": ("vit", lp.L2P()),
        "DualPrompt": ("vit", lp.DualPrompt(num_tasks=2, general_length=2, expert_length=4, **layers)),
        "CODAPrompt": ("vit", lp.CODAPrompt(num_tasks=1, components=4, length=2, layers=[0, 1])),
        "RanPAC": ("vit", lp.RanPAC(width=16)),
        "TinyTL": ("resnet", lp.TinyTL()),
        "PixelPrompt": ("resnet", lp.PixelPrompt(pixels=2, image_size=16)),
    }


def _of_two_towers() -> dict[str, tuple[str, Any]]:
    words = [20, 5]
    both: dict[str, Any] = {"init": None, "num_virtual_tokens": 3, "num_image_tokens": 5, "depth": 2}
    return {
        "CoOp": ("clip", lp.CoOp(num_virtual_tokens=4)),
        "CoCoOp": ("clip", lp.CoCoOp(num_virtual_tokens=4, init=None)),
        "KgCoOp": ("clip", lp.KgCoOp(num_virtual_tokens=4, init=None, words=words)),
        "DAPL": ("clip", lp.DAPL(num_virtual_tokens=3, num_domain_tokens=2)),
        "MaPLe": ("clip", lp.MaPLe(init=None, depth=2)),
        "IVLP": ("clip", lp.IVLP(**both)),
        "PromptSRC": ("clip", lp.PromptSRC(**both, words=[words, [31, 7]])),
        "ClipAdapter": ("clip", lp.ClipAdapter()),
        "TipAdapter": ("clip", lp.TipAdapter(num_classes=3, shots=4)),
    }


def save_words() -> str:
    """Save a tokenizer of two words, and return its folder."""
    names = ("pad", "cls", "sep", "unk", "mask")
    tokens = [f"[{name.upper()}]" for name in names] + ["good", "bad"]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{name}_token": f"[{name.upper()}]" for name in names}
    )
    return tokenizer.save_pretrained(tempfile.mkdtemp())[0].rpartition("/")[0]
