"""`unidetox pretrain`: models from scratch, the built-in world's; the training code of the other stages with random
weights to begin with. The world itself is written first, where the configuration asks for it.
"""

from etils import epath

from unidetox_jax import distributed
from unidetox_jax.data import toyworld
from unidetox_jax.stages import base, common, finetune
from unidetox_jax.stages.settings import Run, model_name


def tasks(run: Run) -> list[base.Task]:
    """WORKDIR/world, then WORKDIR/pretrained/NAME for each of config.pretrain.models."""
    jobs = []
    for entry in run.pretrain.models:
        model, _, texts = entry.partition("=")
        name = model_name(model)
        jobs.append(
            finetune.Job(
                name=f"pretrain {name}",
                section="config.pretrain",
                directory=common.pretrained_directory(run, name),
                model=model,
                data=texts or run.pretrain.data,
                validation=run.pretrain.validation,
                settings=run.pretrain,
                scratch=True,
            )
        )
    return ([_world(run)] if run.pretrain.world else []) + finetune.tasks(run, jobs)


def _world(run: Run) -> base.Task:
    seed, texts = run.pretrain.world_seed, run.pretrain.world_texts
    settings = {"world_seed": seed, "world_texts": texts}

    def body(directory: epath.Path) -> dict:
        if distributed.is_main_process():
            toyworld.write(directory, seed, toyworld.Sizes(train=texts, scorer=texts))
        distributed.barrier("world written")
        return {}

    return base.Task("pretrain world", common.world_directory(run), settings, dict, body)
