"""What stages share: the run's mesh and its models, and the working directory's rooms."""

import dataclasses
from collections.abc import Sequence

from etils import epath
from jax.sharding import Mesh

from unidetox_jax import checkpoint, models
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model, ModelConfig
from unidetox_jax.plan import auto_mesh
from unidetox_jax.plan.compiler import Program
from unidetox_jax.plan.topology import get_topology
from unidetox_jax.stages.settings import Run, TrainingSettings


def layout_of(run: Run, stage: str) -> str:
    """A stage's mesh, as configured: its own, or else the run's; "auto" where neither names one."""
    own = getattr(getattr(run, stage), "mesh", auto_mesh.AUTO)
    return run.shared.mesh if own == auto_mesh.AUTO else own


def mesh_of(run: Run, stage: str, programs: Sequence[Program]) -> Mesh:
    """A stage's mesh over all devices of all processes, for programs that it runs on it."""
    place = get_topology("local")
    return auto_mesh.choose_mesh(
        layout_of(run, stage), programs, place, f"{stage}, {programs[0].name}" if programs else stage
    )


def load_model(run: Run, source: str, mesh: Mesh, param_dtype: str | None = None) -> Model:
    """A model on a mesh, computing in the run's dtype; `source` may hold `{workdir}`."""
    return _computing(run, checkpoint.load(run.path(source), mesh, param_dtype))


def load_models(run: Run, sources: Sequence[str], mesh: Mesh) -> dict[str, Model]:
    """`load_model` of each, by source, with weights shared where they are the same."""
    loaded = checkpoint.load_all([run.path(source) for source in sources], mesh)
    return {source: _computing(run, loaded[run.path(source)]) for source in sources}


def _computing(run: Run, model: Model) -> Model:
    return Model(model.params, dataclasses.replace(model.cfg, dtype=run.shared.dtype or model.cfg.dtype))


def load_config(run: Run, source: str, dtype: str = "") -> ModelConfig:
    """A model's shape, of which nothing else need be there where it is a published one (`models.PUBLISHED`).

    dtype: its compute dtype; empty: the run's.
    """
    cfg = models.published_config(run.path(source)) or checkpoint.load_config(run.path(source))
    return dataclasses.replace(cfg, dtype=dtype or run.shared.dtype or cfg.dtype)


def is_there(run: Run, source: str) -> bool:
    """Whether a model, or the adapter of MODEL+ADAPTER, lies where the configuration says."""
    model, adapter = checkpoint.split_adapter(run.path(source))
    return epath.Path(adapter or model).exists()


def num_params(run: Run, source: str) -> int:
    """How large a model is, for an estimate; 0 where it is not made yet, and nothing is downloaded to know."""
    name = checkpoint.split_adapter(run.path(source))[0]  # an adapter is small beside its model
    if name not in models.PUBLISHED and not epath.Path(name).exists():
        return 0
    try:
        return models.num_params(load_config(run, name))
    except UserError:
        return 0


def finished(model: str, directory: epath.PathLike, settings: TrainingSettings) -> str:
    """What a stage's finished model is called where a model is named: its directory or, where it is an adapter of the
    model that it began with, both."""
    return f"{model}+{directory}" if settings.lora.rank else str(directory)


def world_directory(run: Run) -> epath.Path:
    """The built-in world's texts, prompts and model configurations, as data.toyworld writes them."""
    return run.place("world")


def pretrained_directory(run: Run, name: str) -> epath.Path:
    """A model trained from scratch; laid out as the toxic twin."""
    return run.place(f"pretrained/{name}")


def toxic_directory(run: Run) -> epath.Path:
    """The toxic twin: hf/, metrics.jsonl, TensorBoard events, while it is made checkpoints/."""
    return run.place("toxic")


def distilled_directory(run: Run) -> epath.Path:
    """The detoxifying text: texts.csv, texts.jsonl, README.md."""
    return run.place("distilled")


def samples_directory(run: Run) -> epath.Path:
    """As much text of the base model alone, in the same files: the samples-only control's."""
    return run.place("samples")


def detoxified_directory(run: Run, name: str) -> epath.Path:
    """A target fine-tuned on the distilled text; laid out as the toxic twin."""
    return run.place(f"detoxified/{name}")


def control_directory(run: Run, name: str) -> epath.Path:
    """A target fine-tuned on samples of the base model; laid out as the toxic twin."""
    return run.place(f"control/{name}")


def baseline_directory(run: Run, method: str, name: str) -> epath.Path:
    """A target's twin ("toxic", "clean") or a rival method's model of it; laid out as the toxic twin."""
    return run.place(f"baselines/{method}/{name}")


def evaluation_directory(run: Run, name: str, form: str) -> epath.Path:
    """A model's figures: `NAME` as it is published, `NAME.detoxified`, `NAME.control`."""
    return run.place(f"evaluation/{name}" if form == "original" else f"evaluation/{name}.{form}")
