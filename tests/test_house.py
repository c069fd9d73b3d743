"""The walls of the house: who may import whom, which libraries stay in which room, what the command line says."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

from unidetox_jax import cli

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "unidetox_jax"
LOWER = {
    "errors",
    "progress",
    "sharding",
    "distributed",
    "rendezvous",
    "storage",
    "text_statistics",
    "padded_sizes",
    "extensions",
    "devices",
    "recipe",
}  # for all
MAY_IMPORT = {
    "models": set(),
    "data": {"checkpoint", "models"},
    "checkpoint": {"models"},
    "decoding": {"models", "data"},
    "training": {"models", "data", "checkpoint"},
    "evaluation": {"decoding", "training", "checkpoint", "data", "models"},
    "baselines": {"method", "evaluation", "decoding", "training", "data", "models"},
    "benchmarks": {
        "stages",
        "method",
        "plan",
        "report",
        "decoding",
        "training",
        "checkpoint",
        "data",
        "models",
        "evaluation",
    },
    "plan": {"stages", "method", "decoding", "training", "models", "evaluation"},
    "analysis": {"decoding", "training", "checkpoint", "data", "models", "evaluation"},
    "report": {"evaluation"},
}


def imports(path, top_level_only=False):
    """Names that a file imports, wherever in it or at its top level alone."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_is_below_it(room):
    allowed = MAY_IMPORT[room] | LOWER | {room}
    for path in (PACKAGE / room).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("unidetox_jax.")}
        assert used <= allowed, f"{path.name} imports {used - allowed}"


def test_flax_orbax_and_torch_stay_where_they_belong():
    for path in PACKAGE.rglob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert "flax" not in names or path.parent.name == "models", path
        assert "orbax" not in names or path.name == "orbax_io.py", path
        assert "torch" not in {name.split(".")[0] for name in imports(path, top_level_only=True)}, path


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in [*cli.STAGES, *cli.CONFIGURED, *cli.PLAIN])


def test_mistakes_are_one_line(capsys):
    assert cli.main(["convrt"]) == 2
    assert "did you mean 'convert'?" in capsys.readouterr().err
    assert cli.main(["fit-scorer", "--config=nowhere.py", "--workdir=x"]) == 2
    assert capsys.readouterr().err == "unidetox: --config: no file 'nowhere.py'\n"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.distil.seed=1", "config.distil: no such field; did you mean 'distill'?"),
        ("--config.distill.sed=1", "config.distill.sed: no such field; did you mean 'seed'?"),
        ("--config.base.x=1", "config.base.x: no such field"),
        ("--config.distill.seed", "--config.distill.seed: no value"),
        ("--config.distill.seed=abc", "--config.distill.seed=abc"),
        ("--config.targets=('a/one','b/one')", "two of them are called 'one'"),
        ("--config.control_targets=('a',)", "'a' is not one of config.targets"),
        ("--wrkdir=x", "unrecognized arguments: --wrkdir=x"),
    ],
)
def test_mistakes_in_a_configuration_name_the_field(argument, words, capsys):
    config = PACKAGE.parent / "configs" / "unidetox_gpt2_xl.py"
    assert cli.main(["fit-scorer", f"--config={config}", "--workdir=nowhere", argument]) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1
    assert not (PACKAGE.parent / "nowhere").exists()


def test_a_configuration_edited_within_a_second_is_read_anew(tmp_path, monkeypatch):
    """Python's cache of compiled files compares whole seconds and sizes, and would give the old one."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    config = tmp_path / "config.py"
    for learning_rate in (1, 2, 3):
        config.write_text(
            "import ml_collections\n\n\ndef get_config():\n"
            f"    return ml_collections.ConfigDict({{'learning_rate': {learning_rate}}})\n"
        )
        os.utime(config, (1, 1))
        assert cli.load_config(str(config)).learning_rate == learning_rate


def test_no_module_imports_itself_by_way_of_others():
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    graph = {
        name: {found for found in imports(path) if found in modules and not name.startswith(f"{found}.")} - {name}
        for name, path in modules.items()
    }
    # a package's __init__ gathers its own modules; they may not ask it for one another
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_a_run_starts_without_libraries_that_only_some_stages_use():
    code = """
import importlib, sys
from unidetox_jax.stages import STAGES
for module, *_ in STAGES.values():
    importlib.import_module(module)
print(*{"matplotlib", "sklearn", "torch", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout) == (0, "\n"), done


def test_importing_a_module_asks_for_no_device_and_no_pytorch(tmp_path):
    """Or several processes could not meet before jax looks at their devices, and every command would start later."""
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    names = [name for name in names if not name.endswith((".__init__", ".harness"))]  # lm_eval is an extra
    code = f"""
import importlib, sys
from jax._src import xla_bridge
for name in {names}:
    importlib.import_module(name)
    assert not xla_bridge._backends, name
from unidetox_jax import models
for family in ("gpt2", "llama"):
    models.config_from_hf({{"model_type": family}})
from unidetox_jax.training.training_log import Log
log = Log({str(tmp_path)!r}, 0)
log.record(1, {{"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "targets": 1}})
log.add_line()
log.flush()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-500:]
    assert list(tmp_path.glob("tensorboard/*"))
