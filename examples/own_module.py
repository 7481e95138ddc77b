"""A module that owns its method: no callback, its own verbs, and load_from_checkpoint works by itself."""

import sys

import lightning as L
import torch
from transformers import AutoModelForSequenceClassification

from lightning_peft import LoRA, LoRAMixin, StdlibDocstrings

MODEL = sys.argv[1] if len(sys.argv) > 1 else "sentence-transformers/all-MiniLM-L6-v2"


class Classifier(LoRAMixin, L.LightningModule):
    def __init__(self, name, num_labels, r=8):
        super().__init__()
        self.save_hyperparameters()
        self.method = LoRA(r=r, target_modules="all-linear")
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_labels)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    data = StdlibDocstrings(tokenizer=MODEL)
    trainer = L.Trainer(max_steps=20)
    trainer.fit(Classifier(MODEL, data.num_labels), data)
    module = Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    plain = module.merge()
    plain.save_pretrained("merged")
    print(f"{sum(t.numel() for t in module.state_dict().values()):,} values, no trace of LoRA left")
