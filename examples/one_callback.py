"""Tune a model that you train already: add one callback, edit nothing else."""

import sys

import lightning as L
import torch
from transformers import AutoModelForSequenceClassification

from lightning_peft import LoRA, StdlibDocstrings

MODEL = sys.argv[1] if len(sys.argv) > 1 else "sentence-transformers/all-MiniLM-L6-v2"


class Classifier(L.LightningModule):
    """Yours: it knows nothing of LoRA."""

    def __init__(self, name, num_labels):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_labels)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    data = StdlibDocstrings(tokenizer=MODEL)
    trainer = L.Trainer(max_steps=50, callbacks=[LoRA(r=8)])
    trainer.fit(Classifier(MODEL, data.num_labels), data)
    print("the delta:", trainer.checkpoint_callback.best_model_path)
