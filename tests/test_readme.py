"""What the README says about objectives is run as it stands there."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from unidetox_jax.decoding import objectives

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def test_an_objective_of_ones_own(tmp_path, monkeypatch):
    section = README.read_text().split("## Write your own objective")[1].split("\n## ")[0]
    module, use = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_objective.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    base, toxic = jnp.array([[2.0, 1.0, -9.0]]), jnp.array([[1.0, 2.0, 0.0]])
    names = {"base_logits": base, "toxic_logits": toxic}
    exec(use, names)
    np.testing.assert_allclose(names["scores"], [[2.0, -2.0, -np.inf]])
    assert names["objective"] == objectives.get("my_objective:softer", tau=0.5)
