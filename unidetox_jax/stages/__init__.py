"""Stages of the method: modules that list their tasks, imported on demand."""

# stage → (module with `tasks(run) -> list[Task]`, one line of help), in the order that `run` takes them
STAGES = {
    "pretrain": ("unidetox_jax.stages.pretrain", "models from scratch: the built-in world's"),
    "fit-scorer": ("unidetox_jax.stages.fit_scorer", "a linear toxicity scorer from labelled text"),
    "toxify": ("unidetox_jax.stages.toxify", "the toxic twin: the base model fine-tuned on toxic text"),
    "distill": ("unidetox_jax.stages.distill", "text from the contrast between the base model and its twin"),
    "detoxify": ("unidetox_jax.stages.detoxify", "targets fine-tuned on the distilled text"),
    "baselines": ("unidetox_jax.stages.baselines", "rival methods: twins and models of the targets"),
    "evaluate": ("unidetox_jax.stages.evaluate", "toxicity, perplexity, diversity, knowledge of every model"),
    "analyze": ("unidetox_jax.stages.analyze", "what the distilled text is like"),
    "report": ("unidetox_jax.stages.report", "all results as one page, a table and a csv file"),
}
