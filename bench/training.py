"""Our learner beside TRL's, each in a process of its own."""

import io
import multiprocessing
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

import torch

from model import POLICY

from .timing import Row, Run, absent, forget_peak, now, peak, progress, timed, versus
from .work import DEVICE, SHORT, Body, Lesson, installed, learner, rewards


def training(p: Run) -> Iterator[Row]:
    """A whole update against TRL's GRPOTrainer with PEFT's LoRA of rank 16 on all seven matrices, fp32.
    Neither samples, so the packed copies of the weights that our engine makes on a CPU are not in the
    peak."""
    for b in p.bodies(torch.float32):
        full = Lesson(questions=2, steps=5) if b == Body() else Lesson()
        for recompute in p.few((True,), (True, False)):
            name = f"{b}, activations {'computed again' if recompute else 'kept'}"
            if installed("trl", "peft", "datasets"):
                yield from update(p, name, b, p.few(SHORT, full)._replace(recompute=recompute))
            else:
                yield absent(name)


def update(p: Run, name: str, b: Body, lesson: Lesson) -> Iterator[Row]:
    """The rows of time and of memory, from two runs of each side (one with --quick), alternating."""
    sides: tuple[list[dict], list[dict]] = ([], [])
    for _ in range(p.few(1, 2)):
        for side, f in zip(sides, (train_ours, train_theirs)):
            progress("training", name, f.__name__)
            side.append(apart(f, b, lesson))
    tokens = {r["tokens"] for side in sides for r in side}
    assert len(tokens) == 1, f"not the same work: {tokens} trained tokens"
    spans = tuple([s for r in side for s in r["seconds"]] for side in sides)
    yield versus(f"{name}: a step", spans, note=f"{tokens.pop():,} trained tokens, KL {lesson.kl}")
    peaks = [t["peak"] / o["peak"] for o, t in zip(*sides) if o["peak"]]
    if peaks and (p.quick or b.name != "toy"):  # the toy's activations take less memory than the libraries
        shown = (f"{statistics.median(r['peak'] for r in side) / 2**20:,.0f} MiB" for side in sides)
        spread = (min(peaks), max(peaks))
        yield Row(f"{name}: peak memory", *shown, statistics.median(peaks), spread, "above the loaded body")


def apart(f: Callable[[Body, Lesson], dict], b: Body, lesson: Lesson) -> dict:
    """f in a process of its own: seconds of each step, peak bytes above the loaded body, trained tokens."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(f, (b, lesson))


def train_ours(b: Body, lesson: Lesson) -> dict:
    torch.set_num_threads(b.threads)
    body = b.ours()
    base = forget_peak()
    body.add_role(POLICY, rank=16, alpha=32)
    ts = lesson.trajectories(body.config.vocab)
    tokens = lesson.micro * max(len(t.ids) for t in ts)
    update = learner(body, ts, lesson.group, tokens, lesson.kl, lesson.recompute)
    health: dict[str, float] = {}
    spans = [timed(lambda: health.update(update())) for _ in range(1 + lesson.steps)]
    return {"seconds": spans[1:], "peak": peak() - base, "tokens": health["trained_tokens"]}


def train_theirs(b: Body, lesson: Lesson) -> dict:
    """The same with TRL. Its public `rollout_func` returns our trajectories instead of sampling (`env_mask`
    says which tokens are the policy's), so a step is all that TRL does except generation: the reference's
    log-probs, micro-batches, loss, backward pass, clipping, AdamW."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "1"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(b.threads)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    body = b.theirs()
    base, began, ended, cut = forget_peak(), [], [], lesson.prompt
    ts = lesson.trajectories(body.config.vocab_size)

    def rollout(prompts, trainer) -> dict:
        began.append(now())
        return {
            "prompt_ids": [t.ids[:cut] for t in ts],
            "completion_ids": [t.ids[cut:] for t in ts],
            "logprobs": [t.logps[cut:] for t in ts],
            "env_mask": [t.mask[cut:] for t in ts],
        }

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            ended.append(now())

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        trainer = GRPOTrainer(
            body,
            reward_funcs=lambda completions, **_: rewards(len(completions)),
            args=GRPOConfig(out, **trl_flags(lesson, sum(len(t.ids) for t in ts))),
            train_dataset=Dataset.from_dict({"prompt": ["x"] * 8 * len(ts)}),
            processing_class=AutoTokenizer.from_pretrained(b.home),
            peft_config=lora,
            rollout_func=rollout,
            callbacks=[Watch()],
        )
        trainer.train()
    spans = [b - a for a, b in zip(began, ended)]
    return {"seconds": spans[1:], "peak": peak() - base, "tokens": sum(sum(t.mask) for t in ts)}


def trl_flags(lesson: Lesson, longest: int) -> dict:
    """The same lesson as TRL's arguments, with nothing saved, reported or shown."""
    n = lesson.questions * lesson.group
    size = {"per_device_train_batch_size": lesson.micro, "gradient_accumulation_steps": n // lesson.micro}
    loss = {"num_generations": lesson.group, "beta": lesson.kl, "learning_rate": 1e-5}
    limits = {"max_completion_length": longest, "max_steps": 1 + lesson.steps}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
    device = {"gradient_checkpointing": lesson.recompute, "bf16": False, "use_cpu": DEVICE == "cpu"}
    return size | loss | limits | quiet | device
