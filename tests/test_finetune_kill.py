"""`unidetox toxify` as a process that is killed: what it ends with is what it would have ended with."""

import json
import os
import random
import signal
import time

import pytest
from conftest import HANGS
from finetune_helpers import lines_of, make_world, same, start, training, weights, write_config

KILLS = int(os.environ.get("UNIDETOX_KILLS", "2"))  # launch/proofs.sh sets 10
STEPS = 100


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a configuration of 100 steps, a checkpoint every 0.3 seconds, and a model with dropout, whose
    updates are rounded stochastically (those of `test_run.py` are in float32)."""
    place = tmp_path_factory.mktemp("kill")
    world = make_world(place / "world")
    changes = {"steps": STEPS, "save_minutes": 0.005, "evaluate_every": 50, "log_every": 5}
    changes |= {"precision": "bfloat16", "export_dtype": "float32"}
    write_config(place / "config.py", base=f"{world}/weights/gpt2", **training(world, "toxify", **changes))
    return place


def toxify(place, name):
    return start("toxify", f"--config={place}/config.py", f"--workdir={place / name}")


def wait_for(path, child, seconds=HANGS):
    """Until the file is there."""
    end = time.monotonic() + seconds
    while not path.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists(), child.communicate()[1]


@pytest.fixture(scope="module")
def alone(place):
    """The run that is left alone; returns the seconds that its training took."""
    child = toxify(place, "alone")
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 0, printed
    return json.loads((place / "alone/toxic/stage.json").read_text())["figures"]["seconds"]


def assert_the_same(place, name):
    assert same(weights(place / name / "toxic"), weights(place / "alone/toxic"))
    assert not (place / name / "toxic/stage.partial.json").exists()


def newest(place, name) -> int:
    """The newest finished checkpoint's step; 0 where there is none."""
    names = [path.name for path in (place / name / "toxic/checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(place, alone):
    """SIGKILL at any time in what a whole run takes, counted from its beginning and, every other time, from its first
    new checkpoint; the last run is left to its end."""
    moments = random.Random(int(os.environ.get("UNIDETOX_KILL_SEED", "1")))
    reached, ended = [], 0
    while len(reached) < KILLS:
        before = newest(place, "killed")
        child = toxify(place, "killed")
        wait_for(place / "killed/toxic/stage.partial.json", child)
        if len(reached) % 2:
            while newest(place, "killed") == before and child.poll() is None:
                time.sleep(0.01)
        time.sleep(moments.uniform(0, alone / 4 if len(reached) % 2 else alone))
        child.kill()
        _, printed = child.communicate()
        if (place / "killed/toxic/stage.json").exists():  # it came to its end first: the next is another run
            assert_the_same(place, "killed")
            ended += 1
            (place / "killed").rename(place / f"ended{ended}")
        else:
            assert child.returncode == -signal.SIGKILL, printed
            reached.append(newest(place, "killed"))
    print(f"killed with checkpoints of steps {reached}, {ended} runs ended before")
    assert any(reached)
    child = toxify(place, "killed")
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 0, printed
    assert_the_same(place, "killed")
    assert lines_of(place / "killed/toxic") == lines_of(place / "alone/toxic")
    found = {path.name for path in (place / "killed/toxic").iterdir()}
    assert found == {path.name for path in (place / "alone/toxic").iterdir()}


@pytest.mark.slow
def test_sigterm_says_one_line_saves_and_exits_75(place, alone):
    child = toxify(place, "asked")
    wait_for(place / "asked/toxic/checkpoints", child)
    child.terminate()
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 75
    [line] = [line for line in printed.splitlines() if line.startswith("unidetox: ")]
    assert line.startswith("unidetox: toxify: stopped, saved at step ") and "Traceback" not in printed
    saved = int(line.split("step ")[1].split()[0])
    assert (place / f"asked/toxic/checkpoints/{saved}").exists()
    child = toxify(place, "asked")
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 0 and f"continues from step {saved} of {STEPS}" in printed, printed
    assert_the_same(place, "asked")


@pytest.mark.slow
def test_sigterm_before_training_exits_75_at_once(place):
    child = toxify(place, "early")
    wait_for(place / "early/toxic/stage.partial.json", child)
    time.sleep(0.3)  # it reads the tokenizer, the texts, the weights
    child.terminate()
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 75
    assert len([line for line in printed.splitlines() if line.startswith("unidetox: ")]) == 1
