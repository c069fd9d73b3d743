"""Working directories on gs://, through epath and fsspec as on Cloud TPU; only the bucket is a local directory.

Orbax speaks to Google's servers by itself, so stages that write checkpoints are not among these.
"""

import csv
import io
import sys

import jax
import numpy as np
import pytest
from etils import epath
from finetune_helpers import make_world, write_config
from fsspec.implementations.local import LocalFileSystem

from unidetox_jax import checkpoint, cli

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket as a local directory."""

    class Bucket(LocalFileSystem):
        protocol = "gs"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            text = str(path)
            return f"{tmp_path}/objects/{text.removeprefix('gs://')}" if text.startswith("gs://") else text

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)  # as epath calls it
    return epath.Path("gs://bucket")


def test_a_model_goes_to_a_bucket_and_comes_back(bucket, tmp_path):
    world = make_world(tmp_path / "world")
    model = checkpoint.load(world / "weights" / "llama")
    checkpoint.save_hf(bucket / "model", model, checkpoint.load_tokenizer(world / "weights" / "llama"))
    checkpoint.save_hf(bucket / "model", model)  # again, in place of the first
    again = checkpoint.load(bucket / "model")
    assert again.cfg == model.cfg
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_stage_works_in_a_bucket(bucket, tmp_path, capsys):
    world = make_world(tmp_path / "world")
    write_config(
        tmp_path / "config.py", base=f"{world}/weights/gpt2", distill__models=("base", f"{world}/weights/gpt2"),
        mesh="data:-1", distill__num_texts=6, distill__batch_size=4, distill__max_length=12,
    )  # fmt: skip
    command = ["distill", f"--config={tmp_path}/config.py", f"--workdir={bucket}/run"]
    assert cli.main(command) == 0, capsys.readouterr().err
    content = (bucket / "run" / "distilled" / "texts.csv").read_text()
    assert len(list(csv.DictReader(io.StringIO(content)))) == 6
    assert sorted(path.name for path in (bucket / "run" / "distilled").iterdir()) == [
        "README.md", "stage.json", "texts.csv", "texts.jsonl",
    ]  # fmt: skip
    capsys.readouterr()
    assert cli.main(command) == 0 and "complete already" in capsys.readouterr().err
    assert cli.main([*command, "--config.distill.seed=5"]) == 2
    assert "settings.seed" in capsys.readouterr().err
