"""Two and four real processes agree with one; stopping or killing one stops all, and training resumes."""

import csv
import io
import json
import re
import signal
import time

import numpy as np
import pytest
from conftest import HANGS
from finetune_helpers import make_world, training, weights, write_config
from processes import command, free_port, joined, start, wait

from unidetox_jax import storage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the configurations of a small complete run and of a long training."""
    place = tmp_path_factory.mktemp("processes")
    world = make_world(place / "world")
    shared = {
        "base": f"{world}/weights/gpt2",
        "targets": (f"{world}/weights/llama",),
        "mesh": "data:2,fsdp:-1",
        "dtype": "float32",
    }
    write_config(
        place / "config.py",
        **shared,
        **training(world, "toxify", save_minutes=9),
        **training(world, "detoxify", save_minutes=9),
        distill__num_texts=10,
        distill__batch_size=8,
        distill__max_length=16,
        distill__top_k=20,
        distill__reject__degenerate=True,
        distill__reject__scorers=("world=lexicon",),
        evaluate__prompts=f"{world}/prompts.jsonl",
        evaluate__max_prompts=4,
        evaluate__samples=2,
        evaluate__runs=1,
        evaluate__max_new_tokens=6,
        evaluate__scorer="lexicon",
        evaluate__perplexity_scorer=f"{world}/weights/opt",
        evaluate__mmlu=(),
    )
    write_config(
        place / "long.py", **shared, **training(world, "toxify", steps=4000, save_minutes=0.02, evaluate_every=4000)
    )
    return place


def launch(place, workdir, count, devices, *arguments, config="config.py"):
    """`unidetox …` in `count` processes; `workdir` is relative to `place` or absolute."""
    address = f"127.0.0.1:{free_port()}"
    workdir = workdir if storage.is_remote(workdir) else place / workdir
    common = [*arguments, f"--config={place / config}", f"--workdir={workdir}"]
    several = [joined(address, count, index) if count > 1 else [] for index in range(count)]
    return start([command([*common, *more]) for more in several], devices)


def run_stages(place, workdir, count, stages=("toxify", "distill", "detoxify", "evaluate")):
    """Runs several stages on eight devices with one command."""
    ended = wait(launch(place, workdir, count, 8 // count, "run", f"--stages={','.join(stages)}"))
    assert [one.code for one in ended] == [0] * count, "\n".join(one.err[-3000:] for one in ended)
    return workdir


@pytest.fixture(scope="module")
def alone(place):
    """The run of a single process on all devices."""
    return run_stages(place, place / "alone", 1)


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([line[name] for line in lines for name in ("loss", "validation_loss") if name in line])


def texts(workdir):
    content = (workdir / "distilled" / "texts.csv").read_bytes().decode()
    return [row["Text"] for row in csv.DictReader(io.StringIO(content, newline=""))]


def evaluated(workdir, form):
    directory = workdir / "evaluation" / f"llama{form}"
    lines = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines], np.array([line["perplexity"] for line in lines], float)


def assert_same_training(several, alone):
    np.testing.assert_allclose(losses(several), losses(alone), rtol=1e-5)
    ours, theirs = weights(several), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_two_processes_in_a_bucket_agree_with_one(place, alone, bucket):
    two = run_stages(place, bucket / "two", 2)
    assert texts(two) == texts(alone) and len(texts(alone)) == 10
    for directory in ("toxic", "detoxified/llama"):
        assert_same_training(two / directory, alone / directory)
    for form in ("", ".detoxified"):
        ours, theirs = evaluated(two, form), evaluated(alone, form)
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)


def test_four_processes_agree_with_one(place, alone):
    four = run_stages(place, place / "four", 4, ("toxify", "distill"))
    assert texts(four) == texts(alone)
    assert_same_training(four / "toxic", alone / "toxic")


def checkpoints(place):
    directory = place / "long" / "toxic" / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def train_beyond(place, step, count, devices, *arguments):
    """Processes that are training and have written a checkpoint later than `step`."""
    processes = launch(place, "long", count, devices, "toxify", *arguments, config="long.py")
    end = time.monotonic() + HANGS
    while max(checkpoints(place), default=0) <= step:
        assert all(process.poll() is None for process in processes), [one.err[-2000:] for one in wait(processes, 60)]
        assert time.monotonic() < end
        time.sleep(0.1)
    return processes


def test_killing_or_stopping_one_of_four_ends_all_and_training_resumes(place):
    processes = train_beyond(place, 0, 4, 1)
    processes[1].kill()
    ended = wait(processes)
    assert ended[1].code == -signal.SIGKILL
    for one in (ended[0], *ended[2:]):
        assert one.code not in (0, 75) and one.err.strip(), one

    # Resumed, until SIGTERM: all save the same step
    step = checkpoints(place)[-1]
    processes = train_beyond(place, step, 4, 1)
    processes[2].send_signal(signal.SIGTERM)
    ended = wait(processes)
    assert [one.code for one in ended] == [75] * 4, [one.err[-2000:] for one in ended]
    assert f"continues from step {step} of 4000" in ended[0].err
    [step] = {int(re.search(r"saved at step (\d+) of 4000", one.last_line)[1]) for one in ended}
    assert checkpoints(place)[-1] == step

    # One process, two devices fewer, another mesh: it resumes from that step
    [other] = train_beyond(place, step, 1, 2, "--config.mesh=fsdp:2")
    other.send_signal(signal.SIGTERM)
    [end] = wait([other])
    assert end.code == 75, end.err[-2000:]
    assert f"continues from step {step} of 4000" in end.err
    found = losses(place / "long" / "toxic")
    assert np.isfinite(found).all() and found[-1] < found[1]
