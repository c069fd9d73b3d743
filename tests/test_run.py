"""`unidetox run`: a small quickstart from scratch to the report, uninterrupted and killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HANGS
from etils import epath
from finetune_helpers import ROOT, start

from unidetox_jax import cli, devices, storage
from unidetox_jax.benchmarks import effect
from unidetox_jax.report.results import Evaluation
from unidetox_jax.stages.task import Task, run_tasks

KILLS = int(os.environ.get("UNIDETOX_RUN_KILLS", "0"))  # launch/proofs.sh sets 5
SEED = int(os.environ.get("UNIDETOX_KILL_SEED", "0"))
GPT2, WORLD = "{workdir}/pretrained/gpt2", "{workdir}/world"
SMALL = (
    f"--config.targets=('{GPT2}',)",
    f"--config.control_targets=('{GPT2}',)",
    f"--config.pretrain.models=('{WORLD}/models/gpt2','{WORLD}/models/scorer=jsonl:{WORLD}/scorer.jsonl')",
    f"--config.pretrain.validation=jsonl:{WORLD}/valid.jsonl?split=train[:16]",
    "--config.pretrain.world_texts=1000",
    "--config.pretrain.steps=6",
    *(f"--config.{stage}.batch_size=8" for stage in ("pretrain", "toxify", "distill", "detoxify")),
    *(f"--config.{stage}.max_length=64" for stage in ("pretrain", "toxify", "detoxify")),
    *(f"--config.{stage}.save_minutes=0" for stage in ("pretrain", "toxify", "detoxify")),
    "--config.pretrain.log_every=3",
    "--config.toxify.steps=4",
    "--config.toxify.log_every=2",
    "--config.toxify.evaluate_every=4",
    "--config.distill.num_texts=24",
    "--config.distill.max_length=24",
    "--config.detoxify.steps=4",
    "--config.detoxify.log_every=2",
    "--config.evaluate.samples=2",
    "--config.evaluate.max_prompts=24",
    "--config.evaluate.max_new_tokens=8",
    f"--config.evaluate.text_file=jsonl:{WORLD}/clean.jsonl?split=train[:16]",
    "--config.analyze.neighbours=2",
)


def command(workdir, *more):
    workdir = workdir if storage.is_remote(workdir) else os.path.relpath(workdir)  # relative, as users write them
    return ["run", f"--config={ROOT}/configs/quickstart.py", f"--workdir={workdir}", *SMALL, *more]


def finished(workdir):
    """The complete directories, in order of completion."""
    records = [(path.stat().st_mtime, path) for path in workdir.rglob("stage.json")]
    return [str(path.parent.relative_to(workdir)) for _, path in sorted(records)]


def results(workdir):
    """The results that must not depend on interruptions."""
    workdir = epath.Path(workdir)
    texts = {name: (workdir / name / "texts.jsonl").read_bytes() for name in ("distilled", "samples")}
    metrics = {path.parent.name: json.loads(path.read_text()) for path in workdir.glob("evaluation/*/metrics.json")}
    return texts, metrics


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An uninterrupted run: (its directory, its output, its seconds)."""
    workdir = tmp_path_factory.mktemp("run") / "alone"
    begun = time.monotonic()
    child = start(*command(workdir), capture=True)
    printed, errors = child.communicate(timeout=HANGS)
    assert child.returncode == 0, errors[-3000:]
    return workdir, printed, time.monotonic() - begun


@pytest.mark.slow
def test_all_outputs_exist(alone):
    workdir, printed, _ = alone
    assert finished(workdir) == [
        "world", "pretrained/gpt2", "pretrained/scorer", "toxic", "distilled", "samples", "detoxified/gpt2",
        "control/gpt2", "evaluation/gpt2", "evaluation/gpt2.detoxified", "evaluation/gpt2.control", "analysis",
        "report",
    ]  # fmt: skip
    assert "0 of 13 done" in printed and "about" in printed  # the outline
    assert f"report: {os.path.relpath(workdir)}/report/index.html" in printed
    assert "as published" in printed and "detoxified" in printed and "samples-only control" in printed
    for name in ("distilled/texts.csv", "distilled/README.md", "toxic/hf/model.safetensors", "report/results.csv"):
        assert (workdir / name).stat().st_size > 0
    assert not list(workdir.rglob("*.partial*")) and not list(workdir.rglob("*.tmp"))


@pytest.mark.slow
def test_the_effects_table_reads_a_run(alone, capsys):
    workdir, _, _ = alone
    assert effect.main([str(workdir)]) == 0
    printed = capsys.readouterr().out
    assert "| gpt2 |" in printed and "control less contrast" in printed
    assert effect.main([str(workdir / "nothing")]) == 2


@pytest.mark.slow
def test_the_environment_does_not_change_results(alone, tmp_path):
    """JAX's environment variables, an ASCII locale and terminal, paths with an unexpanded ~."""
    surroundings = {
        "JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DISABLE_JIT": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path),
    }  # fmt: skip
    (tmp_path / "quickstart.py").write_text((ROOT / "configs/quickstart.py").read_text())
    arguments = ["run", "--config=~/quickstart.py", "--workdir=~/run", *SMALL]
    child = start(*arguments, capture=True, **surroundings)
    printed, errors = child.communicate(timeout=HANGS)
    assert child.returncode == 0, errors[-3000:]
    assert "JAX_DISABLE_JIT: ignored" in errors and "Warning" not in errors
    assert printed.isascii() and "?" in printed and "as published" in printed
    assert results(tmp_path / "run") == results(alone[0])


@pytest.mark.slow
def test_a_second_run_does_nothing_and_other_settings_are_refused(alone, capsys):
    workdir, _, _ = alone
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("stage.json")}
    assert cli.main(command(workdir)) == 0
    assert "13 of 13 done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("stage.json")}
    assert cli.main(command(workdir, "--config.distill.seed=7")) == 2
    assert "settings.seed: was 1234, now 7" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("stage.json")}


@pytest.mark.slow
def test_a_moved_working_directory_stays_complete(alone, tmp_path, capsys):
    shutil.copytree(alone[0], tmp_path / "moved")
    assert cli.main(command(tmp_path / "moved", "--stages=pretrain,toxify,distill,detoxify,evaluate,analyze")) == 0
    assert "12 of 12 done" in capsys.readouterr().out
    assert finished(tmp_path / "moved") == finished(alone[0])


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="UNIDETOX_RUN_KILLS is not set; the run in a bucket is killed in any case")
def test_killed_at_random_moments_it_gives_the_same_results(alone, tmp_path):
    """SIGKILL `KILLS` times anywhere in a run; a run that ends before is compared and started again."""
    expected, (_, _, seconds) = results(alone[0]), alone
    random_ = random.Random(SEED)
    workdir, reached = tmp_path / "killed", []
    while len(reached) < KILLS:
        child = start(*command(workdir), capture=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=random_.uniform(0.2, 0.7) * seconds)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if (workdir / "report/stage.json").exists():
            assert results(workdir) == expected
            shutil.rmtree(workdir)
        else:
            reached.append(finished(workdir)[-1:])
    print(f"killed after {reached}")
    child = start(*command(workdir), capture=True)
    _, errors = child.communicate(timeout=HANGS)
    assert child.returncode == 0, errors[-3000:]
    assert results(workdir) == expected


@pytest.mark.slow
def test_killed_in_three_stages_in_a_bucket_it_gives_the_same_results_as_on_disk(alone, bucket):
    workdir = bucket / "run"
    less = [f"--config.{stage}.save_minutes=9" for stage in ("toxify", "detoxify")]  # whose moments are not waited for
    for room, part in (
        ("pretrained/gpt2", "checkpoints/4/commit_success.txt"),
        ("distilled", "parts/000000.json"),
        ("evaluation/gpt2", "parts/run0.texts.jsonl"),
    ):
        child = start(*command(workdir, *less), capture=True)
        while not any((workdir / room / name).exists() for name in (part, "stage.json")):
            assert child.poll() is None, child.communicate()[1][-3000:]
            time.sleep(0.2)  # this process, which asks, is the emulator as well
        child.kill()
        child.communicate()
        assert not (workdir / "report/stage.json").exists()
    child = start(*command(workdir, *less), capture=True)
    printed, errors = child.communicate(timeout=HANGS)
    assert child.returncode == 0, errors[-3000:]
    assert f"report: {workdir}/report/index.html" in printed
    assert results(workdir) == results(alone[0])
    assert (workdir / "toxic/hf/tokenizer.json").read_bytes() == (alone[0] / "toxic/hf/tokenizer.json").read_bytes()
    [events], [local] = ((place / "toxic/tensorboard").iterdir() for place in (workdir, alone[0]))
    assert len(events.read_bytes()) == len(local.read_bytes())  # only times differ


def test_the_pooled_interval_is_paired():
    """Identical answers of several families narrow no interval; a difference of one in every prompt has width zero."""
    category = np.array(["hills"] * 8 + ["islands"] * 4)

    def forms(control, detoxified):
        metrics = {"groups": {"id": ["hills"]}}
        sides = {"control": control, "detoxified": detoxified}
        return {form: Evaluation(metrics, {"category": category, "tp": tp}, epath.Path()) for form, tp in sides.items()}

    half = np.array([1.0, 0.0] * 6)
    mean, low, high = effect.difference([{"a": forms(half, np.zeros(12)), "b": forms(half, np.zeros(12))}], "control")
    assert mean == 0.5 and low < 0.3 and high > 0.7
    certain = [{"a": forms(np.ones(12), np.zeros(12))}]
    assert effect.difference(certain, "control") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("stages", "code", "words"),
    [
        ("distil", 2, "--stages: no stage 'distil'; did you mean 'distill'?"),
        ("fit-scorer", 2, "--stages=fit-scorer: the configuration has no tasks for them"),
    ],
)
def test_stages_that_do_not_exist(tmp_path, capsys, stages, code, words):
    assert cli.main(command(tmp_path / "none", f"--stages={stages}")) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_dry_run_prints_the_outline(tmp_path, capsys):
    assert cli.main(command(tmp_path / "none", "--dry_run", "--stages=distill,toxify")) == 0
    printed = capsys.readouterr().out
    assert printed.index("toxify") < printed.index("distill") and "0 of 3 done" in printed
    assert not (tmp_path / "none").exists()


def test_compiled_programs_are_dropped_before_the_process_runs_out_of_memory_maps(tmp_path, monkeypatch):
    """As a sweep of a hundred evaluations would."""
    most, before = tmp_path / "most", []
    monkeypatch.setattr(devices, "MAX_MAPS", epath.Path(most))
    program = jax.jit(lambda x: jnp.sin(x).sum())
    for allowed, kept in ((10**9, 1), (10, 0)):
        most.write_text(str(allowed))
        program(np.ones(3))
        task = Task(
            "x", epath.Path(tmp_path / str(kept)), {}, dict, lambda _: before.append(program._cache_size()) or {}
        )
        task.directory.mkdir()
        run_tasks([task])
    assert before == [1, 0]
    monkeypatch.setattr(devices, "MAX_MAPS", epath.Path(tmp_path / "none"))
    assert not devices.memory_maps_run_out()  # as on other systems
