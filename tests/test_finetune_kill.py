"""`unidetox toxify` as a process that is killed: what it ends with is what it would have ended with."""

import json
import os
import random
import signal
import time

import pytest
from finetune_helpers import lines_of, make_world, same, start, training, weights, write_config

KILLS = int(os.environ.get("UNIDETOX_KILLS", "2"))  # launch/proofs.sh sets 10
STEPS = 150


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a configuration of 150 steps, a checkpoint every 10, and a model with dropout."""
    place = tmp_path_factory.mktemp("kill")
    world = make_world(place / "world")
    changes = {"steps": STEPS, "save_every": 10, "evaluate_every": 50, "log_every": 5}
    write_config(place / "config.py", base=f"{world}/weights/gpt2", **training(world, "toxify", **changes))
    return place


def toxify(place, name):
    return start("toxify", f"--config={place}/config.py", f"--workdir={place / name}")


def wait_for(path, child, seconds=300):
    """Until the file is there."""
    end = time.monotonic() + seconds
    while not path.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists(), child.communicate()[1]


@pytest.fixture(scope="module")
def alone(place):
    """The run that is left alone; returns the seconds that its training took."""
    child = toxify(place, "alone")
    _, printed = child.communicate(timeout=600)
    assert child.returncode == 0, printed
    return json.loads((place / "alone/toxic/stage.json").read_text())["figures"]["seconds"]


def assert_the_same(place, name):
    assert same(weights(place / name / "toxic"), weights(place / "alone/toxic"))
    assert not (place / name / "toxic/stage.partial.json").exists()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(place, alone):
    """SIGKILL at any time in what a whole run takes, from where it begins on; the last one is left to its end."""
    moments = random.Random(int(os.environ.get("UNIDETOX_KILL_SEED", "1")))
    kills = sittings = 0
    while kills < KILLS:
        child = toxify(place, "killed")
        sittings += 1
        wait_for(place / "killed/toxic/stage.partial.json", child)
        time.sleep(moments.uniform(0, alone))
        child.kill()
        child.communicate()
        if child.returncode == 0:  # it came to its end first: the next is another run
            assert_the_same(place, "killed")
            (place / "killed").rename(place / f"ended{sittings}")
        else:
            assert child.returncode == -signal.SIGKILL
            kills += 1
    child = toxify(place, "killed")
    _, printed = child.communicate(timeout=600)
    assert child.returncode == 0, printed
    assert_the_same(place, "killed")
    assert lines_of(place / "killed/toxic") == lines_of(place / "alone/toxic")
    found = {path.name for path in (place / "killed/toxic").iterdir()}
    assert found == {path.name for path in (place / "alone/toxic").iterdir()}


@pytest.mark.slow
def test_sigterm_says_one_line_saves_and_exits_75(place, alone):
    child = toxify(place, "asked")
    wait_for(place / "asked/toxic/checkpoints/20", child)
    child.terminate()
    _, printed = child.communicate(timeout=300)
    assert child.returncode == 75
    [line] = [line for line in printed.splitlines() if line.startswith("unidetox: ")]
    assert line.startswith("unidetox: toxify: stopped, saved at step ") and "Traceback" not in printed
    saved = int(line.split("step ")[1].split()[0])
    assert (place / f"asked/toxic/checkpoints/{saved}").exists()
    child = toxify(place, "asked")
    _, printed = child.communicate(timeout=600)
    assert child.returncode == 0 and f"continues from step {saved} of {STEPS}" in printed, printed
    assert_the_same(place, "asked")


@pytest.mark.slow
def test_sigterm_before_training_exits_75_at_once(place):
    child = toxify(place, "early")
    wait_for(place / "early/toxic/stage.partial.json", child)
    time.sleep(0.3)  # it reads the tokenizer, the texts, the weights
    child.terminate()
    _, printed = child.communicate(timeout=300)
    assert child.returncode == 75
    assert len([line for line in printed.splitlines() if line.startswith("unidetox: ")]) == 1
