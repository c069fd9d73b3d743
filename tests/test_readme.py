"""What the README says about objectives is run as it stands there."""

import pathlib
import re
import shlex
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HANGS
from variants import VARIANTS

from unidetox_jax import cli, models
from unidetox_jax.decoding import objectives
from unidetox_jax.stages import settings

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def test_an_objective_of_ones_own(tmp_path, monkeypatch):
    section = README.read_text().split("## Write your own objective")[1].split("\n## ")[0]
    module, use, draw = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_objective.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    base, toxic = jnp.array([[2.0, 1.0, -9.0]]), jnp.array([[1.0, 2.0, 0.0]])
    names = {"base_logits": base, "toxic_logits": toxic}
    exec(use, names)
    np.testing.assert_allclose(names["scores"], [[2.0, -2.0, -np.inf]])
    assert names["objective"] == objectives.get("my_objective:softer", tau=0.5)
    cfg = models.config_from_hf({**VARIANTS["gpt2"], "n_layer": 1})
    pair = {name: models.Model(models.init(cfg, jax.random.key(i)), cfg) for i, name in enumerate(("base", "toxic"))}
    names |= {**pair, "prompts": np.ones((2, 1), np.int32)}
    exec(draw, names)
    assert names["result"].tokens.shape == (2, 255) and (names["result"].lengths >= 1).all()


def commands():
    """Every `unidetox …` line of the README's blocks, without its remark."""
    for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL):
        for line in block.splitlines():
            line = line.split(" #")[0].strip()
            if line.startswith("unidetox ") and "…" not in line:
                yield line


def test_every_command_names_what_exists():
    """Commands, configurations and fields as they stand there; what they do is run by the tests of each."""
    found = [shlex.split(line)[1:] for line in commands()]
    assert len(found) > 8
    for command, *arguments in found:
        assert command in {**cli.STAGES, **cli.CONFIGURED, **cli.PLAIN}, command
        configs = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
        assert len(configs) == (command not in cli.PLAIN), arguments
        overrides = [a for a in arguments if a.startswith("--config.")]
        for path in configs:
            settings.parse_run(cli.load_config(f"{README.parent}/{path}", overrides))


@pytest.mark.parametrize("script", sorted({*re.findall(r"launch/[a-z_]+\.(?:sh|sbatch)", README.read_text())}))
def test_every_script_is_there_and_explains_itself(script):
    path = README.parent / script
    shown = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, timeout=HANGS)
    assert shown.returncode == 0 and script.split("/")[1].split(".")[0] in shown.stdout
