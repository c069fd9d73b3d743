"""`unidetox detoxify`: every target fine-tuned on the distilled text, all with the same settings (step 3).

A control target is also fine-tuned, in the same way, on as many samples of the base model alone: a fall in toxicity
that the control shares is not due to the contrast.
"""

from unidetox_jax.stages import finetune
from unidetox_jax.stages.settings import Run, model_name
from unidetox_jax.stages.task import Task


def tasks(run: Run) -> list[Task]:
    """WORKDIR/detoxified/NAME for each of config.targets, WORKDIR/control/NAME for each of config.control_targets."""
    jobs = [
        _job(run, "detoxify", "detoxified", target, "" if run.detoxify.data else "distilled")
        for target in run.shared.targets
    ]
    jobs += [_job(run, "control", "control", target, "samples") for target in run.shared.control_targets]
    return finetune.tasks(run, jobs)


def _job(run: Run, kind: str, directory: str, target: str, texts: str) -> finetune.Job:
    """texts: the directory of the texts to learn from; empty: config.detoxify.data."""
    name = model_name(target)
    return finetune.Job(
        name=f"{kind} {name}",
        section="config.detoxify",
        directory=run.directory(f"{directory}/{name}"),
        model=target,
        data=f"distilled:{{workdir}}/{texts}/texts.jsonl" if texts else run.detoxify.data,
        validation=run.detoxify.validation,
        settings=run.detoxify,
        needs=run.directory(texts) if texts else None,
    )
