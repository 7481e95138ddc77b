"""A method on any nn.Module, in your own loop: apply, train, save the delta, load it elsewhere, remove."""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

from lightning_peft import LoRA, load_delta, save_delta

MODEL = sys.argv[1] if len(sys.argv) > 1 else "sentence-transformers/all-MiniLM-L6-v2"

if __name__ == "__main__":
    model, tokenizer = AutoModel.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(["a graft joins its host", "the host stays itself"], return_tensors="pt", padding=True)
    before = model(**batch).last_hidden_state

    method = LoRA(r=4)
    method.apply(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).last_hidden_state.var().backward()
        optimizer.step()
    print("saved", save_delta(model, "delta.safetensors"))

    other = AutoModel.from_pretrained(MODEL)
    LoRA(r=4).apply(other)
    load_delta(other, "delta.safetensors")
    assert torch.equal(other(**batch).last_hidden_state, model(**batch).last_hidden_state)

    method.remove(model)
    assert torch.equal(model(**batch).last_hidden_state, before)
    print("removed: the model is what it was, bit for bit")
