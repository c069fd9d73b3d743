"""`unidetox detoxify`: every target fine-tuned on the distilled text, with one configuration for all (step 3).

A control target is fine-tuned once more, in the same way, on as many texts of the base model alone: what it loses in
toxicity is not the contrast's doing.
"""

from unidetox_jax.stages import base, common, finetune
from unidetox_jax.stages.settings import Run, model_name

TEXTS = "texts.jsonl"


def tasks(run: Run) -> list[base.Task]:
    """WORKDIR/detoxified/NAME for each of config.targets, WORKDIR/control/NAME for each of config.control_targets."""
    distilled = run.detoxify.data or f"distilled:{{workdir}}/{common.distilled_directory(run).name}/{TEXTS}"
    samples = f"distilled:{{workdir}}/{common.samples_directory(run).name}/{TEXTS}"
    after = None if run.detoxify.data else common.distilled_directory(run)

    def job(kind: str, directory, target: str, texts: str, after) -> finetune.Job:
        name = model_name(target)
        return finetune.Job(
            name=f"{kind} {name}",
            section="config.detoxify",
            directory=directory(run, name),
            model=target,
            data=texts,
            validation=run.detoxify.validation,
            settings=run.detoxify,
            after=after,
        )

    jobs = [job("detoxify", common.detoxified_directory, target, distilled, after) for target in run.shared.targets]
    jobs += [
        job("control", common.control_directory, target, samples, common.samples_directory(run))
        for target in run.shared.control_targets
    ]
    return finetune.tasks(run, jobs)
