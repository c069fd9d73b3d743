"""The training loop: whatever happens to it, it ends with the parameters that it would have had."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from finetune_helpers import LENGTH, lines_of, make_world

from unidetox_jax import checkpoint, data, models, sharding, training
from unidetox_jax.errors import Preempted, UserError
from unidetox_jax.training import loop, training_log

STEPS = 9
OPTIMIZER = training.Optimizer(learning_rate=1e-3, steps=STEPS)
SCHEDULE = training.LoopSettings(STEPS, save_minutes=0.0, keep=2, evaluate_every=4, log_every=3)  # saves with each line


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(cfg, parameters in host memory, batches, validation) of a tiny GPT-2 with dropout."""
    world = make_world(tmp_path_factory.mktemp("world"))
    model = checkpoint.load(world / "weights/gpt2")
    tokenizer = checkpoint.load_tokenizer(world / "weights/gpt2")
    tokens = data.tokenize(data.texts(f"jsonl:{world}/toxic.jsonl"), tokenizer, LENGTH)
    batches = data.Batches(tokens, 8, seed=3, layout="pad")
    validation = data.tokenize(data.texts(f"jsonl:{world}/valid.jsonl"), tokenizer, LENGTH)
    return model.cfg, jax.device_get(model.params), batches, validation


class Interrupted:
    """Batches; SIGTERM comes while that of `step` is made."""

    def __init__(self, batches, step):
        self._batches, self._step = batches, step
        self.tokens, self.batch_size, self.indices = batches.tokens, batches.batch_size, batches.indices

    def __getitem__(self, step):
        if step == self._step:
            signal.raise_signal(signal.SIGTERM)
        return self._batches[step]


def fit(
    directory, parts, schedule=SCHEDULE, optimizer=OPTIMIZER, stop_at=None, initial=None, dropout_seed=7, **options
):
    cfg, params, batches, validation = parts
    mesh = sharding.single_device_mesh()
    if stop_at is not None:
        batches = Interrupted(batches, stop_at)
    begin = initial or (lambda: jax.device_put(params, sharding.param_shardings(params, mesh)))
    options = {"validation": validation, "dropout_seed": dropout_seed}
    return training.fit(directory, cfg, begin, batches, schedule, optimizer, mesh, **options)


def bits(params) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """The run that nothing happened to: (directory, parameters' bits, figures)."""
    directory = tmp_path_factory.mktemp("alone")
    params, figures = fit(directory, parts)
    return directory, bits(params), figures


def assert_lines(directory, alone, stopped):
    """The same figures at the same steps, and perhaps one more line where it stopped."""
    lines = lines_of(directory)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    by_step = {line["step"]: line for line in lines}
    for line in lines_of(alone):
        assert by_step.pop(line["step"]) == line
    assert set(by_step) <= stopped


def never():
    raise AssertionError("the initial parameters were asked for, although there is a checkpoint")


def test_it_trains_and_says_so(alone, parts):
    directory, final, figures = alone
    lines = lines_of(directory)
    assert [line["step"] for line in lines] == [0, 3, 4, 6, 8, 9]  # logged or evaluated
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 8, 9]
    assert figures["validation_loss"] < figures["validation_loss_before"]
    assert figures["steps"] == STEPS
    cfg, params, batches, _ = parts
    targets = sum(int(batches[step]["loss_mask"].sum()) for step in range(STEPS))
    assert figures["tokens"] == targets == lines[-1]["tokens"]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    np.testing.assert_allclose(rates, [1e-3 * (1 - (step - 1) / STEPS) for step in (3, 4, 6, 8, 9)], rtol=1e-6)
    assert final != bits(params)


@pytest.mark.slow
def test_the_evaluation_loss_is_the_mean_over_all_targets(alone, parts):
    cfg, params, _, validation = parts
    total = targets = 0.0
    for index in range(len(validation)):
        row = jnp.asarray(validation[index])[None]
        log_probs = jax.nn.log_softmax(models.forward(params, row, cfg))
        total -= float(jnp.take_along_axis(log_probs[:, :-1], row[:, 1:, None], -1).sum())
        targets += row.shape[1] - 1
    before = lines_of(alone[0])[0]["validation_loss"]
    np.testing.assert_allclose(before, total / targets, rtol=1e-5)


def test_figures_are_the_steps_own(parts, tmp_path):
    """A line has the loss of that step's batch: the first one needs no training to be known."""
    cfg, params, batches, _ = parts
    expected, _ = training.loss(params, batches[0], cfg)
    one = training.Optimizer(learning_rate=1e-3, steps=1)
    _, figures = fit(tmp_path, parts, training.LoopSettings(1, log_every=1), one, dropout_seed=None)
    np.testing.assert_allclose(figures["train_loss"], float(expected), rtol=1e-5)
    assert figures["steps"] == 1


@pytest.mark.parametrize("stop_at", [1, 5])
def test_sigterm_saves_and_the_next_run_continues_bit_for_bit(stop_at, alone, parts, tmp_path):
    with pytest.raises(Preempted, match=r"saved at step \d of 9; the same command continues") as stopped:
        fit(tmp_path, parts, stop_at=stop_at)
    assert stopped.value.exit_code == 75
    saved = checkpoint.Checkpointer(tmp_path / "checkpoints").latest_step()
    assert 1 <= saved <= stop_at + 2 and lines_of(tmp_path)[-1]["step"] == saved
    params, figures = fit(tmp_path, parts, initial=never)
    assert bits(params) == alone[1]
    assert_lines(tmp_path, alone[0], {saved})
    assert figures["tokens"] == alone[2]["tokens"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_is_not_trained_again(alone, parts):
    before = (alone[0] / "metrics.jsonl").read_bytes()
    params, figures = fit(alone[0], parts, initial=never)
    assert bits(params) == alone[1] and figures == alone[2]
    assert (alone[0] / "metrics.jsonl").read_bytes() == before


def test_a_damaged_newest_checkpoint_is_passed_over(alone, parts, tmp_path, caplog):
    with pytest.raises(Preempted):
        fit(tmp_path, parts, stop_at=6)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    newest = tmp_path / "checkpoints" / str(steps[-1])
    for file in [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 1000]:
        file.write_bytes(file.read_bytes()[:100])
    params, _ = fit(tmp_path, parts, initial=never)
    assert f"checkpoint of step {steps[-1]} is damaged" in caplog.text
    assert bits(params) == alone[1]
    assert_lines(tmp_path, alone[0], set())  # what was told after the readable one was told again, once


def spoiled(monkeypatch, at, figure="loss", value=float("nan")):
    """The step number `at` (from 1) reports `value`."""
    make = loop.make_train_step

    def make_spoiled(*arguments, **options):
        step, count = make(*arguments, **options), iter(range(1, 100))

        def spoiled_step(state, batch):
            state, figures = step(state, batch)
            return state, ({**figures, figure: jnp.float32(value)} if next(count) == at else figures)

        return spoiled_step

    monkeypatch.setattr(loop, "make_train_step", make_spoiled)


@pytest.mark.parametrize(
    ("at", "figure", "value", "kept"),
    [
        (5, "loss", np.nan, 3),
        (6, "loss", np.inf, 3),
        (6, "grad_norm", np.nan, 3),
        (7, "loss", np.nan, 6),
        (1, "loss", np.nan, None),
    ],
)
def test_a_bad_loss_stops_and_no_state_after_it_is_saved(at, figure, value, kept, parts, tmp_path, monkeypatch):
    spoiled(monkeypatch, at, figure, value)
    with pytest.raises(UserError) as stopped:
        fit(tmp_path, parts)
    message = str(stopped.value)
    tokens, indices = parts[2].tokens, parts[2].indices(at - 1)
    assert f"training: step {at}: " in message and str(value) in message
    assert f"on rows {', '.join(str(tokens.rows[index]) for index in indices)} of the data" in message
    assert f"checkpoint of step {kept} is kept" in message if kept else "no checkpoint was written yet" in message
    assert checkpoint.Checkpointer(tmp_path / "checkpoints").latest_step() == kept
    assert lines_of(tmp_path)[-1]["step"] < at


def test_after_a_bad_loss_the_kept_checkpoint_goes_on(alone, parts, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        spoiled(patched, 5)
        with pytest.raises(UserError):
            fit(tmp_path, parts)
    params, _ = fit(tmp_path, parts, initial=never)
    assert bits(params) == alone[1]


def test_figures_are_read_while_later_steps_run(parts, tmp_path, monkeypatch):
    order = []
    make, read = loop.make_train_step, loop._MetricsReader._read

    def make_noting(*arguments, **options):
        step = make(*arguments, **options)
        return lambda state, batch: (order.append("begin"), step(state, batch))[1]

    monkeypatch.setattr(loop, "make_train_step", make_noting)
    monkeypatch.setattr(loop._MetricsReader, "_read", lambda self, *a: (order.append("read"), read(self, *a)))
    fit(tmp_path, parts, training.LoopSettings(STEPS, evaluate_every=100))
    assert order == ["begin"] * 3 + ["read", "begin"] * (STEPS - 3) + ["read"] * 3


def test_another_models_checkpoint_is_refused(alone, parts, tmp_path):
    cfg, _, batches, validation = parts
    wider = dataclasses.replace(cfg, hidden_size=48, intermediate_size=64)
    with pytest.raises(UserError, match=r"checkpoint of step 9: leaf .* has shape .*, expected"):
        training.fit(
            alone[0], wider, never, batches, SCHEDULE, OPTIMIZER, sharding.single_device_mesh(), validation=validation
        )


def test_checkpoints_beyond_the_end_are_refused(alone, parts):
    with pytest.raises(UserError, match="holds step 9, but training ends at step 5"):
        fit(alone[0], parts, training.LoopSettings(5), initial=never)


def test_a_full_disk_is_one_line_and_the_lines_before_it_stay(parts, tmp_path, monkeypatch):
    fit(tmp_path, parts, training.LoopSettings(1, log_every=1), training.Optimizer(learning_rate=1e-3, steps=1))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    log = training_log.Log(tmp_path, 1)
    log.record(2, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "targets": 3.0})
    log.add_line()
    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        log.flush()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_metrics_file_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: not a line of metrics"):
        training_log.Log(tmp_path, 1)


def test_tensorboard_is_told_the_same_and_of_a_restart(tmp_path):
    for step, first in ((0, 1), (1, 2)):
        log = training_log.Log(tmp_path, step)
        for number in (first, first + 1):
            log.record(number, {"loss": number / 2, "grad_norm": 1.0, "learning_rate": 1e-3, "targets": 5.0})
            log.add_line()
        log.flush()
        (tmp_path / "tensorboard").rename(tmp_path / f"events{step}")
    assert [line["step"] for line in training_log.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert events(tmp_path / "events0")[:2] == [("restart", 0, None), ("loss", 1, 0.5)]
    assert ("restart", 2, None) == events(tmp_path / "events1")[0]
    assert [event for event in events(tmp_path / "events1") if event[0] == "loss"] == [
        ("loss", 2, 1.0),
        ("loss", 3, 1.5),
    ]


def events(directory):
    """(tag, step, value) of every event in the directory's only file."""
    from tensorboardX.proto import event_pb2

    [file] = directory.iterdir()
    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        at += size + 16
        if event.HasField("session_log"):
            found.append(("restart", event.step, None))
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


class FakeTime:
    """A clock of seconds that only a test moves."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def monotonic(self):
        return self.seconds


def saved_steps(monkeypatch, pace, steps, minutes, clock=None, said=None):
    """(steps saved, what process 0 said at which step): `pace(step)` seconds a step; `said`: another process's view."""
    clock, saved, answers = clock or FakeTime(), [], {}
    monkeypatch.setattr(loop, "time", clock)
    own = loop._SaveClock(minutes, 0)
    for step in range(1, steps + 1):
        clock.seconds += pace(step)
        monkeypatch.setattr(
            loop.distributed,
            "broadcast",
            lambda value, step=step: answers.setdefault(step, said[step] if said else value),
        )
        if own.due(step):
            saved.append(step)
            own.saved()
    return saved, answers


def test_checkpoints_come_by_time(monkeypatch):
    """0.3 seconds a step after a minute of compiling, ten minutes between checkpoints: every 2,000 steps or a little
    more; where steps become ten times as slow, an interval that is at most twice as long."""
    saved, answers = saved_steps(monkeypatch, lambda step: 60.0 if step == 1 else 0.3, 20_000, 10.0)
    gaps = np.diff(saved)
    assert len(saved) == 9 and (gaps >= 2000).all() and (gaps <= 2200).all()
    assert len(answers) < 200  # questions to process 0, in 20,000 steps
    slower, _ = saved_steps(monkeypatch, lambda step: 0.3 if step < 5000 else 3.0, 8_000, 10.0)
    seconds = np.diff([min(step, 5000) * 0.3 + max(0, step - 5000) * 3.0 for step in [0, *slower]])
    assert (seconds >= 600).all() and (seconds <= 1200).all()
    assert saved_steps(monkeypatch, lambda step: 1e-3, 5, 0.0)[0] == [1, 2, 3, 4, 5]


def test_every_process_saves_when_the_first_one_says_so(monkeypatch):
    """One whose clock runs three times as fast, and was started later, saves after the same steps."""
    first, answers = saved_steps(monkeypatch, lambda step: 0.7, 5_000, 5.0)
    other, asked = saved_steps(monkeypatch, lambda step: 2.1, 5_000, 5.0, FakeTime(1e6), answers)
    assert first == other and len(first) >= 10 and asked == answers


def test_between_checkpoints_of_ten_minutes_there_is_none(parts, tmp_path):
    """And one takes the room on the disk that plans count: weights and moments as they are, and what describes them."""
    fit(tmp_path, parts, training.LoopSettings(STEPS, evaluate_every=100, log_every=1))
    [only] = (tmp_path / "checkpoints").iterdir()
    assert only.name == str(STEPS)
    state = jax.tree.leaves(training.abstract_state(parts[0], OPTIMIZER, None))
    counted = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    assert counted < sum(path.stat().st_size for path in only.rglob("*") if path.is_file()) < counted + 2**17
