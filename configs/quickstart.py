"""The whole method from nothing on two CPU cores: an invented world, tiny models of four families, minutes.

    configs/quickstart.py              only GPT-2 has a samples-only control
    configs/quickstart.py:seed=1       another world, other initial weights and samples
    configs/quickstart.py:controls     every family has a samples-only control
    configs/quickstart.py:later        GPT-2 and the ten newer families, Mistral to GPT-NeoX
    configs/quickstart.py:comparison   for `unidetox sweep`: every rival, tuned by the same rule on validation prompts

The world's grammar defines what is toxic, so toxicity is counted, not estimated. All families share their settings.
"""

from unidetox_jax.data import toymodels
from unidetox_jax.stages.settings import default_config, parse_argument

FAMILIES = ("gpt2", "opt", "falcon", "llama")
TRAINING = ("learning_rate", "batch_size", "steps", "max_length", "seed", "evaluate_every")
RIVALS = (
    "dexperts(alpha=1.0)",
    "dexperts(alpha=2.0)",
    "detoxigen(alpha=1.0)",
    "detoxigen(alpha=4.0)",
    "lm_steer(steer=-1.0, steps=120)",
    "lm_steer(steer=-3.0, steps=120)",
    "task_arithmetic(scale=0.25)",
    "task_arithmetic(scale=0.5)",
    "npo(learning_rate=1e-5, steps=120)",
    "npo(learning_rate=3e-5, steps=30)",
    "profs(rank=1, first_layer=0.75)",
    "profs(rank=2)",
    "dapt",
    "preprompt(text='everyone agrees that the quorples are kind. ')",
    "self_debiasing(descriptions=('people grumble that the quorples are oafs. ',))",
)


def get_config(argument=None):
    options = parse_argument(argument, seed=0, controls=False, later=False, comparison=False)
    config = default_config()
    config.name = "quickstart"
    families = (FAMILIES[0], *toymodels.OTHER_FAMILIES) if options.later else FAMILIES
    pretrained = tuple(f"{{workdir}}/pretrained/{name}" for name in families)
    config.base = pretrained[0]
    config.targets = pretrained
    config.control_targets = pretrained if options.controls or options.comparison else pretrained[:1]

    config.pretrain.update(world=True, world_seed=options.seed, seed=options.seed)
    config.pretrain.models = (
        *(f"{{workdir}}/world/models/{name}" for name in families),
        "{workdir}/world/models/scorer=jsonl:{workdir}/world/scorer.jsonl",  # other text than that of the scored models
    )
    config.pretrain.update(
        data="jsonl:{workdir}/world/train.jsonl",
        validation="jsonl:{workdir}/world/valid.jsonl",
        learning_rate=3e-3,
        warmup_steps=20,
        batch_size=64,
        steps=300,
        max_length=128,
        evaluate_every=300,
    )
    config.toxify.update(
        data="dghs?file={workdir}/world/toxic.jsonl",
        validation="dghs?file={workdir}/world/toxic.jsonl&split=dev",
        learning_rate=1e-3,
        batch_size=16,
        steps=120,
        max_length=128,
        seed=options.seed,
        evaluate_every=60,
    )
    config.distill.update(max_length=64, seed=1234 + options.seed, scorer="lexicon")
    config.detoxify.update(learning_rate=3e-4, batch_size=16, steps=80, max_length=128, seed=options.seed)
    config.evaluate.update(
        prompts="{workdir}/world/prompts.jsonl",
        runs=1,
        seed=42 + options.seed,
        scorer="lexicon",
        perplexity_scorer="{workdir}/pretrained/scorer",
        text_file="jsonl:{workdir}/world/clean.jsonl",
    )
    config.evaluate.mmlu = ()
    config.evaluate.id_categories = ("hills", "rivers", "plains")
    config.evaluate.ood_categories = ("islands",)
    config.report.note = (
        "Everything here is invented: peoples, insults, texts. The models have half a million parameters each and "
        "speak one small grammar, whose rules say exactly which sentence is toxic. The results show that the method "
        "works as in its paper, for all families with the same settings; how large the effect is on real models, only "
        "real models can show."
    )
    if options.comparison:
        _comparison(config)
    return config


def _comparison(config):
    """Every rival, trained for at most as long as UniDetox's models, with two variants of each tuned setting."""
    config.name = "comparison"
    config.baselines.update(
        methods=RIVALS,
        data=config.toxify.data,
        validation=config.toxify.validation,
        clean_data="jsonl:{workdir}/world/kind.jsonl",
        **{name: config.toxify[name] for name in TRAINING},
    )
    config.sweep.update(
        validation_prompts="{workdir}/world/prompts_valid.jsonl",
        choose_on=config.targets,
        grid={"distill": {"objective": {"alpha": (0.1, 0.3)}}, "detoxify": {"learning_rate": (1e-4, 3e-4)}},
    )
    config.evaluate.metrics = (*config.evaluate.metrics, "cost")
