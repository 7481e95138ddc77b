"""Runs a side network beside a frozen model: on its inputs by name and its output, without a graph in it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure, task_class
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.empty_inputs import empty_input_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.reach import depends_on
from lightning_peft.core.reads import field_read, layers_called


class BesideFrozen(Graft):
    """Runs its host without a graph, and then a network beside it on the same inputs.

    Args:
        host: the frozen model.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.names = structure.arguments_of(host)

    def beside(self, out: Any, host: nn.Module, given: dict[str, Any]) -> Any:
        """Return the new output of the host, from its output and its inputs by name."""
        raise NotImplementedError

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the host's output as `beside` changes it."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = cache_in(given)
        if cache is not None and cache.get_seq_length() > 0:
            raise TuningError(
                "a side network reads the whole text, not the tokens since the last call: generate with "
                "use_cache=False."
            )
        with torch.no_grad():
            out = forward(**given)
        return self.beside(out, host, given)


def base_of(backbone: nn.Module) -> nn.Module:
    """Return the part of a backbone that gives the hidden states; the encoder where an encoder-decoder has none.

    Raises:
        TuningError: it has none.
    """
    base = structure.base_model_of(backbone)
    if base is backbone:
        base = _inner(backbone)
    if structure.is_encoder_decoder(backbone) and field_read(backbone) == "pooler_output":
        return structure.encoder_of(backbone) or base  # ProphetNet reads the second output, of streams of its own
    path = next((name for name, module in backbone.named_modules() if module is base), "")
    called = layers_called(backbone)
    if path and called and path not in called:  # OPT's language model calls the decoder in its base model
        inner = [structure.part(backbone, name) for name in sorted(called) if name.startswith(f"{path}.")]
        models = [module for module in inner if module is not None and structure.is_pretrained(module)]
        return models[0] if len(models) == 1 else base
    return base


def _inner(backbone: nn.Module) -> nn.Module:
    """Return the model inside a backbone without a base model by name that its head or its words stand on."""
    words = structure.output_embeddings_of(backbone) is not None
    if not words and not task_class.is_of_a_task(backbone):
        return backbone
    inner = [child for child in backbone.children() if structure.is_pretrained(child)]
    if len(inner) == 1:
        return inner[0]
    encoder = structure.encoder_of(backbone) if structure.is_encoder_decoder(backbone) else None
    if encoder is None and words:
        raise TuningError(
            f"{type(backbone).__name__} has no base model of its own that gives hidden states, beside which a side "
            "network could run: take another model, or LoRA."
        )
    return encoder or backbone


def check_is_read(backbone: nn.Module, base: nn.Module, name: str) -> None:
    """Check that what the backbone gives depends on a parameter of the side network, where that can be seen.

    Raises:
        TuningError: it does not, since the backbone reads another output of its base model.
    """
    if depends_on(backbone, name) is False:
        raise TuningError(
            f"{type(backbone).__name__} does not read the output of {type(base).__name__} in which a side network is "
            "blended, but e.g. the hidden states of all blocks: tune it by LoRA."
        )


def without_effect(network: nn.Module, blend: str) -> list[str]:
    """Return the parameters of a network that get no gradient from what is blended, by a pass of one empty input.

    Such are the token of masked patches, or embeddings of entities. Where no input can be made there are none.
    """
    try:
        inputs = empty_input_of(network)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            out = network.eval()(**inputs)
            parameters = dict(network.named_parameters())
            whole = field_of(out, blend, network)
            given = torch.autograd.grad(whole.sum(), list(parameters.values()), allow_unused=True)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError, KeyError, TuningError):
        return []
    return [name for name, gradient in zip(parameters, given, strict=True) if gradient is None]


def field_of(out: Any, name: str, host: nn.Module) -> Tensor:
    """Return the tensor ``name`` of a model's output, or the output itself if it is a tensor.

    Raises:
        TuningError: it has none of that name.
    """
    value = out if isinstance(out, Tensor) else getattr(out, name, None)
    if not isinstance(value, Tensor):
        raise TuningError(
            f"{type(host).__name__} gives no {name} (but {type(out).__name__}) to blend the side network with: "
            "choose what it gives by blend=, or take another model."
        )
    return value


def with_fields(out: Any, changes: dict[str, Any]) -> Any:
    """Return a model's output with some of its fields changed; a tensor is all the output that there is."""
    if isinstance(out, Tensor):
        return next(iter(changes.values()))
    return type(out)(**{**out, **changes})
