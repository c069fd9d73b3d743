"""Batches depend on the step alone, hold each text once an epoch, and the same texts in every layout."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import AutoTokenizer

from unidetox_jax import data, sharding
from unidetox_jax.data import packing
from unidetox_jax.data.tokens import Tokens
from unidetox_jax.errors import UserError


def make_tokens(lengths, max_length=64, release=False):
    """Text i has tokens 1000·(i + 1) + 0, 1, 2…, so any piece of it shows where it came from."""
    ids = [1000 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]
    return Tokens(
        ids=np.concatenate(ids).astype(np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        rows=np.arange(len(lengths), dtype=np.int32),
        pad_id=7,
        max_length=max_length,
        reproduce_release=release,
    )


@pytest.fixture(scope="module")
def tokens():
    lengths = np.random.default_rng(0).geometric(1 / 14, 203).clip(2, 64)
    return make_tokens(lengths.tolist())


def texts_of(batch):
    """The texts of a batch, recovered from its arrays alone, sorted."""
    segments = batch.get("segment_ids")
    texts = []
    for row, ids in enumerate(batch["tokens"]):
        marks = segments[row] if segments is not None else (ids != 7).astype(int)
        texts += [tuple(ids[marks == segment].tolist()) for segment in range(1, marks.max(initial=0) + 1)]
    return sorted(texts)


@pytest.mark.parametrize("size", [1, 4, 8, 32])
@pytest.mark.parametrize("rows", [1, 4])
def test_packed_and_padded_steps_hold_the_same_texts(tokens, size, rows):
    packed = data.Batches(tokens, size, seed=3, row_multiple=rows)
    padded = data.Batches(tokens, size, seed=3, layout="pad", row_multiple=rows)
    for step in (0, 1, 17, 400):
        expected = sorted(tuple(tokens[index].tolist()) for index in packed.indices(step))
        assert texts_of(packed[step]) == texts_of(padded[step]) == expected
        for batch in (packed[step], padded[step]):
            assert batch["tokens"].shape[0] % rows == 0
            assert batch["loss_mask"].sum() == sum(len(text) - 1 for text in expected)


def test_targets_are_all_tokens_except_the_first_of_each_text(tokens):
    batch = data.Batches(tokens, 8, seed=0)[5]
    firsts = batch["tokens"] % 1000 == 0
    assert (batch["loss_mask"] == ((batch["segment_ids"] > 0) & ~firsts)).all()
    assert batch["segment_ids"].max() > 1, "nothing is packed"
    assert (batch["tokens"][batch["segment_ids"] == 0] == 7).all()
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32,
        "loss_mask": np.bool_,
        "segment_ids": np.int32,
    }


def test_a_text_is_never_split(tokens):
    batches = data.Batches(tokens, 16, seed=0)
    for step in range(10):
        batch = batches[step]
        for ids, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                (where,) = np.nonzero(segments == segment)
                assert (np.diff(where) == 1).all() and (np.diff(ids[where]) == 1).all()


def test_each_epoch_holds_every_text_once_in_a_new_order(tokens):
    batches = data.Batches(tokens, 29, seed=5)  # 203 = 7 · 29
    epochs = [np.concatenate([batches.indices(step) for step in range(7 * e, 7 * e + 7)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(203))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_batch_depends_on_step_and_seed_only(tokens):
    first, again = data.Batches(tokens, 8, seed=11), data.Batches(tokens, 8, seed=11)
    assert first.shapes == again.shapes
    for step in (900, 3, 41):  # in any order, as a resumed run asks for them
        for name, array in first[step].items():
            np.testing.assert_array_equal(array, again[step][name])
    assert not (data.Batches(tokens, 8, seed=12).indices(0) == first.indices(0)).all()


def test_a_batch_may_be_larger_than_the_data():
    batches = data.Batches(make_tokens([3, 4]), 5, seed=0)
    assert sorted(np.bincount(batches.indices(0)).tolist()) == [2, 3]
    assert batches[0]["loss_mask"].sum() == sum(len(batches.tokens[i]) - 1 for i in batches.indices(0))


def test_number_of_shapes_is_limited_and_the_largest_known(tokens):
    batches = data.Batches(tokens, 8, seed=0, max_shapes=4)
    shapes = {batches[step]["tokens"].shape for step in range(100)}
    assert shapes <= set(batches.shapes) and len(batches.shapes) <= 4
    assert batches.max_shape == (8, 64)
    assert max(rows * length for rows, length in shapes) <= 8 * 64
    assert all(length % 32 == 0 for _, length in batches.shapes)
    assert data.Batches(tokens, 8, seed=0, max_shapes=1).shapes == ((8, 64),)


def test_worst_batch_fits_even_if_not_sampled():
    tokens = make_tokens([64] * 3 + [2] * 500)
    batches = data.Batches(tokens, 3, seed=0)
    shape, rows = packing.arrange([64, 64, 64], batches.shapes, batches.layout)
    assert shape == (3, 64) and rows == ((0,), (1,), (2,))


def test_reproduced_release_trains_on_padding():
    tokens = make_tokens([3, 9, 5], release=True)
    batches = data.Batches(tokens, 2, seed=0, row_multiple=4)
    batch = batches[0]
    assert batches.shapes == ((4, 9),) and set(batch) == {"tokens", "loss_mask"}
    assert batch["loss_mask"][:2, 1:].all() and not batch["loss_mask"][:, 0].any()
    assert not batch["loss_mask"][2:].any(), "rows added for the mesh have no loss"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "packed"}, "layout: no 'packed'; did you mean 'pack'"),
        ({"batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({"max_shapes": 0}, "max_shapes: found 0"),
        ({"row_multiple": 0}, "row_multiple: found 0"),
        ({"seed": -1}, "seed: found -1, expected 0 to 4294967295"),
    ],
)
def test_mistakes(tokens, settings, message):
    with pytest.raises(UserError, match=message):
        data.Batches(tokens, **{"batch_size": 8, "seed": 0, **settings})


def test_batches_have_no_end(tokens):
    with pytest.raises(TypeError, match="no end"):
        list(data.Batches(tokens, 8, seed=0))


# ---------------------------------------------------------------- packing


def test_first_fit_decreasing():
    assert packing.pack([5, 4, 3, 2, 6], 10) == [[4, 1], [0, 2, 3]]
    assert packing.pack([4, 4, 4], 8) == [[0, 1], [2]]


def test_arrange_takes_the_cheapest_shape_that_fits():
    shapes = ((4, 64), (1, 32), (2, 32))
    assert packing.arrange([10, 20], shapes, "pack") == ((1, 32), ((0, 1),))
    assert packing.arrange([20, 20], shapes, "pack") == ((2, 32), ((0,), (1,)))
    assert packing.arrange([10, 20], shapes, "pad") == ((2, 32), ((0,), (1,)))
    assert packing.arrange([40, 20, 9], shapes, "pack") == ((4, 64), ((0, 1), (2,), (), ()))
    with pytest.raises(ValueError, match="fit none"):
        packing.arrange([65], shapes, "pack")


def test_chosen_shapes_save_the_most_padding():
    grid = packing.make_grid("pad", 4, 64, 1, 16, 64)
    batches = [[16] * 4] * 90 + [[48] * 4] * 9 + [[64] * 4]
    assert packing.choose_shapes(batches, grid, 64, 2) == ((4, 64), (4, 16))
    assert packing.choose_shapes(batches, grid, 64, 8) == ((4, 64), (4, 16), (4, 48)), "more would save nothing"


def test_lengths_never_exceed_the_limit():
    assert packing.make_grid("pack", 3, 40, 2, 32, 50) == packing.Grid("pack", 2, 4, (32, 50))
    assert packing.make_grid("pad", 3, 40, 2, 32, 500) == packing.Grid("pad", 2, 4, (32, 64))


# ---------------------------------------------------------------- evaluation, placement, real text


def test_an_epoch_holds_every_text_once(tokens):
    plans = data.epoch_plans(tokens, 8, row_multiple=4)
    texts = [text for _, rows in plans for row in rows for text in row]
    assert sorted(texts) == list(range(203)) and len(plans) == 26
    targets = 0
    for shape, rows in plans:
        batch = data.collate(tokens, shape, rows)
        assert set(batch) == {"tokens", "loss_mask"} and shape[0] == 8
        targets += batch["loss_mask"].sum()
    assert targets == len(tokens.ids) - 203
    assert len({shape for shape, _ in plans}) <= 6


def test_put_gives_each_device_its_rows(tokens):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    placement = NamedSharding(mesh, PartitionSpec("data"))
    batch = data.Batches(tokens, 6, seed=0, row_multiple=4)[0]
    placed = sharding.put(batch, placement)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == placement
        rows = array.shape[0] // 4
        for shard in placed[name].addressable_shards:
            assert shard.data.shape == (rows, array.shape[1])


def test_real_text_packs_well(shared, tmp_path):
    """DGHS with GPT-2's tokenizer at batch size 8: eight shapes hold it with a tenth to a seventh of padding."""
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    spec = "dghs?file=dghs/db_test.csv"
    tokens = data.tokenize(data.texts(spec, "test", shared / "data", tmp_path), gpt2, 512, context=1024)
    shares = {}
    for name in packing.LAYOUTS:
        batches = data.Batches(tokens, 8, seed=0, layout=name)
        plans = [batches.plan(step) for step in range(3 * len(tokens) // 8)]
        real = sum(len(tokens[text]) for _, rows in plans for row in rows for text in row)
        shares[name] = real / sum(rows * length for (rows, length), _ in plans)
        assert len(batches.shapes) <= 8
    assert shares["pack"] > 0.8 and shares["pack"] > 1.6 * shares["pad"], shares
