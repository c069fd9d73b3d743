"""Several processes start together or say which one is missing; an error, a death or an unshared directory ends all."""

import subprocess
import sys
import tempfile
import types
from unittest import mock

import pytest
from conftest import HANGS
from finetune_helpers import write_config
from processes import command, environment, free_port, joined, start, wait

from unidetox_jax import distributed, rendezvous
from unidetox_jax.errors import UserError

SCRIPT = """
import sys, time, os, signal
from unidetox_jax import distributed, storage
from unidetox_jax.errors import UserError
address, count, index, body, ready, present = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
import jax, pathlib
pathlib.Path(ready, str(os.getpid())).touch()
while len(os.listdir(ready)) < int(present):  # start together, however long a busy machine takes to import jax
    time.sleep(0.01)
distributed.HEARTBEAT_TIMEOUT = {silence}
try:
    distributed.initialize(address, count, index, timeout={timeout})
    exec(body)
    distributed.finish()
except UserError as error:
    distributed.fail(f"unidetox: {{error}}", error.exit_code)
    sys.exit(error.exit_code)
"""


def run(body: str, count: int, present=None, timeout: float = HANGS, silence: float = 30.0):
    """present: the processes that are started, of `count`. silence: seconds without a heartbeat that mean a death."""
    address = f"127.0.0.1:{free_port()}"
    script = SCRIPT.format(timeout=timeout, silence=silence)
    present = range(count) if present is None else present
    with tempfile.TemporaryDirectory() as ready:
        command = [sys.executable, "-c", script, address, str(count)]
        arguments = [[*command, str(index), body, ready, str(len(present))] for index in present]
        return wait(start(arguments, devices=1))


def test_all_processes_see_all_devices_and_the_same_values():
    body = "print(jax.device_count(), distributed._watchdog.all_gather('test', f'value {index}'))"
    ended = run(body, 3)
    assert [one.code for one in ended] == [0, 0, 0], [one.err for one in ended]
    assert {one.out.strip() for one in ended} == {"3 ['value 0', 'value 1', 'value 2']"}


@pytest.mark.slow
def test_every_process_names_the_missing_ones():
    ended = run("", 4, present=[0, 2], timeout=5)
    for one in ended:
        assert one.code == 2
        assert "of 4, process 1, 3 did not reach" in one.last_line and one.err.count("\n") == 1


def test_missing_process_0_is_reported():
    (one,) = run("", 2, present=[1], timeout=2)
    assert one.code == 2 and "process 0 does not answer at 127.0.0.1:" in one.last_line and one.err.count("\n") == 1


@pytest.mark.slow
def test_duplicate_process_ids_are_refused():
    ended = run("", 3, present=[0, 1, 1])
    assert [one.code for one in ended] == [2, 2, 2]
    assert all("it is process 1 of 3" in one.last_line for one in ended)


@pytest.mark.slow
def test_error_in_one_process_ends_all_with_one_line_each():
    ended = run("if index == 1:\n raise UserError('no such field')\ntime.sleep(7200)", 3)
    assert [one.code for one in ended] == [2, 2, 2]
    assert ended[1].err == "unidetox: no such field\n"
    assert ended[0].err == ended[2].err == "unidetox: no such field (process 1)\n"


@pytest.mark.slow
def test_a_killed_process_ends_the_others():
    ended = run("if index == 1:\n os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(7200)", 3, silence=6.0)
    assert [one.code for one in ended] == [1, -9, 1]
    assert all("process 1 gave no sign of life for 6 s" in one.last_line for one in (ended[0], ended[2]))


@pytest.mark.slow
def test_directory_hidden_from_one_host_stops_all(tmp_path):
    # process 1 looks at another directory, as if the path were not on a network file system
    body = (
        f"storage.VISIBLE_WITHIN = 1; storage.check_workdir({str(tmp_path)!r} + ('/here' if index == 1 else '/shared'))"
    )
    ended = run(body, 2)
    assert [one.code for one in ended] == [2, 2]
    assert all("process 1 on " in one.last_line and "cannot see" in one.last_line for one in ended)
    (tmp_path / "file").write_text("")
    ended = run(f"storage.check_workdir({str(tmp_path / 'file' / 'below')!r})", 2)
    assert [one.code for one in ended] == [2, 2]
    assert all("cannot be made" in one.last_line for one in ended)


@pytest.mark.slow
def test_mistake_in_a_command_ends_all_processes_with_one_line(tmp_path):
    config = write_config(tmp_path / "config.py", fit_scorer__data=f"{tmp_path}/nowhere.csv")
    address = f"127.0.0.1:{free_port()}"
    common = ["fit-scorer", f"--config={config}", f"--workdir={tmp_path}/run"]
    ended = wait(start([command([*common, *joined(address, 2, index)]) for index in range(2)], devices=1))
    assert [one.code for one in ended] == [2, 2], [one.err for one in ended]
    assert all("nowhere.csv" in one.last_line and "Traceback" not in one.err for one in ended)
    assert ended[1].last_line == f"{ended[0].last_line} (process 0)"  # which alone reads the file
    assert not list((tmp_path / "run").iterdir())


def test_incomplete_or_wrong_addresses_are_refused():
    for arguments, message in (
        (("host:1", 2, None), "--process_id: missing"),
        (("host", 2, 0), "expected HOST:PORT"),
        (("host:1", 2, 2), "expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            distributed.initialize(*arguments)


def test_group_is_detected_under_slurm(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    group = rendezvous.find_group(None, None, None, 8476, 1)
    assert group == rendezvous.ProcessGroup("node03:8476", 8, 5, [1])
    assert rendezvous.find_group(None, 1, None, None, 1) is None  # told to run alone


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1]),  # --gpus-per-node=4: all tasks see all
        (
            {"CUDA_VISIBLE_DEVICES": "0"},
            None,
        ),  # --gpus-per-task=1 or --gpu-bind=single:1: each sees its own as number 0
        ({"SLURM_GPUS_PER_TASK": "1"}, None),
        ({"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # a task for each node
    ],
)
def test_slurm_task_takes_its_own_devices(monkeypatch, more, devices):
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", **more,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert rendezvous.find_group(None, None, None, 8476, 1).local_device_ids == devices


@pytest.mark.parametrize("installed", [True, False])
def test_plain_pod_is_one_process_and_queries_nothing(monkeypatch, installed, recwarn):
    """A pod outside of an indexed job, with the `kubernetes` package, whose first call fails there, or without it."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    refusal = mock.Mock(side_effect=RuntimeError("Service host/port is not set."))
    package = types.SimpleNamespace(config=types.SimpleNamespace(load_incluster_config=refusal))
    monkeypatch.setitem(sys.modules, "kubernetes", package if installed else None)
    assert rendezvous.find_group(None, None, None, None, 300) is None
    assert not refusal.called and not recwarn.list
    if installed:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")  # in an indexed job
        with pytest.raises(UserError, match="cannot find out which take part .*or --num_processes=1"):
            rendezvous.find_group(None, None, None, None, 300)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(("devices", "configured"), [(1, False), (1, True), (2, True)])
def test_compilation_cache_is_off_for_several_cpu_devices(devices, configured, tmp_path):
    """A cached program for several CPU devices may deadlock until XLA aborts the process."""
    place = tmp_path / "configured" if configured else tmp_path / "unidetox_jax" / "jax"
    program = "import jax; from unidetox_jax import distributed; distributed.initialize(); jax.jit(lambda x: x + 1)(1)"
    changes = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(place) if configured else ""}
    variables = {name: value for name, value in {**environment(devices), **changes}.items() if value}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True, timeout=HANGS)
    assert bool(list(place.glob("*-cache"))) == (devices == 1)


@pytest.mark.slow
def test_values_are_gathered_if_the_caller_initialised_jax_distributed():
    """A user's program that calls this package, where all processes must also save at the same steps."""
    code = (
        "import sys, jax; from unidetox_jax import distributed; index = int(sys.argv[2]);"
        "jax.config.update('jax_cpu_collectives_implementation', 'gloo');"
        "jax.distributed.initialize(sys.argv[1], 2, index);"
        "print(distributed.all_gather('x', ['', 'zwölf'][index]), distributed.broadcast(str(index)),"
        "distributed.all_gather('y', ''))"
    )
    address = f"127.0.0.1:{free_port()}"
    ended = wait(start([[sys.executable, "-c", code, address, str(index)] for index in range(2)]))
    said = [one.out.strip().rsplit("\n", 1)[-1] for one in ended]  # below what gloo prints
    assert said == ["['', 'zwölf'] 0 ['', '']"] * 2, [one.err[-2000:] for one in ended]
