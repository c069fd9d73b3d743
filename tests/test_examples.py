"""The notebooks of examples/ run from top to bottom, and their output agrees with their text."""

import re

import pytest
from conftest import HANGS, ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

CELL = r"[\d.]+ \[[\d.]+, [\d.]+\]"
pytestmark = pytest.mark.usefixtures("optimized")
EXAMPLES = sorted((ROOT / "examples").glob("*.ipynb"))


def run(path):
    """A notebook's printed output; an exception in a cell fails the test."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=HANGS, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_method_detoxifies_both_models():
    printed = run(ROOT / "examples/method_on_the_built_in_world.ipynb")
    for model in ("GPT-2", "LLaMA"):
        before, after = (
            [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in re.findall(CELL, line)[:2]]
            for line in (re.search(rf"{model} {state} .*", printed).group() for state in ("before", "after"))
        )
        for (_, lowest, _), (_, _, highest) in zip(before, after, strict=True):  # ID, OOD: mean and interval
            assert highest < lowest, (model, before, after)


@pytest.mark.slow
def test_a_sweep_of_an_objective_compiles_once():
    printed = run(ROOT / "examples/your_own_decoding_objective.ipynb")
    rows = re.findall(r"one_sided +\{'(\w+)': (\S+)\} +(\S+)% +\S+ +(\d+)$", printed, re.MULTILINE)
    assert len(rows) == 8
    assert [int(compiled) for *_, compiled in rows[1:]] == [0] * 7
    toxic = {float(value): float(share) for name, value, share, _ in rows if name == "strength"}
    assert toxic[8.0] < 0.5 * toxic[0.0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
