"""Data: from a data set's name or file to the batch of a step.

    records = data.load("dghs", split="train", data_dir="../shared/data")   # sequence of dictionaries; sources.py
    texts   = data.texts("text:valid.txt", data_dir=…)                      # the field `text` of each; sources.py
    print(data.fingerprint("dghs", data_dir=…))                             # changes with the source: for stage.json

    tokens  = data.tokenize(texts, tokenizer, max_length=256, context=1024) # tokens.py; one ragged int32 array
    batches = data.Batches(tokens, batch_size=8, seed=1, row_multiple=4)    # batches[step] -> numpy arrays [R, T]
    batches.shapes, batches.max_shape, batches.indices(step)                # to compile, for peak memory, to debug

    with data.prefetch(lambda step: sharding.put(batches[step], placement), start, stop) as device_batches:
        for batch in device_batches: …

    for plan in data.epoch_plans(tokens, batch_size=8):                     # evaluation: every text once
        batch = data.collate(tokens, *plan)

A batch is {"tokens": int32, "loss_mask": bool} [R, T], with "segment_ids": int32 for layout "pack"; `training.loss`
takes it as it is. R is a multiple of `row_multiple`: the product of the mesh's data axes times the accumulation.
Pass distilled text to `data.tokenize` as `Texts`, which knows its sampled tokens and which texts ended.
"""

from unidetox_jax.data.batches import Batches, collate, epoch_plans, prefetch
from unidetox_jax.data.sources import Records, default_cache_dir, fingerprint, is_spec, load, texts
from unidetox_jax.data.texts import Texts
from unidetox_jax.data.tokens import Tokens, tokenize

__all__ = [
    "Batches",
    "Records",
    "Texts",
    "Tokens",
    "collate",
    "default_cache_dir",
    "epoch_plans",
    "fingerprint",
    "is_spec",
    "load",
    "prefetch",
    "texts",
    "tokenize",
]
