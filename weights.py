"""Weights on disk: bodies (base models) as Hugging Face directories, adapters in PEFT's format.

Loading is strict: a tensor that is missing, unexpected or of another shape is an error of one line.

Not a converter: tensors keep their Hugging Face names, which here stand for views of the network's fused
matrices. The network itself is in model.py.

    body = load("Qwen/Qwen2.5-3B-Instruct")           # a preset, a directory or a hub id
    load_adapter(body, POLICY, "runs/mine/policy")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cli.disk import made, read_json, save_tensors, write_json
from model import Adapter, Config, Model

PRESETS = {"tiny": str(Path(__file__).resolve().parent / "toy" / "body")}
PRESETS |= {
    f"{family}{size}{kind}": f"{hub}{size.upper()}{end}"
    for family, hub, sizes, ends in (
        ("", "Qwen/Qwen2.5-", ("0.5b", "1.5b", "3b", "7b", "14b"), ("-Instruct", "")),
        ("qwen3-", "Qwen/Qwen3-", ("0.6b", "1.7b", "4b", "8b", "14b"), ("", "-Base")),
        ("llama-", "meta-llama/Llama-3.2-", ("1b", "3b"), ("-Instruct", "")),
    )
    for kind, end in zip(("", "-base"), ends)
    for size in sizes
}

# --------------------------------------------------------------------------------------------------- adapters


def _peft_tensors(model: Model, adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's names -> views of the adapter's vector."""
    out, pieces = {}, iter(adapter.pieces(list(model.linears())))
    for i, layer in enumerate(model.layers):
        for linear in layer.linears():
            A, Bs = next(pieces)
            for part, a, b in zip(linear.parts, A.split(adapter.rank), Bs):
                name = f"base_model.model.model.layers.{i}.{_home(part)}.{part}"
                out[name + ".lora_A.weight"], out[name + ".lora_B.weight"] = a.detach(), b.detach()
    return out


def _home(part: str) -> str:
    return "mlp" if part in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def save_adapter(model: Model, role: int, path: str | Path, base: str = "") -> None:
    """Write a role's adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base: the body's name (preset, directory or hub id), recorded so that PEFT finds the body.
    """
    path, adapter = made(Path(path)), model.roles[role]
    parts = [part for linear in model.layers[0].linears() for part in linear.parts]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name(base)}
    config |= {"r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none"}
    config |= {"target_modules": parts, "inference_mode": True}
    tensors = {k: v.cpu().contiguous() for k, v in _peft_tensors(model, adapter).items()}
    save_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(path / "adapter_config.json", config)


def base_name(name: str) -> str:
    """A body's name as other programs resolve it: the hub id of a preset, the full path of a directory."""
    name = PRESETS.get(name, name)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


UNSUPPORTED = "use_dora use_rslora rank_pattern alpha_pattern modules_to_save fan_in_fan_out"


def load_adapter(model: Model, role: int, path: str | Path) -> None:
    """Read a PEFT LoRA adapter into a role. Modules that it does not adapt get B = 0.

    Raises ValueError if the adapter needs what is not implemented here, or does not fit the body.
    """
    path = Path(path)
    c = read_json(path / "adapter_config.json", "a PEFT adapter directory", r=int, lora_alpha=(int, float))
    for key in UNSUPPORTED.split():
        if c.get(key):
            raise ValueError(f"{path}: the adapter sets {key}, which is not supported")
    if c.get("peft_type") != "LORA" or c.get("bias", "none") != "none":
        raise ValueError(f"{path}: only plain LoRA adapters without trained biases are supported")
    file = path / "adapter_model.safetensors"
    ranks = {shape[0] for name, shape in _shapes(file).items() if ".lora_A." in name and shape}
    if ranks != {c["r"]} or not 0 <= c["lora_alpha"] < 1e30:
        told = f"r {c['r']} and lora_alpha {c['lora_alpha']}, its matrices have the ranks {sorted(ranks)}"
        raise ValueError(f"{path}: adapter_config.json says {told}")
    model.add_role(role, c["r"], c["lora_alpha"])
    mine = _peft_tensors(model, model.roles[role])
    for name, theirs in _read_safetensors(file):
        if name not in mine:
            raise ValueError(f"{path}: {name} adapts a module that this body does not have")
        _copy(theirs, mine[name], f"{path}: {name}")
    if not model.adapter(role).isfinite().all():
        raise ValueError(f"{path} holds NaN or infinity: take an earlier adapter")


def _copy(theirs: Tensor, mine: Tensor, what: str) -> None:
    if theirs.shape != mine.shape:
        raise ValueError(
            f"{what} is {tuple(theirs.shape)}, the body's config.json implies {tuple(mine.shape)}"
        )
    mine.copy_(theirs)


# ----------------------------------------------------------------------------------------------------- bodies


def resolve(name: str | Path) -> Path:
    """A preset, a local directory or a hub id -> a local directory. Raises ValueError if there is none."""
    name = str(name)
    where = PRESETS.get(name, name)
    if Path(where).is_dir():
        return Path(where)
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        presets = " ".join(PRESETS)
        raise ValueError(f"no checkpoint {name!r}: give a directory, a hub id, or a preset: {presets}")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(where, allow_patterns=wanted))
    except Exception as e:  # the hub client raises dozens of types for one failure
        why = f"{str(e).strip().splitlines()[0]}. A local directory works without a network"
        raise ValueError(f"could not download {where!r}: {why}") from None


def load(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bits: int = 0,
) -> Model:
    """Load a body, strictly: no tensor may be missing, unexpected or of another shape.

    name: a preset, a directory or a hub id. bits: 8 or 4 for the linears, which are quantised one tensor at a
    time as they are read. Raises ValueError that says what is wrong with the checkpoint.
    """
    path = resolve(name)
    config = Config.from_hf(read_json(path / "config.json", "a checkpoint directory"))
    shapes = {name: shape for file in _shards(path) for name, shape in _shapes(file).items()}
    widest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    if config.layers > len(shapes) or max(config.vocab, config.d, config.ffn, config.heads) > widest:
        raise ValueError(f"{path}/config.json describes a larger network than the weights there")
    with torch.device("meta"):
        model = Model(config)
    if bits:
        model.quantise(bits, device)
    model = model.to(dtype).to_empty(device=device)
    if model.device.type == "cpu" and not bits:  # stored transposed, small matmuls are a third faster there
        for linear in model.linears():
            linear.weight.data = linear.weight.data.t().contiguous().t()
    model.rotary()
    mine = hf_tensors(model)
    missing = set(mine)
    for file in _shards(path):
        for key, theirs in _read_safetensors(file):
            if key in mine:
                _copy(theirs, mine[key], f"{file}: {key}")
                missing.discard(key)
            elif not (key.endswith("rotary_emb.inv_freq") or (config.tied and key == "lm_head.weight")):
                raise ValueError(f"{file}: unexpected tensor {key}: not a plain {config.family} checkpoint")
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(mine)} tensors are missing, e.g. {min(missing)}")
    for linear in model.linears() if bits else ():
        linear.weight.pack()
    model.round_head()
    return model.eval()


def hf_tensors(model: Model) -> dict[str, Tensor]:
    """Hugging Face's names -> views of this body's tensors (fused matrices are split into their parts)."""
    out = {"model.embed_tokens.weight": model.embed.data, "model.norm.weight": model.norm.data}
    if model.untied is not None:
        out["lm_head.weight"] = model.untied.data
    for i, layer in enumerate(model.layers):
        pre = f"model.layers.{i}."
        out[pre + "input_layernorm.weight"] = layer.norm_1.data
        out[pre + "post_attention_layernorm.weight"] = layer.norm_2.data
        if model.config.qk_norm:
            out[pre + "self_attn.q_norm.weight"] = layer.q_norm.data
            out[pre + "self_attn.k_norm.weight"] = layer.k_norm.data
        for linear in layer.linears():
            matrix = linear.weight.data if isinstance(linear.weight, Tensor) else linear.weight
            held = {"weight": matrix} | ({} if linear.bias is None else {"bias": linear.bias.data})
            for kind, x in held.items():
                for part, view in zip(linear.parts, x.split(list(linear.parts.values()))):
                    out[f"{pre}{_home(part)}.{part}.{kind}"] = view
    return out


def save_model(model: Model, path: str | Path) -> None:
    """Write config.json and model.safetensors as a Hugging Face directory."""
    path = made(Path(path))
    write_json(path / "config.json", model.config.hf)
    tensors = {k: v.cpu().contiguous().clone() for k, v in hf_tensors(model).items()}
    save_tensors(path / "model.safetensors", tensors, {"format": "pt"})


def _shards(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    names = read_json(index, "a sharded checkpoint", weight_map=dict)["weight_map"].values()
    if not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ValueError(f"{index}: a shard must be the name of a file beside it")
    names = sorted(set(names))
    absent = [n for n in names if not (path / n).exists()]
    if absent:
        raise ValueError(f"{path}: the shard {absent[0]} is missing: download the checkpoint again")
    return [path / n for n in names]


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    if not file.exists():
        raise ValueError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f"{file} is corrupt ({e}): download it again") from None


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened(file) as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            yield name, f.get_tensor(name)


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors, from its header alone: what is there bounds what is made for it."""
    with _opened(file) as f:
        return {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118
