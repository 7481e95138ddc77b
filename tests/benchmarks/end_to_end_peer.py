"""The other process of `end_to_end`: HF Trainer with PEFT, or TRL's trainer for chat, on batches that it is told."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import transformers as hf
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_peft.core.hub import resolve


def in_batches(kind: type[Any], batches: dict[str, list[list[int]]] | None) -> type[Any]:
    """Return a trainer whose batches are these; None: those that it draws itself."""
    if batches is None:
        return kind

    class Told(kind):  # type: ignore[misc]
        def get_train_dataloader(self) -> DataLoader[Any]:
            return self._told(self.train_dataset, "train")

        def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
            return self._told(self.eval_dataset, "validation")

        def _told(self, rows: Any, split: str) -> DataLoader[Any]:
            return DataLoader(rows, batch_sampler=batches[split], collate_fn=self.data_collator)  # type: ignore[arg-type]

    return Told


def arguments(told: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return what both trainers are given: a linear schedule with a tenth of warm-up, as our tasks have."""
    return {
        "output_dir": f"{told['folder']}/theirs",
        "num_train_epochs": 1,
        "learning_rate": told["rate"],
        "weight_decay": 0.01,
        "per_device_train_batch_size": told["batch_size"],
        "per_device_eval_batch_size": told["batch_size"],
        "warmup_steps": rows // told["batch_size"] // 10,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "steps",
        "disable_tqdm": True,
        "seed": 0,
        "max_grad_norm": 0.0,
    }


def classify(told: dict[str, Any], rows: dict[str, Dataset]) -> float:
    """Train MiniLM and return the accuracy."""
    model = resolve(told["model"])
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    names = sorted(set(rows["train"]["label"]))
    encoded = {
        split: part.map(
            lambda one: (
                tokenizer(one["text"], truncation=True, max_length=128)
                | {"labels": [names.index(label) for label in one["label"]]}
            ),
            batched=True,
            remove_columns=["text", "label"],
        )
        for split, part in rows.items()
    }
    base = hf.AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(names))
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=told["r"], lora_alpha=told["alpha"], target_modules=["query", "value"]
    )
    trainer = in_batches(hf.Trainer, told["batches"])(
        model=peft.get_peft_model(base, config),
        args=hf.TrainingArguments(**arguments(told, len(rows["train"]))),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=hf.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda out: {"score": float((np.argmax(out.predictions, -1) == out.label_ids).mean())},
    )
    trainer.train()
    return float(trainer.evaluate()["eval_score"])


def converse(told: dict[str, Any], rows: dict[str, Dataset]) -> float:
    """Train a chat model on what the assistant says, and return the loss."""
    from trl import SFTConfig, SFTTrainer

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=told["r"], lora_alpha=told["alpha"], target_modules=["c_attn", "c_proj", "c_fc"]
    )
    options = arguments(told, len(rows["train"]))
    trainer = in_batches(SFTTrainer, told["batches"])(
        model=hf.AutoModelForCausalLM.from_pretrained(told["model"]),
        args=SFTConfig(**options, max_length=128, assistant_only_loss=True, gradient_checkpointing=False, bf16=False),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=hf.AutoTokenizer.from_pretrained(told["model"]),
        peft_config=config,
    )
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


def main() -> None:
    """Do what a file says, and write the score beside it."""
    told = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(told["folder"])
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    rows = {split: Dataset.from_json(file, cache_dir=str(folder / "cache")) for split, file in files.items()}
    score = (classify if told["case"] == "minilm" else converse)(told, rows)
    (folder / "score").write_text(str(score))


if __name__ == "__main__":
    main()
