"""What the rows share: models of random weights, one step, and its time, memory and tokens."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import transformers as hf
from torch import Tensor, nn

import lightning_peft


@dataclass
class Line:
    """A line of the table: whether it held, milliseconds a step, peak memory [MiB] and tokens a second."""

    verdict: str = "held"
    milliseconds: float | None = None
    peak: float | None = None
    tokens: float | None = None
    note: str = ""


Case = tuple[str, Callable[[], Line]]
"""What is tried, and the function that does it: one that fails stops no other."""


@dataclass
class Setup:
    """How large the models are, and until when there is time."""

    tiny: bool
    until: float

    @property
    def gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def left(self) -> float:
        return self.until - time.monotonic()

    def over(self) -> bool:
        return self.left() <= 0

    def describe(self) -> str:
        card = torch.cuda.get_device_name() if self.gpu else "a CPU"
        versions = f"torch {torch.__version__}, lightning {L.__version__}, transformers {hf.__version__}"
        return f"lightning_peft {lightning_peft.__version__} on {card}: {versions}."

    def llama(self, size: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
        """Return a Llama of random weights: '1b' with grouped keys, '7b', or 'small'."""
        shapes = {
            "small": (64, 128, 2, 4, 2, 100),
            "1b": (2048, 8192, 16, 32, 8, 32000),
            "7b": (4096, 11008, 32, 32, 32, 32000),
        }
        hidden, inner, layers, heads, groups, words = shapes["small" if self.tiny else size]
        shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": words} | changes
        return self._made(hf.LlamaForCausalLM, hf.LlamaConfig(**shape, max_position_embeddings=16384), dtype)

    def bert(self, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        """Return a small BERT with a head of two classes."""
        return self._made(hf.BertForSequenceClassification, hf.BertConfig(**SMALL, **changes), dtype)

    def vit(self, dtype: torch.dtype = torch.float32, large: bool = False) -> nn.Module:
        """Return a small ViT with a head of two classes, or ViT-B/16."""
        shape = {} if large and not self.tiny else VISION | {"image_size": 16, "patch_size": 4}
        return self._made(hf.ViTForImageClassification, hf.ViTConfig(**shape), dtype)

    def clip(self, dtype: torch.dtype = torch.float32, large: bool = False) -> nn.Module:
        """Return a classifier of images by the texts of three classes, of CLIP's ViT-B/16 or small."""
        text = {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99}
        vision: dict[str, Any] = {"image_size": 224, "patch_size": 16}
        if self.tiny or not large:
            text, vision = text | VISION | {"max_position_embeddings": 16}, VISION | {"image_size": 16, "patch_size": 4}
        config = hf.CLIPConfig(text_config=text, vision_config=vision)
        return self._made(ByTexts, config, dtype)

    def moe(self, layers: int) -> nn.Module:
        """Return a mixture of experts, in bf16."""
        shape = {"hidden_size": 64, "intermediate_size": 64} if self.tiny else {"hidden_size": 2048}
        shape |= {} if self.tiny else {"intermediate_size": 2048, "num_attention_heads": 32}
        heads = {} if not self.tiny else {"num_attention_heads": 4}
        config = hf.MixtralConfig(
            **shape, **heads, num_key_value_heads=2, num_hidden_layers=layers, num_local_experts=8, vocab_size=100
        )
        return self._made(hf.MixtralForCausalLM, config, torch.bfloat16)

    def texts(self, rows: int, length: int, words: int = 100) -> dict[str, Tensor]:
        """Return texts of random words with themselves as labels."""
        ids = torch.randint(3, words, (rows, min(length, 16) if self.tiny else length), device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def _made(self, kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
        with torch.device(self.device):
            return kind(config).to(dtype)


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = VISION | {"vocab_size": 100}


class ByTexts(hf.PreTrainedModel):
    """A CLIP that scores images by the texts of three classes."""

    base_model_prefix = "towers"
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.towers = hf.CLIPModel(config)
        texts = [[98, 20, 5, 99, 99, 99], [98, 31, 7, 5, 99, 99], [98, 31, 40, 57, 5, 99]]
        self.register_buffer("texts", torch.tensor(texts), persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.towers(input_ids=self.texts, pixel_values=pixel_values).logits_per_image
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


def tuned(model: nn.Module, method: Any) -> nn.Module:
    """Apply a copy of a method to a model, and return the model in training mode."""
    copy.deepcopy(method).apply(model)
    return model.train()


def measure(setup: Setup, model: nn.Module, batch: dict[str, Tensor], steps: int = 8) -> Line:
    """Train for some steps and return the median time, the peak memory beyond all else, and the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    steps, times, losses = (2 if setup.tiny else steps), [], []
    if setup.gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 2):
        wait(setup)
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        wait(setup)
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    middle = statistics.median(times[2:])
    peak = torch.cuda.max_memory_allocated() / 2**20 if setup.gpu else None
    tokens = next((v.numel() for n, v in batch.items() if n == "input_ids"), None)
    verdict = "held" if all(map(math.isfinite, losses)) else "FAILED"
    rate = None if tokens is None else tokens / middle
    return Line(verdict, 1000 * middle, peak, rate, f"loss {losses[0]:.4f} to {losses[-1]:.4f}")


def wait(setup: Setup) -> None:
    """Wait for the GPU."""
    if setup.gpu:
        torch.cuda.synchronize()


def floor(model: nn.Module) -> nn.Module:
    """Freeze a model and let its first activations require gradients: what any method costs at least."""
    model.requires_grad_(False)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    table.register_forward_hook(lambda *seen: seen[2].requires_grad_())
    return model.train()


def close(one: Tensor, other: Tensor, tolerance: float, note: str = "") -> Line:
    """Return a line that says how far two tensors are apart, and whether that is near enough."""
    apart = (one.float() - other.float()).abs().max().item()
    return Line("held" if apart <= tolerance else "FAILED", note=f"{apart:.1e} apart{note}")
