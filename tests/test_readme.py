"""What the README says about objectives is run as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from variants import VARIANTS

from unidetox_jax import models
from unidetox_jax.decoding import objectives

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
