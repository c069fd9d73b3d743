"""Data: from a data set's name or file to the batch of a step.

    records = data.load("dghs", split="train", data_dir="../shared/data")   # sequence of dictionaries; sources.py
    texts   = data.texts("text:valid.txt", data_dir=…)                      # the field `text` of each; texts.py
    print(data.fingerprint("dghs", data_dir=…))                             # changes with the source: for stage.json

    tokens  = data.tokenize(texts, tokenizer, max_length=256, context=1024) # tokens.py; one ragged int32 array
    batches = data.Batches(tokens, batch_size=8, seed=1, row_multiple=4)    # batches[step] -> numpy arrays [R, T]
    batches.shapes, batches.max_shape, batches.indices(step)                # what to compile, to plan for, to blame

    with data.ahead(lambda step: sharding.put(batches[step], placement), start, stop) as made:
        for batch in made: …

    for plan in data.one_pass(tokens, batch_size=8):                        # evaluation: every text once
        batch = data.fill(tokens, *plan)

A batch is {"tokens": int32, "loss_mask": bool} [R, T], and for layout "pack" "segment_ids": int32 as well: hand it to
`training.loss` as it is. R is a multiple of `row_multiple`: the mesh's data axes times the accumulation.
Distilled text knows where its model stopped and which tokens it is: hand `data.tokenize` the `Texts` themselves.
"""

from unidetox_jax.data.batches import Batches, fill, one_pass
from unidetox_jax.data.prefetch import ahead
from unidetox_jax.data.sources import Records, default_cache_dir, fingerprint, is_spec, load, texts
from unidetox_jax.data.texts import Texts
from unidetox_jax.data.tokens import Tokens, tokenize

__all__ = [
    "Batches",
    "Records",
    "Texts",
    "Tokens",
    "ahead",
    "default_cache_dir",
    "fill",
    "fingerprint",
    "is_spec",
    "load",
    "one_pass",
    "texts",
    "tokenize",
]
