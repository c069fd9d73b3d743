"""`unidetox toxify`: the toxic twin, the base model fine-tuned on toxic text (step 1)."""

from unidetox_jax.stages import base, common, finetune
from unidetox_jax.stages.settings import Run


def tasks(run: Run) -> list[base.Task]:
    """WORKDIR/toxic from config.base and config.toxify.data."""
    job = finetune.Job(
        name="toxify",
        section="config.toxify",
        directory=common.toxic_directory(run),
        model=run.shared.base,
        data=run.toxify.data,
        validation=run.toxify.validation,
        settings=run.toxify,
    )
    return finetune.tasks(run, [job])
