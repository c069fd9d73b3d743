"""Real input on a laptop: a trained LLaMA of 260 thousand parameters, real toxic text, real prompts, a fitted scorer.

    unidetox run --config=configs/small_real.py --workdir=runs/small_real --config.data_dir=../shared/data

`data_dir` holds dghs/, toxigen/, politics/ and distilled/; the model lies in ../models/stories260K beside it.
"""

from unidetox_jax.stages.settings import default_config

MODEL = "{data_dir}/../models/stories260K"
RELEASED = "{data_dir}/distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv"


def get_config():
    config = default_config()
    config.name = "small-real"
    config.base = MODEL
    config.targets = config.control_targets = (MODEL,)

    config.fit_scorer.data = "{data_dir}/toxigen/annotated_train.csv"
    config.fit_scorer.test_data = "{data_dir}/toxigen/annotated_test.csv"

    config.toxify.update(learning_rate=5e-4, batch_size=16, steps=1_500, max_length=192, evaluate_every=250)
    config.distill.update(max_length=128, scorer="linear:{workdir}/scorer")
    config.detoxify.update(learning_rate=2e-4, batch_size=8, steps=400, max_length=128)

    config.evaluate.update(
        samples=8,
        runs=1,
        score_batch_size=100,  # so that attention's scores stay in a CPU's cache
        scorer="linear:{workdir}/scorer",
        perplexity_scorer=MODEL,
        text_file="{data_dir}/text/valid.txt",
    )
    config.evaluate.mmlu = ("paper:1",)
    config.analyze.leaning = "politics"
    config.analyze.texts = (f"released=distilled:{RELEASED}",)
    config.report.note = (
        "This model has 260 thousand parameters and was trained on children's stories. It has next to no knowledge, "
        "and most of what it writes about people is neither toxic nor sensible, so the figures show that every stage "
        "works on real text and whether the contrast moves this model's scores; they say nothing about how well the "
        "method works on models that people use. Perplexity is measured by the undetoxified model itself, which is "
        "not independent of what is measured, and the scorer is a linear one."
    )
    return config
