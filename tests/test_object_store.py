"""Directories on gs://, in an emulator of Google Cloud Storage; `test_run.py` has a complete run there."""

import csv
import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorstore
from conftest import ROOT
from finetune_helpers import make_world, write_config
from gcp_storage_emulator import server

from unidetox_jax import checkpoint, cli, storage
from unidetox_jax.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_model_round_trips_through_a_bucket(bucket, world, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = checkpoint.load(world / "weights" / "llama")
    for _ in range(2):  # the second replaces the first
        if form == "hf":
            checkpoint.save_hf(bucket / form, model)
        else:
            checkpoint.save(bucket / form, model)
    again = checkpoint.load(bucket / form)
    assert again.cfg == model.cfg
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert not list(tmp_path.iterdir())


def test_loading_a_model_reads_every_byte_once(bucket, world, monkeypatch):
    model, sent = checkpoint.load(world / "weights" / "llama"), []
    checkpoint.save_hf(bucket / "once", model)
    write_file = server.Response.write_file

    def counted(response, content, *rest, **named):
        sent.append(len(content))
        return write_file(response, content, *rest, **named)

    monkeypatch.setattr(server.Response, "write_file", counted)
    checkpoint.load(bucket / "once")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert 0.9 * weights < sum(sent) < 1.1 * weights


def test_tokenizer_round_trips_through_a_bucket(bucket, world, tmp_path, monkeypatch):
    """transformers itself treats `gs://bucket` as a relative directory."""
    monkeypatch.chdir(tmp_path)
    tokenizer = checkpoint.load_tokenizer(world / "weights" / "llama")
    checkpoint.save_hf(bucket / "with", checkpoint.load(world / "weights" / "llama"), tokenizer)
    again = checkpoint.load_tokenizer(bucket / "with")
    text = "The Zubblings are kind. Zürich ★"
    assert again.encode(text) == tokenizer.encode(text) and again.get_vocab() == tokenizer.get_vocab()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_files_of_other_writers_are_visible_at_once(bucket):
    """Orbax and other processes do not write through this process's client, so its listings must not be cached."""
    storage.write_text(bucket / "shared" / "mine", "")
    assert [path.name for path in (bucket / "shared").iterdir()] == ["mine"]
    others = tensorstore.KvStore.open(f"{bucket}/shared/").result()
    others.write("theirs", b"1").result()
    assert (bucket / "shared" / "theirs").exists()
    assert sorted(path.name for path in (bucket / "shared").iterdir()) == ["mine", "theirs"]
    others.write("theirs", b"22").result()
    assert (bucket / "shared" / "theirs").read_text() == "22"
    others.delete_range(tensorstore.KvStore.KeyRange("theirs", "theirz")).result()
    assert not (bucket / "shared" / "theirs").exists()


def test_stage_runs_in_a_bucket(bucket, world, tmp_path, capsys):
    write_config(
        tmp_path / "config.py", base=f"{world}/weights/gpt2", distill__models=("base", f"{world}/weights/gpt2"),
        mesh="data:-1", distill__num_texts=6, distill__batch_size=4, distill__max_length=12,
    )  # fmt: skip
    command = ["distill", f"--config={tmp_path}/config.py", f"--workdir={bucket}/stage"]
    assert cli.main(command) == 0, capsys.readouterr().err
    content = (bucket / "stage" / "distilled" / "texts.csv").read_text()
    assert len(list(csv.DictReader(io.StringIO(content)))) == 6
    assert sorted(path.name for path in (bucket / "stage" / "distilled").iterdir()) == [
        "README.md", "stage.json", "texts.csv", "texts.jsonl",
    ]  # fmt: skip
    capsys.readouterr()
    assert cli.main(command) == 0 and "already complete" in capsys.readouterr().err
    assert cli.main([*command, "--config.distill.seed=5"]) == 2
    assert "settings.seed" in capsys.readouterr().err


def test_error_leaves_nothing_and_foreign_files_are_not_replaced(bucket):
    with (
        pytest.raises(ZeroDivisionError),
        storage.atomic_directory(bucket / "half", checkpoint.model_io.FILE_NAMES) as work,
    ):
        storage.write_text(work / "config.json", "{}")
        raise ZeroDivisionError
    assert not (bucket / "half").exists()
    storage.write_text(bucket / "theirs" / "thesis.tex", "")
    with pytest.raises(UserError, match="holds 'thesis.tex'"):
        with storage.atomic_directory(bucket / "theirs", checkpoint.model_io.FILE_NAMES):
            pass


def test_missing_bucket_is_one_line_and_not_created(bucket, world, tmp_path, capsys):
    write_config(tmp_path / "config.py", base=f"{world}/weights/gpt2")
    assert cli.main(["distill", f"--config={tmp_path}/config.py", "--workdir=gs://misspelt/run"]) == 2
    assert "gs://misspelt/run/.visible: cannot be written" in capsys.readouterr().err
    assert not (type(bucket)("gs://misspelt")).exists()


def test_bucket_without_gcsfs_is_one_line(tmp_path):
    write_config(tmp_path / "config.py")
    program = "import sys; sys.modules['gcsfs'] = None; from unidetox_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "distill", f"--config={tmp_path}/config.py", "--workdir=gs://bucket/none"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("unidetox: gs://bucket/none/.visible: needs gcsfs: pip install")
