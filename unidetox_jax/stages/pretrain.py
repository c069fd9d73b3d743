"""`unidetox pretrain`: models trained from scratch, and the built-in world that they learn from."""

from etils import epath

from unidetox_jax import distributed
from unidetox_jax.data import toyworld
from unidetox_jax.stages import finetune
from unidetox_jax.stages.settings import Run, model_name
from unidetox_jax.stages.task import Task


def tasks(run: Run) -> list[Task]:
    """WORKDIR/world, then WORKDIR/pretrained/NAME for each of config.pretrain.models."""
    jobs = []
    for entry in run.pretrain.models:
        model, _, texts = entry.partition("=")
        name = model_name(model)
        jobs.append(
            finetune.Job(
                name=f"pretrain {name}",
                section="config.pretrain",
                directory=run.directory(f"pretrained/{name}"),
                model=model,
                data=texts or run.pretrain.data,
                validation=run.pretrain.validation,
                settings=run.pretrain,
                from_scratch=True,
            )
        )
    return ([_world(run)] if run.pretrain.world else []) + finetune.tasks(run, jobs)


def _world(run: Run) -> Task:
    seed, texts = run.pretrain.world_seed, run.pretrain.world_texts
    settings = {"world_seed": seed, "world_texts": texts}

    def body(directory: epath.Path) -> dict:
        if distributed.is_main_process():
            toyworld.write(directory, seed, toyworld.Sizes(train=texts, scorer=texts))
        distributed.barrier("world written")
        return {}

    return Task("pretrain world", run.directory("world"), settings, dict, body)
