"""Train tiny language models on texts of the made-up valley, so that every task can be tried where no hub is.

A model of each kind is built from its configuration, with a tokenizer of the valley's words, trained on one CPU thread,
and saved as a folder: a masked, a causal, a sequence-to-sequence model trained to fill gaps as T5 is, and that one
adapted to write (`t5_lm`). `bert_zh` and `gpt2_zh` read the valley where Chinese is spoken; their tokens are
characters. Any task takes such a folder as its ``model``. One batch in four is bare facts, which all kinds are to know;
what a sentence ends in, which is what it says, is masked more often than its other words.

    python examples/pretrain_tiny.py                               # all of them, below runs/tiny, in minutes
    python examples/pretrain_tiny.py --kinds bert --steps 100      # worse and sooner
    lightning-peft fit --config configs/tasks/token_classification.yaml --model.model runs/tiny/bert
"""

import argparse
import math
import random
import string
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from lightning_peft.data import synthetic, synthetic_zh
from lightning_peft.prompting import solved

KINDS = ("bert", "gpt2", "t5", "t5_lm", "bert_zh", "gpt2_zh")
CHINESE = "_zh"
POSITIONS = 256
RATES = {"bert": 2e-3}
"""Learning rates other than 3e-3."""
GAPS = 16
"""How many sentinel words <extra_id_0>, <extra_id_1> ... the sequence-to-sequence model knows."""


def texts(split: str = "train") -> list[str]:
    """Return the natural text of the valley: no text of a task's test is among that of its training.

    The contexts of questions are left out: what they tell of people is made up anew in each, against the facts.
    """
    found = list(synthetic.load("corpus")[split]["text"])
    found += synthetic.load("sentences")[split]["text"]
    found += [" ".join(row) for row in synthetic.load("tags")[split]["tokens"]]
    found += synthetic.load("descriptions")[split]["target"]
    return found


def facts(valley: Any = synthetic) -> list[str]:
    """Return what is true of everybody, a sentence each, as the corpus tells it."""
    return [fact.format(name=n, **valley.person(n)) for n in valley.PEOPLE for fact in valley.FACTS.values()]


def chinese_texts() -> list[str]:
    """Return the natural text of the Chinese valley: half of the sums are solved step by step, half at once."""
    found = list(synthetic.load("zh_corpus")["train"]["text"])
    for number, row in enumerate(synthetic.load("zh_sums")["train"]):
        answer = solved(row["rationale"] if number % 2 else "", row["answer"], "zh")
        found.append(f"问：{row['question']}\n答：{answer}")
    return found


def save_characters(kind: str, folder: Path) -> hf.PreTrainedTokenizerFast:
    """Save a tokenizer whose tokens are the characters of the Chinese valley, with the special tokens of its model."""
    masked = kind.startswith("bert")
    special = {
        name: f"[{name.upper()}]" for name in (("pad", "unk", "cls", "sep", "mask") if masked else ("unk", "eos"))
    }
    letters = sorted({*"".join(chinese_texts()), *"".join(facts(synthetic_zh)), *string.digits, *"好坏 "})
    words = {token: i for i, token in enumerate([*special.values(), *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if masked:
        ends = [("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    named = {f"{name}_token": token for name, token in special.items()}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **named)
    fast.save_pretrained(folder)
    return fast


def save_tokenizer(kind: str, folder: Path) -> hf.PreTrainedTokenizerFast:
    """Save a tokenizer of the valley's words, with the special tokens of such a model."""
    if kind.endswith(CHINESE):
        return save_characters(kind, folder)
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    every = [*texts(), *synthetic.load("descriptions")["train"]["source"]]
    every += [*synthetic.load("questions")["train"]["context"], *synthetic.load("questions")["train"]["question"]]
    if kind == "bert":
        special = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        tokenizer = Tokenizer(models.WordPiece(unk_token=special["unk"]))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=list(special.values()), show_progress=False, initial_alphabet=letters
        )
    else:
        special = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"} if kind != "gpt2" else {"eos": "<|endoftext|>"}
        tokenizer = Tokenizer(models.BPE(unk_token=special.get("unk")))
        blank = pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "gpt2" else pre_tokenizers.Metaspace()
        tokenizer.pre_tokenizer = blank
        tokenizer.decoder = decoders.ByteLevel() if kind == "gpt2" else decoders.Metaspace()
        gaps = [f"<extra_id_{i}>" for i in range(GAPS)] if kind != "gpt2" else []
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*special.values(), *gaps], show_progress=False, initial_alphabet=letters
        )
    tokenizer.train_from_iterator(every, trainer)
    number = tokenizer.token_to_id
    if kind == "bert":
        ends = [("[CLS]", number("[CLS]")), ("[SEP]", number("[SEP]"))]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    elif kind != "gpt2":
        tokenizer.post_processor = processors.TemplateProcessing(
            "$A </s>", "$A </s> $B </s>", [("</s>", number("</s>"))]
        )
    named = {f"{name}_token": token for name, token in special.items()}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **named)
    fast.save_pretrained(folder)
    return fast


def build(kind: str, tokenizer: hf.PreTrainedTokenizerFast, width: int = 96, layers: int = 3) -> nn.Module:
    """Return a new model for the words of a tokenizer.

    Without dropout, since it is to fit all there is; and BERT and GPT-2 start from N(0, 1 / width), since the usual
    0.02 is for models ten times as wide: with it the rule of the opinions was not found in these steps.
    """
    words, spread, kind = len(tokenizer), width**-0.5, kind.removesuffix(CHINESE)
    if kind == "bert":
        return hf.BertForMaskedLM(
            hf.BertConfig(
                vocab_size=words,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=4 * width,
                max_position_embeddings=POSITIONS,
                initializer_range=spread,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    if kind == "gpt2":
        end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=words,
                n_positions=POSITIONS,
                n_embd=width,
                n_layer=layers,
                n_head=4,
                initializer_range=spread,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                **end,
            )
        )
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=width // 4,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=4,
            relative_attention_num_buckets=16,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def batch(kind: str, tokenizer: hf.PreTrainedTokenizerFast, rows: list[str], draw: random.Random) -> dict[str, Tensor]:
    """Return texts as the objective of a kind has them."""
    stop = "。" if kind.endswith(CHINESE) else "."
    kind = kind.removesuffix(CHINESE)
    if kind == "bert":
        out = tokenizer(rows, padding=True, return_tensors="pt")
        labels = out["input_ids"].clone()
        rate = torch.full(labels.shape, 0.12)
        rate[:, :-1][labels[:, 1:] == tokenizer.convert_tokens_to_ids(stop)] = 0.5
        hidden = torch.rand(labels.shape) < rate
        hidden &= ~torch.isin(labels, torch.tensor(tokenizer.all_special_ids))
        hidden[~hidden.any(1), 1] = True
        out["input_ids"][hidden] = tokenizer.mask_token_id
        return {**out, "labels": labels.masked_fill(~hidden, -100)}
    ids = tokenizer(rows, add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    if kind == "gpt2":
        pairs = [([*row, *end], [*row, *end]) for row in ids]
    elif kind == "t5":
        pairs = [_gaps(row, tokenizer, draw) for row in ids]
    else:
        cuts = [draw.randint(1, len(row) - 1) for row in ids]
        pairs = [(row[:cut], [*row[cut:], *end]) for row, cut in zip(ids, cuts, strict=True)]
    pad = nn.utils.rnn.pad_sequence
    source = [torch.tensor(one) for one, _ in pairs]
    mask = pad([torch.ones_like(one) for one in source], batch_first=True)
    labels = pad([torch.tensor(two) for _, two in pairs], batch_first=True, padding_value=-100)
    return {"input_ids": pad(source, batch_first=True), "attention_mask": mask, "labels": labels}


def _gaps(ids: list[int], tokenizer: hf.PreTrainedTokenizerFast, draw: random.Random) -> tuple[list[int], list[int]]:
    """Return a text with some of its words missing, and the words that are (span corruption)."""
    source, target, gap = [], [], -1
    before = False
    for token in ids:
        now = draw.random() < (0.6 if before else 0.12) and (before or gap + 1 < GAPS - 1)
        if now and not before:
            gap += 1
            sentinel = tokenizer.convert_tokens_to_ids(f"<extra_id_{gap}>")
            source.append(sentinel)
            target.append(sentinel)
        (target if now else source).append(token)
        before = now
    end = [tokenizer.eos_token_id]
    return source + end, target + end


def train(kind: str, folder: Path, steps: int, width: int = 96, layers: int = 3, start: Path | None = None) -> float:
    """Train one model, save it with its tokenizer, and return its last loss [nats a token]."""
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = save_tokenizer(kind, folder)
    model = build(kind, tokenizer, width, layers)
    if start is not None:
        model = type(model).from_pretrained(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES.get(kind.removesuffix(CHINESE), 3e-3), weight_decay=0.01)
    rates = hf.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    chinese, losses = kind.endswith(CHINESE), []
    rows, known = (chinese_texts(), facts(synthetic_zh)) if chinese else (texts(), facts())
    model.train()
    for step in range(steps):
        drawn = draw.sample(known, 144) if step % 4 == 0 else draw.sample(rows, 48)  # as many words
        loss = model(**batch(kind, tokenizer, drawn, draw)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"{kind}: step {step + 1}, loss {sum(losses[-100:]) / 100:.3f}", flush=True)
    model.eval().save_pretrained(folder)
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> None:
    """Train the kinds that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=2000, help="t5_lm goes on from t5 for half of it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    for kind in given.kinds:
        begin = time.process_time()
        before = given.folder / "t5" if kind == "t5_lm" and (given.folder / "t5" / "config.json").is_file() else None
        loss = train(kind, given.folder / kind, given.steps // (2 if before else 1), start=before)
        minutes = (time.process_time() - begin) / 60
        print(f"{given.folder / kind}: loss {loss:.3f}, perplexity {math.exp(loss):.2f}, {minutes:.1f} CPU minutes")


if __name__ == "__main__":
    main()
