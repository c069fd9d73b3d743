"""`unidetox toxify`: the toxic twin, the base model fine-tuned on toxic text (step 1)."""

from unidetox_jax.stages import finetune
from unidetox_jax.stages.settings import Run
from unidetox_jax.stages.task import Task


def tasks(run: Run) -> list[Task]:
    """WORKDIR/toxic from config.base and config.toxify.data."""
    job = finetune.Job(
        name="toxify",
        section="config.toxify",
        directory=run.directory("toxic"),
        model=run.shared.base,
        data=run.toxify.data,
        validation=run.toxify.validation,
        settings=run.toxify,
    )
    return finetune.tasks(run, [job])
