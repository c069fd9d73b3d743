"""A small world with tiny models of four families, with weights, and `unidetox` in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
import zlib

import jax
import numpy as np

from unidetox_jax import checkpoint, models
from unidetox_jax.data import toyworld

ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTH = 32  # one length of row, so that a model's training is one program
SMALL = {
    "gpt2": {"n_embd": 32, "n_head": 2, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2},
    "falcon": {"hidden_size": 32, "num_attention_heads": 2},
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip


def make_world(directory: pathlib.Path) -> pathlib.Path:
    """The built-in world, small: its files, models/NAME (config, tokenizer) and weights/NAME (whole models)."""
    sizes = toyworld.Sizes(train=300, valid=16, scorer=1, toxic=60, toxic_dev=8, labelled=1, prompts_per_category=1)
    toyworld.write(directory, 0, sizes)
    for name, changes in SMALL.items():
        path = directory / "models" / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        cfg = models.config_from_hf(path.parent)
        params = models.init(cfg, jax.random.key(zlib.crc32(name.encode())))
        tokenizer = checkpoint.load_tokenizer(path.parent)
        checkpoint.save_hf(directory / "weights" / name, models.Model(params, cfg), tokenizer)
    return directory


def write_config(path: pathlib.Path, **fields) -> pathlib.Path:
    """A configuration file; `toxify__steps=3` sets config.toxify.steps."""
    lines = [
        "from unidetox_jax.stages import settings",
        "def get_config():",
        "    nan = float('nan')",
        "    c = settings.default_config()",
    ]
    lines += [f"    c.{name.replace('__', '.')} = {value!r}" for name, value in fields.items()]
    path.write_text("\n".join([*lines, "    return c", ""]))
    return path


def training(world: pathlib.Path, stage: str, **changes) -> dict:
    """Fields of a stage that trains quickly: one shape, few steps."""
    texts = {
        "toxify": f"dghs?file={world}/toxic.jsonl",
        "detoxify": "",
        "pretrain": f"jsonl:{world}/train.jsonl",
    }
    fields = {
        "data": texts[stage], "validation": f"jsonl:{world}/valid.jsonl", "steps": 4, "batch_size": 8,
        "learning_rate": 1e-3, "max_length": LENGTH, "layout": "pad", "save_minutes": 0.0, "evaluate_every": 2,
        "log_every": 1,
    }  # fmt: skip
    return {f"{stage}__{name}": value for name, value in {**fields, **changes}.items()}


def make_distilled(directory: pathlib.Path, world: pathlib.Path, count: int = 24) -> None:
    """What `distill` leaves, with the world's own texts in it."""
    directory.mkdir(parents=True)
    lines = (world / "train.jsonl").read_text().splitlines()[:count]
    rows = [{"text": json.loads(line)["text"], "ended": index % 2 == 0} for index, line in enumerate(lines)]
    (directory / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "stage.json").write_text(json.dumps({"stage": "distill", "settings": {}, "inputs": {}}))


def start(*arguments, file_kib: int | None = None, capture: bool = False, **surroundings: str) -> subprocess.Popen:
    """`unidetox …` as a process with one CPU device and this tree's code.

    file_kib: no file that it writes can grow beyond. capture: what it prints as well as its errors. surroundings:
    more of its environment.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
    command = [sys.executable, "-m", "unidetox_jax.cli", *map(str, arguments)]
    if file_kib is not None:
        command = ["bash", "-c", f'ulimit -f {file_kib}; exec "$@"', "unidetox", *command]
    stdout = subprocess.PIPE if capture else None
    return subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


def chance(texts) -> np.ndarray:
    """A toxicity scorer that finds about half of any texts toxic: by a hash of each."""
    return np.array([zlib.crc32(text.encode()) / 2**32 for text in texts])


def lines_of(directory: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The exported model's tensors."""
    from safetensors.numpy import load, load_file  # `load` does not know bfloat16

    path = directory / "hf" / "model.safetensors"
    return load(path.read_bytes()) if "://" in str(path) else load_file(path)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two models are the same, bit for bit."""
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def torch_loss(model, tokenizer, texts, length, ended=None) -> float:
    """PyTorch's mean loss over all targets, one text at a time; a text that ended is closed by an end token."""
    import torch

    total = targets = 0
    for index, text in enumerate(texts):
        end = [tokenizer.eos_token_id] if ended is None or ended[index] else []
        ids = torch.tensor([[*tokenizer(text)["input_ids"], *end][:length]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    return total / targets
