"""The benchmark command on tiny models, and its bounds compared with NumPy's."""

import json
import sys
import types

import jax
import numpy as np
import pytest
from test_distill import SENTENCES

from unidetox_jax import cli, devices, models
from unidetox_jax.benchmarks import bench, decode, timing
from unidetox_jax.data import toymodels

CONFIG = """
from unidetox_jax.stages import settings


def get_config():
    config = settings.default_config()
    config.mesh = "data:-1"
    config.bench.update(what=("decode",), model={model!r}, batch_sizes=(8,), new_tokens=5, repeats=1)
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    toymodels.write(place, SENTENCES)
    (place / "config.py").write_text(CONFIG.format(model=str(place / "gpt2")))
    return place / "config.py"


def rows_of(printed):
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_decoding_beside_pytorch(config, capsys):
    pytest.importorskip("torch")
    assert cli.main(["bench", f"--config={config}", "--config.bench.against_torch=True"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert [(row["batch"], row.get("layer_loop", row["implementation"])) for row in rows] == [
        (8, name) for name in ("unroll", "scan", "torch")
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 5 / row["seconds"])
        assert row["ms_per_step"] == pytest.approx(200 * row["seconds"])
        shares = row["bandwidth_share"], row["matmul_share"]
        assert all(0 < share < 1.5 for share in shares), row
    ours, theirs = rows[0], rows[2]
    assert ours["times_torch"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert ours["compile_seconds"] > 0 and ours["program_gigabytes"] > 0
    assert [row["default"] for row in rows if "default" in row] == [True, False]
    header = next(line for line in printed.splitlines() if "tokens_per_second" in line)
    assert "times_torch" in header and len([line for line in printed.splitlines() if line[:1] == " "]) == 3


def test_contenders_do_the_same_work(config):
    """JAX and PyTorch both generate all requested tokens."""
    pytest.importorskip("torch")
    cfg = models.config_from_hf(str(config.parent / "gpt2"))
    pair = [models.Model(models.init(cfg, jax.random.key(i)), cfg) for i in range(2)]
    torch_pair = [timing.torch_model(cfg, cfg.dtype).eval() for _ in range(2)]
    assert decode._generate(pair, 3, 5, 0).lengths.tolist() == [5] * 3
    assert decode._generate_torch(torch_pair, cfg, 3, 5, 0).shape == (3, 6)


def test_measured_bounds_agree_with_numpy():
    """Bytes per second of a copy and FLOPs per second of a product, within the margin that a busy machine needs."""
    large = np.ones(1 << 26, np.float32)
    seconds = devices.fastest(lambda: np.multiply(large, np.float32(1.0001), out=large))
    assert 0.02 < devices.copy_bandwidth() / (2 * large.nbytes / seconds) < 50
    matrix = np.ones((1024, 1024), np.float32)
    seconds = devices.fastest(lambda: matrix @ matrix)
    assert 0.02 < devices.matmul_rate("float32") / (2 * 1024**3 / seconds) < 50


def test_benchmark_is_dispatched_by_name(config, capsys, monkeypatch):
    stand_in = types.ModuleType("stand_in")
    stand_in.measure = lambda run: [{"benchmark": "train", "batch": run.bench.train_batch_sizes[0], "x": 1.23456789}]
    monkeypatch.setitem(sys.modules, "stand_in", stand_in)
    monkeypatch.setitem(bench.BENCHMARKS, "train", "stand_in")
    assert cli.main(["bench", f"--config={config}", "--config.bench.what=('train',)"]) == 0
    printed = capsys.readouterr().out
    assert rows_of(printed) == [{"benchmark": "train", "batch": 4, "x": 1.23456789}]
    assert "1.235" in printed


@pytest.mark.quick_variants(3)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("what=('decod',)", "config.bench.what: no benchmark 'decod'; did you mean 'decode'?"),
        ("repeats=0", "config.bench.repeats: found 0, expected at least 1"),
        ("model=nowhere/at/all", "nowhere/at/all: no such directory"),
        ("new_tokens=128", "context of model 0 (gpt2) is 128"),
    ],
)
def test_mistakes(config, capsys, change, expected):
    assert cli.main(["bench", f"--config={config}", f"--config.bench.{change}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unidetox:")]
    assert len(lines) == 1 and expected in lines[0]


def test_table_marks_missing_values():
    lines = bench.table([{"a": 1, "b": 2.0}, {"a": 10}]).splitlines()
    assert lines == [" a  b", " 1  2", "10  -"]


def test_default_configuration_is_the_published_benchmark():
    config = cli.load_config("configs/bench.py").bench
    assert (config.model, tuple(config.batch_sizes), config.new_tokens) == ("openai-community/gpt2", (16, 64), 128)
