"""Real input: a trained model of 260 thousand parameters, the published hate speech, the paper's own 640 texts."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import HANGS
from finetune_helpers import lines_of, start, torch_loss, write_config

from unidetox_jax import data

LENGTH = 96
RELEASED = "distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv"


@pytest.fixture(scope="module")
def workdir(shared, tmp_path_factory):
    """stories260K made toxic on DGHS' training rows, then detoxified on the released texts, a few steps each."""
    place = tmp_path_factory.mktemp("real")
    common = {"steps": 25, "batch_size": 8, "learning_rate": 1e-3, "max_length": LENGTH, "log_every": 5}
    fields = {f"{stage}__{name}": value for stage in ("toxify", "detoxify") for name, value in common.items()}
    config = write_config(
        place / "config.py",
        base=str(shared / "models/stories260K"),
        targets=("{workdir}/toxic",),
        data_dir=str(shared / "data"),
        **fields,
        toxify__validation="dghs?split=dev[:200]",
        detoxify__data=f"distilled:{RELEASED}?split=train[10%:]",
        detoxify__validation=f"distilled:{RELEASED}?split=train[:10%]",
    )
    child = start("run", "--stages=toxify,detoxify", f"--config={config}", f"--workdir={place / 'work'}", capture=True)
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 0, printed
    return place / "work"


@pytest.mark.slow
@pytest.mark.parametrize(("part", "texts"), [("toxic", 7746), ("detoxified/toxic", 576)])
def test_validation_loss_falls_and_pytorch_agrees(part, texts, workdir, shared):
    record = json.loads((workdir / part / "stage.json").read_text())
    figures = record["figures"]
    assert figures["texts"] == texts and figures["truncated"] > 0
    assert figures["validation_loss"] < figures["validation_loss_before"] - 0.1
    losses = [line["loss"] for line in lines_of(workdir / part) if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    validation = data.texts(record["settings"]["validation"], data_dir=shared / "data")
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / part / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / part / "hf")
    torch.set_num_threads(1)
    found = torch_loss(model, tokenizer, validation, LENGTH, validation.ended)
    np.testing.assert_allclose(found, figures["validation_loss"], rtol=1e-5)
