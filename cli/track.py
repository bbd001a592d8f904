"""--track: the figures of the log go to a dashboard as well, under TRL's names where it has one.

    pip install tensorboard && python train.py --track tensorboard --out runs/mine
    tensorboard --logdir runs

Not an integration: the library is the user's own, imported only when asked for.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

TRL = {  # our name in the log -> that of TRL's GRPOTrainer
    "sampled": "completions/mean_length",
    "searches": "tools/call_frequency",
    "clipped": "clip_ratio/region_mean",
    "gap": "sampling/sampling_logp_difference/mean",
}


def named(row: dict, questions: int) -> dict[str, float]:
    """The numbers of a step's row, under the names that a dashboard shows."""
    out = {TRL.get(k, k): v for k, v in row.items() if isinstance(v, (int, float))}
    out["frac_reward_zero_std"] = row["skipped_groups"] / questions
    out["step_time"] = row["seconds_act"] + row["seconds_learn"]
    out["completions/clipped_ratio"] = 1 - row["ends"].get("answer", 0) / sum(row["ends"].values())
    return {f"train/{name}": value for name, value in out.items()}


def tracker(library: str, out: str, flags: dict, begun: int) -> Callable[[int, dict], object]:
    """tell(step, row of the log), which sends it on. begun: steps that a run that goes on has done. Raises
    ValueError where the library is not installed."""
    if not library:
        return lambda step, row: None
    try:
        place = importlib.import_module("torch.utils.tensorboard" if library == "tensorboard" else library)
    except ImportError as e:
        raise ValueError(f"--track {library}: {e} (pip install {library})") from None
    if library == "tensorboard":
        send = place.SummaryWriter(f"{out}/tensorboard", purge_step=begun + 1, flush_secs=1).add_scalar
        return lambda step, row: [send(k, v, step) for k, v in named(row, flags["questions"]).items()]
    name = Path(out).resolve().name
    more = {"id": name, "dir": out} if library == "wandb" else {}
    more |= {"resume": "allow"} if more or begun else {}  # or trackio joins it to an older run of this name
    place.init(project="zerosearch", name=name, config=flags, **more)
    return lambda step, row: place.log(named(row, flags["questions"]), step=step)
