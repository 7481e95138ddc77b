"""What TRL and sentence-transformers compute of the same: masks of chats, losses of pairs, vectors of sentences.

    make oracles                                          # installs both
    python -m tests.benchmarks.oracles masks losses       # TRL alone
    python -m tests.benchmarks.oracles vectors            # sentence-transformers alone

No test of the gate needs them: their masks and losses stand in those tests as formulas of our own.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import LoRA, Preference, PreferenceData, SentenceEmbedding, merge
from lightning_peft.data.chat_turns import Renderer, tokens_in
from lightning_peft.interop import to_peft
from tests import valley
from tests.benchmarks import measure
from tests.data import test_chat as chats

TEXTS = ["where does anmar live ?", "anmar lives in lund .", "who likes cheese ?"]
OBJECTIVES: tuple[tuple[Any, float, str], ...] = (("dpo", 0.0, "sigmoid"), ("dpo", 0.2, "sigmoid"), ("ipo", 0.0, "ipo"))
"""Our objective and label smoothing, and TRL's name of the loss."""


def masks(folder: Path) -> Iterator[list[str]]:
    """Yield for each template how many conversations have TRL's tokens and mask, with marks and without them."""
    from trl.data_utils import _tokenize

    tokenizer = AutoTokenizer.from_pretrained(chats.save_tokenizer(folder))
    for name, template in chats.TEMPLATES.items():
        same = []
        for used in (template, chats.UNMARKED.sub("", template)):
            pairs = []
            for said in map(chats.conversation, chats.ROWS):
                text, spans = Renderer(tokenizer, used).turns(said, None, last=False)
                found = _tokenize(tokenizer, said, chat_template=template, return_assistant_tokens_mask=True)
                pairs.append((tokens_in(text, spans, tokenizer), (found["input_ids"], found["assistant_masks"])))
            same.append(f"{sum(ours == tuple(theirs) for ours, theirs in pairs)} of {len(pairs)}")
        yield [name, *same]


def losses(folder: Path) -> Iterator[list[str]]:
    """Yield for each objective our loss of a batch, and TRL's with a second model as the reference."""
    model = valley.save("gpt2", folder)
    data = valley.set_up(PreferenceData(tokenizer=model, dataset="made://preferences", batch_size=4))
    batch = next(iter(data.val_dataloader()))
    for objective, smooth, kind in OBJECTIVES:
        task = drawn(Preference(model, objective=objective, beta=0.3, label_smoothing=smooth))
        loss = by_two_models(merge(copy.deepcopy(task.backbone)), model, folder, kind)
        exchanged = {name: torch.cat(part.chunk(2)[::-1]) for name, part in batch.items()}
        theirs = (1 - smooth) * loss(batch) + smooth * loss(exchanged)  # TRL 1.16 smooths other losses alone
        yield compared(objective + (f", label_smoothing={smooth}" if smooth else ""), task, batch, theirs)
    task = drawn(Preference(model, objective="orpo", beta=0.3))
    yield compared("orpo", task, batch, by_odds(task.backbone, batch))


def drawn(task: Preference) -> Preference:
    """Return a task with a LoRA whose values are drawn."""
    LoRA(r=2).apply(task.eval().backbone)
    torch.manual_seed(1)
    for parameter in task.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
    return task


def compared(name: str, task: Preference, batch: dict[str, Tensor], theirs: float) -> list[str]:
    """Return a row: the name, our loss, theirs and the difference."""
    ours = task.loss(batch).item()
    return [name, f"{ours:.6f}", f"{theirs:.6f}", f"{abs(ours - theirs):.1e}"]


def by_two_models(policy: nn.Module, model: str, folder: Path, kind: str) -> Callable[[dict[str, Tensor]], float]:
    """Return what gives the loss of a batch by TRL's DPOTrainer."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(
        output_dir=str(folder / "dpo"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.3,
        loss_type=[kind],
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])  # it is not trained on
    reference = AutoModelForCausalLM.from_pretrained(model)
    trainer = DPOTrainer(model=policy, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.model.eval()

    def loss(batch: dict[str, Tensor]) -> float:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        inputs["completion_mask"] = (batch["labels"] != -100).long()
        return float(trainer.compute_loss(trainer.model, inputs))

    return loss


def by_odds(policy: nn.Module, batch: dict[str, Tensor]) -> float:
    """Return the loss of TRL's ORPOTrainer."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    own = SimpleNamespace(
        is_encoder_decoder=False, padding_value=0, aux_loss_enabled=False, beta=0.3,
        accelerator=SimpleNamespace(device="cpu"), get_batch_logps=ORPOTrainer.get_batch_logps,
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
    )  # fmt: skip
    sides = {
        f"{side}_{name}": part
        for name in ("input_ids", "attention_mask", "labels")
        for side, part in zip(("chosen", "rejected"), batch[name].chunk(2), strict=True)
    }
    chosen, rejected, _, _, likelihood = ORPOTrainer.concatenated_forward(own, policy, sides)
    return float(likelihood - ORPOTrainer.odds_ratio_loss(own, chosen, rejected)[0].mean())


def vectors(folder: Path) -> Iterator[list[str]]:
    """Yield for each pooling how far our vectors are from those of the exported LoRA in sentence-transformers."""
    from sentence_transformers import SentenceTransformer, models

    model = valley.save("bert", folder)
    poolings: tuple[tuple[Any, str], ...] = (("mean", "mean"), ("first", "cls"), ("last", "lasttoken"))
    for ours, theirs in poolings:
        task = SentenceEmbedding(model, pool=ours).eval()
        LoRA(r=4).apply(task.backbone)
        torch.manual_seed(1)
        for parameter in task.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, 0, 0.3)
        to_peft(task.backbone, folder / ours)
        parts = [models.Transformer(model), models.Pooling(32, pooling_mode=theirs), models.Normalize()]
        other = SentenceTransformer(modules=parts, device="cpu")
        bare = other.encode(TEXTS, convert_to_tensor=True)
        other[0].auto_model.load_adapter(str(folder / ours))
        found = other.encode(TEXTS, convert_to_tensor=True)
        batch = task.tokenizer(TEXTS, return_tensors="pt", padding=True)
        with torch.no_grad():
            own = task(dict(batch) | {"sides": 1})
        yield [ours, f"{(own - found).abs().max():.1e}", f"{(bare - found).abs().max():.1e}"]


KINDS: dict[str, tuple[str, list[str], Callable[[Path], Iterator[list[str]]]]] = {
    "masks": ("trl", ["template", "same with marks", "same without"], masks),
    "losses": ("trl", ["objective", "ours", "TRL's", "difference"], losses),
    "vectors": ("sentence-transformers", ["pooling", "difference", "of the delta"], vectors),
}
"""Name -> the package, the columns of the table, and its rows."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parser.add_argument("kinds", nargs="+", choices=list(KINDS))
    for kind in parser.parse_args().kinds:
        package, heads, rows = KINDS[kind]
        with tempfile.TemporaryDirectory() as folder:
            print(f"{package} {version(package)}\n\n{measure.table(heads, list(rows(Path(folder))))}")


if __name__ == "__main__":
    main()
