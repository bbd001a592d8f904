"""Pre-train the toy task's body from scratch and make its tokenizer: about 20 minutes on one core.

The body is a Qwen2-shaped network of 0.9 million parameters. It is to the toy task what an instruct model is
to real ones. Not the simulator's fine-tuning, and not the RL run: train.py does both.

    python -m toy.make               write toy/body/; after an interruption, the same command resumes
    python -m toy.make --show        print a training text of each kind
    python -m toy.make --again 300 --retries .02 --out runs/hasty     its last steps again, with other texts
"""

import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken

import weights
from cli import screen
from cli.disk import load_state, pack_optimizer, save_state, unpack_optimizer
from cli.parser import Flag, parse, with_defaults
from model import REFERENCE, Config, Model
from prepare.sft import Example, batches
from tokenizer import BYTE, Tokenizer

from . import texts
from .texts import Piece, drill, practice, reading, recall, simulation, transcript
from .words import END, LABELS, LEXICON, TAGS

BODY = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128}
BODY |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384}
BODY |= {"hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1000.0}
BODY |= {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
HOME = Path(__file__).parent / "body"
TOKENS = 4096  # per step
MICRO = 1536  # of a micro-batch, with padding
SAVE = 100  # steps between saved states
# (steps, the share of tokens of each kind of text): copying, then reading, then everything
STAGES = [
    (150, {recall: 1.0}),
    (200, {reading: 1.0}),
    (1450, {reading: 0.10, transcript: 0.25, simulation: 0.40, drill: 0.25}),
    (700, {reading: 0.05, transcript: 0.20, simulation: 0.40, practice: 0.35}),
]
STEPS = sum(steps for steps, _ in STAGES)
CLOSING = 1500  # steps at the end, in which the learning rates fall to 0
MUON_LR, ADAM_LR = 0.02, 0.015


def make_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges in rank order that make each word one token: known ones first, then from the left."""
    letters, merges = {byte: letter for letter, byte in BYTE.items()}, {}
    for word in words:
        parts = [letters[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: merges.get(pair, math.inf))  # the first, if none is a merge
            merges.setdefault(best, len(merges))
            i = pairs.index(best)
            parts[i : i + 2] = ["".join(best)]
    return list(merges)


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with the world's words as tokens."""
    merges = make_merges(LEXICON)
    tokens = [*sorted(BYTE), *map("".join, merges)]
    bpe = tokenizers.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    tok = tokenizers.Tokenizer(bpe)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tok.add_tokens([AddedToken(word, special=False, normalized=False) for word in TAGS + LABELS])
    path.mkdir(parents=True, exist_ok=True)
    tok.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 1024}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tok: Tokenizer, pieces: list[Piece]) -> Example:
    """Pieces -> ids, piece by piece."""
    parts = [(tok.encode(text, special=True), learn) for text, learn in pieces]
    return Example([i for ids, _ in parts for i in ids], [learn for ids, learn in parts for _ in ids])


def texts_of(tok: Tokenizer, step: int, seed: int) -> Iterator[Example]:
    """The texts of one step: a function of (seed, step) alone, so that a resumed run sees the same."""
    for kind, share in [mixture for steps, mixture in STAGES for _ in range(steps)][step].items():
        rng, left = random.Random(f"{seed} {step} {kind.__name__}"), int(TOKENS * share)
        while left > 0:
            text = encode(tok, kind(rng))
            yield text
            left -= len(text.ids)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings, norms and biases."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and name != "embed" else others).append(p.requires_grad_(True))
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0)
    return [muon, torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def train_step(model: Model, tok: Tokenizer, opts: list, step: int, seed: int) -> tuple[float, int]:
    """One step of pre-training -> mean loss (nats per learned token), tokens seen."""
    texts = list(texts_of(tok, step, seed))
    count, total = sum(sum(t.mask) for t in texts), 0.0
    for batch in batches(texts, MICRO):
        T = max(len(t.ids) for t in batch)
        ids = torch.tensor([t.ids + [0] * (T - len(t.ids)) for t in batch])  # (B, T)
        learned = torch.tensor([t.mask + [0] * (T - len(t.ids)) for t in batch]).bool()[:, 1:]  # (B, T - 1)
        h = model(ids, REFERENCE)[:, :-1][learned]  # (N, d)
        loss = F.cross_entropy(model.logits(h), ids[:, 1:][learned], reduction="sum") / count
        loss.backward()
        total += loss.item()
    rate = min(1.0, (step + 1) / 50, (STEPS - step) / CLOSING)
    for opt, lr in zip(opts, (MUON_LR, ADAM_LR)):
        opt.param_groups[0]["lr"] = lr * rate
        opt.step()
        opt.zero_grad()
    return total, sum(len(t.ids) for t in texts)


@torch.no_grad()
def reading_accuracy(model: Model, tok: Tokenizer, n: int = 64, seed: int = 0) -> float:
    """The share of objects (UNKNOWN among them) that the body reads off fresh facts, greedily."""
    rng, right = random.Random(f"exam {seed}"), []
    for _ in range(n):
        text = encode(tok, reading(rng))
        ids, learned = text.ids, text.mask
        said = model.logits(model(torch.tensor([ids]), REFERENCE)[0]).argmax(-1).tolist()  # (T,)
        right += [said[i - 1] == ids[i] for i in range(1, len(ids)) if learned[i] and not learned[i - 1]]
    return sum(right) / len(right)


def make(out: Path, seed: int = 0, again: int = 0) -> None:
    """Train the body from scratch, or from the state in `out`; again: the finished one, for so many of its
    last steps. Raises ValueError for the state of another seed."""
    write_tokenizer(out)
    tok, state = Tokenizer.load(out), out / "training.safetensors"
    end = tok.encode(END, special=True)[0]
    config = BODY | {"vocab_size": tok.vocab_size, "eos_token_id": end, "pad_token_id": end}
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": end}, indent=2) + "\n")
    model = weights.load(HOME, torch.float32) if again else Model(Config.from_hf(config)).init(seed, std=0.05)
    opts, first = optimizers(model), STEPS - again if again else 0
    if state.exists():
        tensors, facts = load_state(state)
        if facts["seed"] != seed:
            raise ValueError(f"{state} has --seed {facts['seed']}: resume with the same, or delete it")
        first = facts["step"]
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        for i, opt in enumerate(opts):
            unpack_optimizer(opt, tensors, f"optimizer{i}.")
    began, seen = time.monotonic(), 0
    for step in range(first, STEPS):
        loss, tokens = train_step(model, tok, opts, step, seed)
        seen += tokens
        done, spent = step + 1, time.monotonic() - began
        if done % 50 == 0 or done == STEPS:
            reads = f"   reads {reading_accuracy(model, tok):.3f}" if done % 200 == 0 else ""
            pace = f"{seen / spent:,.0f} tokens/s   {spent / (done - first) * (STEPS - done):.0f} s left"
            print(f"step {done:5d}/{STEPS}   loss {loss:.3f}   {pace}{reads}", flush=True)
        if done % SAVE == 0:
            tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
            for i, opt in enumerate(opts):
                tensors |= pack_optimizer(opt, f"optimizer{i}.")
            save_state(state, tensors, {"step": done, "seed": seed})
    weights.save_model(model.to(torch.bfloat16), out)
    state.unlink(missing_ok=True)


FLAGS = {
    "the body": [
        Flag("out", str, str(HOME), "where to write the body", "DIR"),
        Flag("seed", int, 0, "of the weights and texts", least=0),
        Flag("again", int, 0, "instead: so many of the last steps again, from the finished body", least=0),
        Flag("retries", float, texts.RETRY, "share of searches without a find that agents repeat", most=1),
        Flag("show", bool, False, "only print a training text of each kind"),
    ]
}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)  # with more, sums in another order would give another body
    args = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    other = args.again or args.retries != texts.RETRY
    if other and Path(args.out).resolve() == HOME.resolve() and not args.show:
        raise ValueError("another body than the shipped one needs a place of its own: --out DIR")
    texts.RETRY = args.retries
    if args.show:
        rng = random.Random(args.seed)
        for kind in (recall, reading, transcript, simulation, drill, practice):
            print(f"-- {kind.__name__}: {kind.__doc__.splitlines()[0]}")
            print("".join(text for text, _ in kind(rng)) + "\n")
    else:
        make(Path(args.out), args.seed, args.again)


if __name__ == "__main__":
    screen.run(main)
