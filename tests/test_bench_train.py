"""The training benchmark on a tiny model, beside PyTorch."""

import json

import pytest
from test_distill import SENTENCES

from unidetox_jax import cli
from unidetox_jax.data import toymodels

CONFIG = """
from unidetox_jax.stages import settings


def get_config():
    config = settings.default_config()
    config.mesh = "data:-1"
    config.bench.update(what=("train",), model={model!r}, train_batch_sizes=(8,), steps=2, train_length=24)
    return config
"""


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("texts", ["random", "real"])
def test_training_beside_pytorch(capsys, tmp_path, texts):
    pytest.importorskip("torch")
    toymodels.write(tmp_path, SENTENCES)
    (tmp_path / "config.py").write_text(CONFIG.format(model=str(tmp_path / "gpt2")))
    unequal = [" ".join(text.split()[: 2 + index % 5]) for index, text in enumerate(SENTENCES)]
    (tmp_path / "texts.txt").write_text("\n".join(unequal))
    options = [f"--config={tmp_path / 'config.py'}", "--config.bench.against_torch=True"]
    options += [f"--config.bench.data=text:{tmp_path / 'texts.txt'}"] if texts == "real" else []
    assert cli.main(["bench", *options]) == 0
    ours, theirs = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (ours["implementation"], theirs["implementation"]) == ("jax", "torch")
    assert ours["times_torch"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    for row in (ours, theirs):
        assert row["examples_per_second"] == pytest.approx(2 * 8 / row["seconds"])
        tokens = row["tokens_per_second"] * row["seconds"]
        assert row["flops"] > 6 * tokens * 1000 and 0 < row["mfu"] < 1.5
        assert (tokens == pytest.approx(2 * 8 * 24)) if texts == "random" else tokens < 2 * 8 * 24
    if texts == "real":
        assert theirs["padded_share"] > 0 and theirs["layout"] == "longest"
    assert ours["compile_seconds"] > 0 and ours["program_gigabytes"] > 0
