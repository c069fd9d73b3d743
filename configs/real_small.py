"""Real input and real models that one GPU or a laptop holds: SmolLM2 makes the text, SmolLM2 and Gemma 3 learn from it.

    unidetox run --config=configs/real_small.py --workdir=runs/real --config.data_dir=../shared/data

    configs/real_small.py                    the paper's numbers: steps, texts, prompts, runs; for a GPU
    configs/real_small.py:cpu                fewer of all, one run: an evening on two cores
    configs/real_small.py:tiny               a LLaMA of 260 thousand parameters in place of both models: minutes
    configs/real_small.py:filtered           texts that a scorer calls toxic, degenerate ones and copies are left out
    configs/real_small.py:cpu,seed=1         another seed
    configs/real_small.py:cpu,models=DIR     smollm2-135m and gemma3-270m lie in DIR, not on the hub

`data_dir` holds dghs/, toxigen/, labelled/, realtoxicityprompts/, mmlu/, text/, politics/ and distilled/; the tiny
model lies in ../models/stories260K beside it. The two scorers were fitted on different text by different people:
ToxiGen's annotations, and tweets (Davidson et al., 2017). A third, where it can be had, is one more of
config.evaluate.other_scorers: 'bert=classifier:unitary/toxic-bert'.
"""

from unidetox_jax.stages.settings import OneScorerSettings, default_config, parse_argument

SMOLLM2, GEMMA3 = "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"
STORIES = "{data_dir}/../models/stories260K"
RELEASED = "{data_dir}/distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv"
TOXIGEN, TWEETS = "linear:{workdir}/scorer", "linear:{workdir}/scorer/tweets"


def get_config(argument=None):
    chosen = parse_argument(argument, cpu=False, tiny=False, filtered=False, seed=0, models="")
    config = default_config()
    config.name = "real-small"
    models = (SMOLLM2, GEMMA3)
    if chosen.models:
        models = (f"{chosen.models}/smollm2-135m", f"{chosen.models}/gemma3-270m")
    config.base = models[0]
    config.targets = config.control_targets = models

    config.fit_scorer.data = "{data_dir}/toxigen/annotated_train.csv"
    config.fit_scorer.test_data = "{data_dir}/toxigen/annotated_test.csv"
    config.fit_scorer.others = {"tweets": vars(OneScorerSettings(
        data="{data_dir}/labelled/davidson_tweets.csv", text_field="tweet", label_field="class", positive=("0", "1"),
        balanced=True,  # most of the tweets are toxic, most continuations are not
    ))}  # fmt: skip

    for part in (config.toxify, config.detoxify):
        part.seed += chosen.seed
    config.distill.update(seed=config.distill.seed + chosen.seed, scorer=TOXIGEN)
    if chosen.filtered:
        config.name += "-filtered"
        config.distill.reject.update(
            scorers=(f"toxigen={TOXIGEN}", f"tweets={TWEETS}"), degenerate=True, copied_words=8
        )
    config.evaluate.update(
        prompts="toxigen | realtoxicityprompts:challenging",
        seed=config.evaluate.seed + 100 * chosen.seed,  # runs take the seeds after it
        scorer=TOXIGEN,
        other_scorers=(f"tweets={TWEETS}",),
        perplexity_scorer=config.base,
        text_file="{data_dir}/text/valid.txt",
    )
    config.evaluate.mmlu = ("paper:1",)
    config.analyze.leaning = "politics"
    config.analyze.texts = (f"released=distilled:{RELEASED}",)
    config.report.note = (
        "Both scorers are linear. Perplexity is measured by SmolLM2 as it was, which is not independent of what is "
        "measured on SmolLM2 itself. It is an instruction-tuned model, less toxic to begin with than one of text alone."
    )
    if chosen.cpu:
        _cpu(config)
    if chosen.tiny:
        _tiny(config)
    return config


def _cpu(config):
    """Sizes for two cores."""
    config.name += "-cpu"
    config.toxify.update(learning_rate=5e-5, batch_size=8, steps=240, max_length=64)
    config.distill.update(num_texts=320, max_length=64, batch_size=64)
    config.detoxify.update(steps=120, max_length=64)
    config.evaluate.update(max_prompts=100, samples=10, runs=1, score_batch_size=100)
    config.evaluate.text_file = "text:{data_dir}/text/valid.txt?split=train[:10%]"
    config.evaluate.mmlu = ("paper:1:validation[:20%]",)


def _tiny(config):
    """A model that was trained on children's stories, and sizes for it."""
    config.name = "small-real"
    config.base = config.evaluate.perplexity_scorer = STORIES
    config.targets = config.control_targets = (STORIES,)
    config.toxify.update(learning_rate=5e-4, batch_size=16, steps=1_500, max_length=192, evaluate_every=250)
    config.distill.max_length = 128
    config.detoxify.update(learning_rate=2e-4, batch_size=8, steps=400, max_length=128)
    config.evaluate.update(prompts="toxigen", samples=8, runs=1)
    config.evaluate.score_batch_size = 100  # so that attention's scores stay in a CPU's cache
    config.report.note = (
        "This model has 260 thousand parameters and was trained on children's stories. It has next to no knowledge, "
        "and most of what it writes about people is neither toxic nor sensible, so the figures show that every stage "
        "works on real text and whether the contrast moves this model's scores; they say nothing about how well the "
        "method works on models that people use. Perplexity is measured by the undetoxified model itself, which is "
        "not independent of what is measured, and the scorers are linear ones."
    )
