"""The paper's comparison with rival methods, and the questions of its reviewers, as sweeps.

    unidetox sweep --config=configs/paper_tables.py --workdir=runs/main

    configs/paper_tables.py              main table: every rival and UniDetox, the settings of each chosen on validation
                                         prompts for GPT-2 XL and applied to all four models
    configs/paper_tables.py:each         the same, and every method also tuned for each model by itself
    configs/paper_tables.py:rates        UniDetox alone at the two published learning rates
    configs/paper_tables.py:texts        number of texts: 40 to 1,280
    configs/paper_tables.py:sensitivity  alpha by learning rate
    configs/paper_tables.py:small        SmolLM2-135M and Gemma 3 270M in place of the four; with any of the above

Each rival's published settings are among its variants. The report and sweep.json include the time and memory of each.
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
    options = parse_argument(argument, each=False, rates=False, texts=False, sensitivity=False, small=False)
    config = default_config()
    grid_name = next((name for name in GRIDS if options[name]), "")
    config.name = f"paper-tables-{grid_name or 'main'}"
    models = SMALL if options.small else PAPER
    config.base, config.targets, config.control_targets = models[0], models, models
    config.sweep.update(
        validation_prompts="toxigen?split=validation",
        choose_on=() if options.each or grid_name else models[:1],
        grid=GRIDS.get(grid_name, RATES),
    )
    for section in (config.toxify, config.detoxify, config.baselines):
        section.remat = "dots"
    if not grid_name:
        config.baselines.update(methods=RIVALS, data=config.toxify.data, clean_data="dghs:harmless")
        config.evaluate.metrics = (*config.evaluate.metrics, "cost")
    if options.small:
        config.name += "-small"
        config.evaluate.update(perplexity_scorer=models[0], scorer="classifier:unitary/toxic-bert")
    return config
