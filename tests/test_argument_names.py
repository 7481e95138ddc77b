"""Every name of an argument that the package writes as a string or keyword is one that its model takes.

The forward passes of transformers take any keyword and drop those that they do not know: renaming an argument is then
no error but another result.
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_peft import PromptTuning, SideTuning, TuningError
from lightning_peft.commands.agreement import PLACES
from lightning_peft.core import cache_argument
from lightning_peft.prompts.shared_prompt import decoder_of
from lightning_peft.tasks import likelihoods
from lightning_peft.tasks.shared_text import prefill
from tests import models

PACKAGE = Path(inspect.getfile(PromptTuning)).parents[1]
CAUSAL = ("gpt2", "llama")
ENCODERS = ("bert", "distilbert", "mlm")
PIXELS = (*models.IMAGES, *models.CONVOLUTIONS)

TAKEN = {
    "input_ids": (*ENCODERS, *CAUSAL, "t5", *models.TWO_TOWERS),
    "attention_mask": (*ENCODERS, *CAUSAL, "t5", *models.TWO_TOWERS),
    "position_ids": (*ENCODERS, *CAUSAL, *models.TWO_TOWERS),
    "token_type_ids": ("bert", "mlm"),
    "inputs_embeds": CAUSAL,
    "use_cache": (*CAUSAL, "t5"),
    "logits_to_keep": CAUSAL,
    "decoder_input_ids": ("t5",),
    "decoder_attention_mask": ("t5",),
    "encoder_outputs": ("t5",),
    "pixel_values": (*PIXELS, *models.TWO_TOWERS),
    "labels": (*ENCODERS, *CAUSAL, "t5", *PIXELS),
    "return_loss": models.TWO_TOWERS,
}
"""By name, the models whose forward pass must take it."""
FLAGS = ("output_hidden_states", "output_attentions", "return_dict")
"""Taken among other keywords: what they do is tested."""
IN_ATTENTION = ("position_bias", "is_causal")
IN_DECODERS = {
    "key_value_states": hf.models.bart.modeling_bart.BartAttention,
    "encoder_hidden_states": hf.models.bart.modeling_bart.BartDecoder,
}
WORDS = ("self", "kwargs", "query", "key", "value", "mask", "cache", "hidden_states")
"""What else the package has of these names: layers, columns, attributes, the field of an output."""

ELSEWHERE: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (nn.LayerNorm.forward, ("input",)),
    (hf.BertModel, ("add_pooling_layer",)),
    (DistributedDataParallel, ("static_graph", "gradient_as_bucket_view")),
    (fully_shard, ("offload_policy", "mp_policy")),
    (L.Trainer, (*PLACES, "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")),
    (L.Trainer, ("deterministic", "callbacks")),
]


def backbone(kind: str) -> nn.Module:
    """Return a transformers model, without the classifier that the tests put on two towers."""
    model = models.tiny(kind)
    return model.base_model if kind in models.TWO_TOWERS else model  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in TAKEN.items() for kind in kinds])
def test_a_model_takes_the_argument(name: str, kind: str) -> None:
    model = backbone(kind)
    taker = decoder_of(model) if name == "inputs_embeds" else model
    assert name in inspect.signature(type(taker).forward).parameters


@pytest.mark.parametrize("kind", [*models.TEXT, "vit"])
def test_flags_do_what_they_say(kind: str) -> None:
    model, batch = models.tiny(kind), models.batch(kind)
    field = "decoder_hidden_states" if kind == "t5" else "hidden_states"
    assert getattr(model(**batch), field, None) is None
    assert getattr(model(**batch, output_hidden_states=True), field) is not None
    model.set_attn_implementation("eager")
    assert getattr(model(**batch, output_attentions=True), field.replace("hidden_states", "attentions")) is not None
    assert type(model(**batch, return_dict=False)) is tuple


def test_attention_is_called_with_these_names() -> None:
    given: set[str] = set()

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given.update(kwargs)
        return hf.AttentionInterface()["sdpa"](module, *args, **kwargs)

    hf.AttentionInterface.register("spy", spy)
    model = models.tiny("t5")
    model.set_attn_implementation("spy")
    model(**models.batch("t5"))
    assert "position_bias" in given
    assert "is_causal" in inspect.signature(hf.AttentionInterface()["sdpa"]).parameters


def test_attention_over_the_states_of_an_encoder_takes_them_by_these_names() -> None:
    for name, taker in IN_DECODERS.items():
        assert name in inspect.signature(taker.forward).parameters


@pytest.mark.parametrize(("taker", "names"), ELSEWHERE)
def test_others_take_their_arguments(taker: Callable[..., Any], names: tuple[str, ...]) -> None:
    assert set(names) <= set(inspect.signature(taker).parameters)


def test_every_argument_that_the_package_names_is_tested_here() -> None:
    takers = [
        type(module).forward
        for kind in (*models.TEXT, "mlm", *PIXELS, *models.TWO_TOWERS)
        for module in backbone(kind).modules()
        if isinstance(module, hf.PreTrainedModel) or "Attention" in type(module).__name__
    ]
    known = set().union(*(inspect.signature(taker).parameters for taker in takers)) | {*FLAGS, *IN_ATTENTION}
    written: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                written.add(node.value)
            elif isinstance(node, ast.keyword) and node.arg is not None:
                written.add(node.arg)
    assert written & known - {*WORDS, *FLAGS, *IN_ATTENTION, *IN_DECODERS, *cache_argument.NAMES} == set(TAKEN)


class TestTheCache:
    """It has two names, and one file knows them."""

    def test_no_other_file_knows_its_old_name(self) -> None:
        knowing = [file.name for file in PACKAGE.rglob("*.py") if "past_key_values" in file.read_text()]
        assert knowing == ["cache_argument.py"]

    @pytest.mark.parametrize("kind", CAUSAL)
    def test_a_causal_model_and_its_decoder_take_it(self, kind: str) -> None:
        model = models.tiny(kind)
        decoder = decoder_of(model)
        assert decoder is not None
        assert cache_argument.name_in(model.forward) == cache_argument.name_in(decoder.forward) is not None

    @pytest.mark.parametrize("family", ["Bloom", "Falcon", "GPTNeo", "OPT", "Qwen2", "Qwen3", "Olmo2", "Granite"])
    def test_so_do_other_causal_models(self, family: str) -> None:
        assert cache_argument.name_in(getattr(hf, f"{family}Model").forward) is not None
        assert cache_argument.name_in(getattr(hf, f"{family}ForCausalLM").forward) is not None

    def test_a_recurrent_state_is_none(self) -> None:
        config = hf.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4)
        model = hf.MambaForCausalLM(config).eval()
        assert decoder_of(model) is None
        assert prefill(model, [5, 6, 7]) is None

    @pytest.mark.parametrize("kind", CAUSAL)
    @pytest.mark.parametrize("name", cache_argument.NAMES)
    def test_a_prompt_reads_it_by_either_name(self, kind: str, name: str) -> None:
        model, ids = models.tiny(kind), models.batch(kind)["input_ids"]
        decoder = decoder_of(model)
        assert decoder is not None
        PromptTuning(num_virtual_tokens=4, init="random_uniform").apply(model)
        whole = decoder(input_ids=ids).last_hidden_state
        first = decoder(input_ids=ids[:, :6], use_cache=True)
        rest = decoder(input_ids=ids[:, 6:], **{name: cache_argument.cache_in(first)}).last_hidden_state
        torch.testing.assert_close(rest, whole[:, 6:])
        filled = hf.DynamicCache()
        decoder(input_ids=ids, use_cache=True, **{name: filled})
        assert filled.get_seq_length() == 4 + ids.shape[1]

    @pytest.mark.parametrize("name", cache_argument.NAMES)
    def test_a_side_network_refuses_it_by_either_name(self, name: str) -> None:
        model, ids = models.tiny("llama"), models.batch("llama")["input_ids"]
        cache = cache_argument.cache_in(model(input_ids=ids, use_cache=True))
        SideTuning(reduction=2).apply(model)
        with pytest.raises(TuningError, match="use_cache=False"):
            model.model(input_ids=ids[:, :1], **{name: cache})

    @pytest.mark.filterwarnings("error")  # transformers warns of the old name, and pyproject.toml lets peft write it
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_it_is_given_by_the_name_of_this_version(self, kind: str) -> None:
        model, ids = models.tiny(kind), models.batch(kind)["input_ids"]
        shared = prefill(model, [5, 6, 7])
        words = [[[8], [9, 10]]] * len(ids)
        given = likelihoods.causal_scores(model, ids, torch.ones_like(ids), words, shared)
        alone = likelihoods.recomputed_scores(model, ids, torch.ones_like(ids), words, [5, 6, 7])
        torch.testing.assert_close(given, alone)
        method = PromptTuning(num_virtual_tokens=4, init="random_uniform")
        method.apply(model)
        batch = method.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert model(**batch).logits.shape[1] == ids.shape[1]
        written = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert written.shape[1] <= ids.shape[1] + 3
        assert (written >= 0).all()
