"""Train a tiny language model to read: it answers questions from the text before them, not from what it knows.

The text is facts of the made-up valley, drawn anew in each row, so that none of them can be in the weights; the loss is
that of the answers alone. A text has 8 facts at first and 102, which is some 512 tokens, in the end; a Llama of two
layers then answers 99 of 100 questions, after a minute of one CPU core. Such a model shows what a text in the context
does, and what is kept when it is put into a delta (`ContextDistillation`, tests/benchmarks/context.py).

That two layers find each other takes thousands of steps from random weights. So they start out as readers (`prepare`):
the first attends to the latest name, the second to values behind the same name; training does the rest.

    python examples/pretrain_reader.py                     # runs/tiny/reader
"""

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from lightning_peft.data.synthetic import ANIMALS, ASKED, FACTS, FOODS, PEOPLE, TOWNS, WORKS

VALUES = {"town": TOWNS, "work": WORKS, "food": FOODS, "animal": ANIMALS}
FEWEST, MOST = 8, 102
"""Facts of a text in training: MOST of them take some 512 tokens."""
ENOUGH = 0.99
"""Share of right answers about texts of MOST facts at which the training ends."""
TOKENS = 6000
"""Tokens of a batch, about."""
STEPS = 400
"""At the most: the texts have MOST facts after half of them."""
WIDTH, HEADS, POSITIONS = 128, 4, 2048
IGNORED = -100


class Fact(NamedTuple):
    """What is told of somebody: a name, a key of `FACTS`, and a word of `VALUES`."""

    name: str
    about: str
    value: str

    def told(self) -> str:
        """Return the sentence that tells it."""
        return FACTS[self.about].format(name=self.name, **{self.about: self.value})

    def asked(self) -> str:
        """Return the question for it."""
        return ASKED[self.about].format(name=self.name)

    def begun(self) -> str:
        """Return what stands before the value in the sentence that tells it."""
        return self.told().rpartition(f" {self.value} ")[0]


def draw_facts(draw: random.Random, count: int) -> list[Fact]:
    """Return facts of which no two are about the same of the same person."""
    keys = draw.sample([(name, about) for name in PEOPLE for about in VALUES], count)
    return [Fact(name, about, draw.choice(VALUES[about])) for name, about in keys]


def save_tokenizer(folder: Path) -> hf.PreTrainedTokenizerFast:
    """Save a tokenizer whose tokens are the words of the valley."""
    special = {"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}
    said = [word for told in (*FACTS.values(), *ASKED.values()) for word in told.split() if "{" not in word]
    words = dict.fromkeys([*special.values(), *said, *PEOPLE, *(word for own in VALUES.values() for word in own)])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": token for name, token in special.items()}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **named)
    fast.save_pretrained(folder)
    return fast


def build(tokenizer: hf.PreTrainedTokenizerFast) -> hf.LlamaForCausalLM:
    """Return a model of two layers; its positions turn so slowly that a far word is known as well as a near one."""
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=WIDTH**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return hf.LlamaForCausalLM(config)


@torch.no_grad()
def prepare(model: hf.LlamaForCausalLM, tokenizer: hf.PreTrainedTokenizerFast) -> None:
    """Let the first layer carry the latest name into each word, and the second attend to values with the same name.

    Names have one direction of the embedding in common, values another. A query of the first layer asks for the one,
    the nearer the better, and one of the second for the other and for what its own word has carried to it. All heads of
    a layer together copy a whole word, by a rotation. The networks between them begin small, so as not to disturb.
    """
    first, second = (layer.self_attn for layer in model.model.layers)
    turns, half = model.model.rotary_emb.inv_freq, WIDTH // HEADS // 2
    name, value = nn.init.orthogonal_(torch.empty(2, WIDTH))
    words, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight
    rows[[words[word] for word in PEOPLE]] += name
    rows[[words[word] for own in VALUES.values() for word in own]] += value
    copied, carried, matched, said = (nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)) for _ in range(4))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.05)
    near = (turns > 0.01) & (turns < 1)  # the pairs of numbers that tell a near word from a far one
    for projection in (first.q_proj, first.k_proj):
        projection.weight.mul_(0.1)
        _heads(projection.bias)[:, :half][:, near] = 4.0
    _heads(first.q_proj.bias)[:, half - 1] = 9.0
    _heads(first.k_proj.weight)[:, half - 1] = name
    first.v_proj.weight.copy_(copied)
    first.o_proj.weight.copy_(0.3 * carried @ copied.T)
    match = 2.5 * matched @ carried.T
    _heads(match)[:, (turns > 2e-3).repeat(2)] = 0  # they would match what is near
    _heads(match)[:, half - 1] = 0
    second.q_proj.weight.copy_(match)
    second.k_proj.weight.copy_(match)
    _heads(second.q_proj.bias)[:, half - 1] = 20.0
    _heads(second.k_proj.weight)[:, half - 1] = value
    second.v_proj.weight.copy_(said)
    second.o_proj.weight.copy_(said.T)


def _heads(tensor: Tensor) -> Tensor:
    return tensor.view(HEADS, WIDTH // HEADS, *tensor.shape[1:])


def batch(tokenizer: hf.PreTrainedTokenizerFast, draw: random.Random, facts: int) -> dict[str, Tensor]:
    """Return rows of a text and questions about it in both forms; answers, and the ends after them, have labels."""
    words, end, inputs, labels = tokenizer.get_vocab(), tokenizer.eos_token_id, [], []
    for _ in range(max(4, min(16, TOKENS // (12 * facts)))):
        told = draw_facts(draw, facts)
        ids = [words[word] for fact in told for word in fact.told().split()]
        own = [IGNORED] * len(ids)
        for fact in draw.choices(told, k=max(16, facts)):
            prompt = [words[word] for word in draw.choice([fact.asked(), fact.begun()]).split()]
            answer = [words[fact.value], end]
            ids += prompt + answer
            own += [IGNORED] * len(prompt) + answer
        inputs.append(torch.tensor(ids))
        labels.append(torch.tensor(own))
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(inputs, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def right(logits: Tensor, labels: Tensor, end: int) -> float:
    """Return the share of the answers, without the ends after them, that are the likeliest tokens."""
    known = (labels[:, 1:] != IGNORED) & (labels[:, 1:] != end)
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[known].float().mean().item()


def train(folder: Path, steps: int = STEPS, rate: float = 1e-3, seed: int = 0) -> float:
    """Train a reader, save it with its tokenizer, and return the share of right answers about new texts."""
    torch.manual_seed(seed)
    draw, tokenizer = random.Random(seed), save_tokenizer(folder)
    model = build(tokenizer)
    prepare(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    rates = hf.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    shares: list[float] = []
    for step in range(steps):
        facts = round(FEWEST * (MOST / FEWEST) ** min(1.0, 2 * step / steps))
        rows = batch(tokenizer, draw, facts)
        out = model(**rows, use_cache=False)
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        shares.append(right(out.logits, rows["labels"], tokenizer.eos_token_id))
        if step % 20 == 19:
            share = sum(shares[-20:]) / 20
            print(f"step {step + 1}, {facts} facts, loss {out.loss.item():.3f}, right {share:.3f}", flush=True)
            if facts == MOST and share > ENOUGH:
                break
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        rows = batch(tokenizer, random.Random("test"), MOST)
        return right(model(**rows).logits, rows["labels"], tokenizer.eos_token_id)


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny/reader"))
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    share = train(given.folder, given.steps)
    print(f"{given.folder}: {share:.3f} of new texts, {(time.process_time() - begin) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
