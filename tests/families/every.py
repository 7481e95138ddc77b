"""Builds the tiny models of ``every.yaml``: most families of transformers, for the whole table of what works."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from torch import Tensor, nn

from tests.families.builders import SAMPLE, Built

VOCABULARY, WIDTH = 120, 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "projection_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "rotary_dim"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("hidden_dim", "mlp_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_position", "max_seq_len"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "image_size"), 32),
    **dict.fromkeys(("d_kv", "patch_size", "head_dim", "relative_attention_num_buckets"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1), "initializer_factor": 1.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
"""Sizes of a configuration that a row of the file says nothing of; its dropouts are 0, its classes three."""
_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def build_any(family: str) -> Built:
    """Return a model of a family in eval mode, and a batch for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = WHOLE[family]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and parameter.ndim == 1 and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
                elif parameter.ndim > 1 and not parameter.any():  # a zero projection hides what is before it
                    parameter.normal_(std=0.1)
    return model.eval(), batch


def _built(row: dict[str, Any]) -> Built:
    kind = getattr(hf, row["model"])
    return kind(_config(row["config"])), {name: _input(value) for name, value in _ROWS["batches"][row["batch"]].items()}


def _config(row: dict[str, Any]) -> Any:
    """Return the configuration that a row describes."""
    given = {name: _setting(value) for name, value in row.items() if name not in ("of", "exactly")}
    kind = getattr(hf, row.get("of") or row["exactly"])
    sizes = {field.name: _small(field) for field in dataclasses.fields(kind)} if "of" in row else {}
    settings = {name: value for name, value in sizes.items() if value is not None} | given
    if "of" in row:
        settings = {"num_labels": 3} | settings
    return kind(**{name: value for name, value in settings.items() if value != "unset"})


def _setting(value: Any) -> Any:
    is_config = isinstance(value, dict) and ("of" in value or "exactly" in value)
    return _config(value).to_dict() if is_config else value


def _small(field: "dataclasses.Field[Any]") -> Any:
    """Return a small size in place of a default, or None to leave it as it is."""
    if field.name in _SIZES and not isinstance(field.default, (list, tuple, dict, type(dataclasses.MISSING))):
        return _SIZES[field.name]
    is_rate = ("drop" in field.name) and isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
    return type(field.default)(0) if is_rate else None


def _input(value: Any) -> Any:
    """Return what a row of the file describes: whole numbers, noise, classes, one number, or rows of named tensors."""
    noise = torch.Generator().manual_seed(0)
    if isinstance(value, dict):
        (how, numbers), *_ = value.items()
        match how:
            case "normal":
                return torch.randn(numbers, generator=noise)
            case "uniform":
                return torch.rand(numbers, generator=noise)
            case "classes":
                return torch.randint(numbers[0], numbers[1:], generator=noise)
            case "full":
                return torch.full(numbers[1:], numbers[0])
    if isinstance(value, list):
        if isinstance(value[0], dict):
            return [{name: torch.tensor(numbers) for name, numbers in one.items()} for one in value]
        return torch.tensor(value)
    return value


class Texts(nn.Module):
    """A classifier of texts in plain torch: a transformer or an LSTM."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, batch_first=True)
        self.body = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True) if recurrent else nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.words(x))
        return self.last(out[0][:, -1] if isinstance(out, tuple) else out.mean(1))


def _texts(recurrent: bool) -> Built:
    return Texts(recurrent), {"x": torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))}


WHOLE: dict[str, Callable[[], Built]] = {
    **SAMPLE,
    **{name: partial(_built, row) for name, row in _ROWS["families"].items()},
    "torch_encoder": partial(_texts, False),
    "torch_lstm": partial(_texts, True),
}
"""Name of a family -> its builder, those of the sample first."""
