"""The comparison that the paper's claim is, and what its reviewers asked, as sweeps.

    unidetox sweep --config=configs/paper_tables.py --workdir=runs/main

    configs/paper_tables.py              main table: every rival and UniDetox, the settings of each chosen on GPT-2 XL's
                                         validation prompts and applied to all four models
    configs/paper_tables.py:each         the same, and every method tuned on each model by itself beside it
    configs/paper_tables.py:rates        UniDetox alone at the two published learning rates
    configs/paper_tables.py:texts        how much text it takes: 40 to 1,280 texts
    configs/paper_tables.py:sensitivity  alpha by learning rate
    configs/paper_tables.py:small        SmolLM2-135M and Gemma 3 270M in place of the four; with any of the above

The published settings of every rival are among those that are tried. Time and memory of each are in the report's
columns and in sweep.json.
"""

from unidetox_jax.stages.settings import default_config, parse_argument

GPT2_XL = "openai-community/gpt2-xl"
PAPER = (GPT2_XL, "facebook/opt-6.7b", "tiiuae/falcon-7b", "meta-llama/Llama-2-7b-hf")
SMALL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m")
RIVALS = (
    "dexperts(alpha=1.0)",
    "dexperts(alpha=2.0)",
    "lm_steer(steer=-1.0)",
    "lm_steer(steer=-3.0)",
    "lm_steer(steer=-5.0)",
    "task_arithmetic(scale=0.1)",
    "task_arithmetic(scale=0.3)",
    "task_arithmetic(scale=1.0)",
    "detoxigen(alpha=1.0)",
    "npo(steps=500)",
    "npo(steps=2000)",
    "profs(rank=2)",
    "profs(rank=10)",
    "dapt",
    "preprompt",
    "self_debiasing",
)
RATES = {"detoxify": {"learning_rate": (1e-5, 5e-5)}}
ALPHAS = {"distill": {"objective": {"alpha": (0.05, 0.1, 0.2, 0.4)}}}
GRIDS = {
    "rates": RATES,
    "texts": {"distill": {"num_texts": (40, 160, 320, 640, 1_280)}},
    "sensitivity": {**ALPHAS, "detoxify": {"learning_rate": (1e-5, 2e-5, 5e-5, 1e-4)}},
}


def get_config(argument=None):
    chosen = parse_argument(argument, each=False, rates=False, texts=False, sensitivity=False, small=False)
    config = default_config()
    question = next((name for name in GRIDS if chosen[name]), "")
    config.name = f"paper-tables-{question or 'main'}"
    models = SMALL if chosen.small else PAPER
    config.base, config.targets, config.control_targets = models[0], models, models
    config.sweep.update(
        validation_prompts="toxigen?split=validation",
        choose_on=() if chosen.each or question else models[:1],
        grid=GRIDS.get(question, RATES),
    )
    for part in (config.toxify, config.detoxify, config.baselines):
        part.remat = "dots"
    if not question:
        config.baselines.update(methods=RIVALS, data=config.toxify.data, clean_data="dghs:harmless")
        config.evaluate.metrics = (*config.evaluate.metrics, "cost")
    if chosen.small:
        config.name += "-small"
        config.evaluate.update(perplexity_scorer=models[0], scorer="classifier:unitary/toxic-bert")
    return config
