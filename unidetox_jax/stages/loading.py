"""The models of a run: their shapes and parameters, and the mesh that a stage runs them on."""

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


def mesh_layout(run: Run, stage: str) -> str:
    """The configured mesh of a stage, or else of the run; "auto" if neither names one."""
    layout = getattr(getattr(run, stage), "mesh", auto_mesh.AUTO)
    return run.shared.mesh if layout == auto_mesh.AUTO else layout


def make_mesh(run: Run, stage: str, programs: Sequence[Program]) -> Mesh:
    """A stage's mesh over all devices of all processes; "auto" chooses it for `programs`."""
    label = f"{stage}, {programs[0].name}" if programs else stage
    return auto_mesh.choose_mesh(mesh_layout(run, stage), programs, get_topology("local"), label)


def load_model(run: Run, source: str, mesh: Mesh, param_dtype: str | None = None) -> Model:
    """A model on a mesh, computing in the run's dtype; `source` may hold `{workdir}`."""
    return _with_run_dtype(run, checkpoint.load(run.path(source), mesh, param_dtype))


def load_models(run: Run, sources: Sequence[str], mesh: Mesh) -> dict[str, Model]:
    """{source: `load_model` of it}; sources of the same weights share them."""
    loaded = checkpoint.load_all([run.path(source) for source in sources], mesh)
    return {source: _with_run_dtype(run, loaded[run.path(source)]) for source in sources}


def _with_run_dtype(run: Run, model: Model) -> Model:
    return Model(model.params, dataclasses.replace(model.cfg, dtype=run.shared.dtype or model.cfg.dtype))


def load_config(run: Run, source: str, dtype: str = "") -> ModelConfig:
    """A model's configuration; a published one (`models.PUBLISHED`) needs no files.

    dtype: compute dtype; empty: the run's.
    """
    cfg = models.published_config(run.path(source)) or checkpoint.load_config(run.path(source))
    return dataclasses.replace(cfg, dtype=dtype or run.shared.dtype or cfg.dtype)


def exists(run: Run, source: str) -> bool:
    """Whether a model, or the adapter of MODEL+ADAPTER, exists locally."""
    model, adapter = checkpoint.split_adapter(run.path(source))
    return epath.Path(adapter or model).exists()


def num_params(run: Run, source: str) -> int:
    """A model's parameter count, for estimates; 0 if it does not exist locally, as nothing is downloaded for it."""
    name = checkpoint.split_adapter(run.path(source))[0]  # an adapter is small beside its model
    if name not in models.PUBLISHED and not epath.Path(name).exists():
        return 0
    try:
        return models.num_params(load_config(run, name))
    except UserError:
        return 0


def trained_model(base: str, directory: epath.PathLike, settings: TrainingSettings) -> str:
    """How configurations name the model that a training of `base` leaves in `directory`: DIRECTORY, or BASE+DIRECTORY
    if it is an adapter."""
    return f"{base}+{directory}" if settings.lora.rank else str(directory)
