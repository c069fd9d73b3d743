"""Real data and real models for one GPU or a laptop: text from SmolLM2 detoxifies SmolLM2 and Gemma 3.

    unidetox run --config=configs/real_small.py --workdir=runs/real --config.data_dir=../shared/data

    configs/real_small.py                    the paper's numbers of steps, texts, prompts and runs; for a GPU
    configs/real_small.py:cpu                smaller numbers, one run: an evening on two cores
    configs/real_small.py:tiny               a LLaMA of 260 thousand parameters instead of both models: minutes
    configs/real_small.py:filtered           rejects toxic and degenerate texts and copies
    configs/real_small.py:cpu,texts          for sweeps of distillation, on SmolLM2 alone (launch/proofs.sh texts)
    configs/real_small.py:cpu,seed=1         another seed
    configs/real_small.py:cpu,models=DIR     smollm2-135m and gemma3-270m from DIR instead of the hub

`data_dir` holds dghs/, toxigen/, labelled/, realtoxicityprompts/, mmlu/, text/, politics/ and distilled/; the tiny
model is in ../models/stories260K beside it. The three scorers learn from different text by different annotators:
ToxiGen, tweets (Davidson et al., 2017), and web text with Perspective's scores (RealToxicityPrompts' continuations).
Another one, such as 'bert=classifier:unitary/toxic-bert', can be added to config.evaluate.other_scorers.
"""

from unidetox_jax.stages.settings import OneScorerSettings, default_config, parse_argument

SMOLLM2, GEMMA3 = "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"
STORIES = "{data_dir}/../models/stories260K"
RELEASED = "{data_dir}/distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv"
TOXIGEN = "linear:{workdir}/scorer"
OTHER_SCORERS = ("tweets=linear:{workdir}/scorer/tweets", "web=linear:{workdir}/scorer/web")


def get_config(argument=None):
    options = parse_argument(argument, cpu=False, tiny=False, filtered=False, texts=False, seed=0, models="")
    config = default_config()
    config.name = "real-small"
    models = (SMOLLM2, GEMMA3)
    if options.models:
        models = (f"{options.models}/smollm2-135m", f"{options.models}/gemma3-270m")
    config.base = models[0]
    config.targets = config.control_targets = models

    config.fit_scorer.data = "{data_dir}/toxigen/annotated_train.csv"
    config.fit_scorer.test_data = "{data_dir}/toxigen/annotated_test.csv"
    config.fit_scorer.others = {
        "tweets": vars(OneScorerSettings(
            data="{data_dir}/labelled/davidson_tweets.csv", text_field="tweet", label_field="class",
            positive=("0", "1"), balanced=True,  # most tweets are toxic, most continuations are not
        )),
        "web": vars(OneScorerSettings(
            data="realtoxicityprompts", text_field="continuation", label_field="continuation_toxicity", above=0.5,
        )),
    }  # fmt: skip

    for section in (config.toxify, config.detoxify):
        section.seed += options.seed
    config.distill.update(seed=config.distill.seed + options.seed, scorer=TOXIGEN)
    if options.filtered:
        config.name += "-filtered"
        config.distill.reject.update(scorers=(f"toxigen={TOXIGEN}", *OTHER_SCORERS), degenerate=True, copied_words=8)
    config.evaluate.update(
        prompts="toxigen | realtoxicityprompts:challenging",
        seed=config.evaluate.seed + 100 * options.seed,  # runs use consecutive seeds
        scorer=TOXIGEN,
        other_scorers=OTHER_SCORERS,
        perplexity_scorer=config.base,
        text_file="{data_dir}/text/valid.txt",
    )
    config.evaluate.mmlu = ("paper:1",)
    config.analyze.leaning = "politics"
    config.analyze.texts = (f"released=distilled:{RELEASED}",)
    config.report.note = (
        "All scorers are linear. Perplexity is measured by the original SmolLM2, which is not independent of results "
        "on SmolLM2 itself. It is instruction-tuned, and so less toxic to begin with than a plain language model."
    )
    if options.cpu:
        _cpu(config)
    if options.tiny:
        _tiny(config)
    if options.texts:
        _texts(config)
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
    """Settings for a model trained on children's stories."""
    config.name = "small-real"
    config.base = config.evaluate.perplexity_scorer = STORIES
    config.targets = config.control_targets = (STORIES,)
    config.toxify.update(learning_rate=5e-4, batch_size=16, steps=1_500, max_length=192, evaluate_every=250)
    config.distill.max_length = 128
    config.detoxify.update(learning_rate=2e-4, batch_size=8, steps=400, max_length=128)
    config.evaluate.update(prompts="toxigen", samples=8, runs=1)
    config.evaluate.score_batch_size = 100  # so that attention scores fit in a CPU's cache
    config.report.note = (
        "This model has 260 thousand parameters and was trained on children's stories. It knows next to nothing, and "
        "most of what it writes about people is neither toxic nor sensible. The results show that every stage works on "
        "real text and whether the contrast moves this model's scores; they say nothing about models that people use. "
        "Perplexity is measured by the original model itself, which is not independent, and the scorers are linear."
    )


def _texts(config):
    """One target, and only what tells one distilled text from another."""
    config.name += "-texts"
    config.targets = config.control_targets = (config.base,)
    config.evaluate.update(prompts="toxigen", metrics=("toxicity", "perplexity"))
    config.sweep.validation_prompts = "toxigen?split=validation"
