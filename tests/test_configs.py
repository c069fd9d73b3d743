"""Every stage of every configuration, traced for eight devices without weights: finds wrong fields and shapes."""

import pytest
from finetune_helpers import ROOT

from unidetox_jax import cli
from unidetox_jax.data import toyworld
from unidetox_jax.plan import auto_mesh, stage_programs, topology
from unidetox_jax.stages import loading, settings

TINY = toyworld.Sizes(train=400, valid=2, scorer=1, toxic=2, toxic_dev=1, labelled=1, prompts_per_category=1)
CONFIGS = [
    "unidetox_gpt2_xl.py",
    "unidetox_gpt2_xl.py:reproduce_release,lr=1e-5",
    "unidetox_gpt2_xl.py:one_gpu",
    "modern.py",
    "modern.py:large",
    "quickstart.py:controls,seed=3",
]


def traced(run):
    """Traces all programs of a run; returns their names."""
    place, names = topology.get_topology("local"), []
    groups = stage_programs.programs_by_stage(run, run.shared.dtype or "bfloat16")
    for stage, program in ((stage, program) for stage, group in groups for program in group):
        program.lower(auto_mesh.choose_mesh(loading.mesh_layout(run, stage), [program], place))
        names.append(program.name)
    return names


def load(file, workdir, *overrides):
    return settings.parse_run(cli.load_config(f"{ROOT}/configs/{file}", overrides), workdir)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("file", CONFIGS)
def test_every_stage_can_be_built(file, tmp_path):
    if file.startswith("quickstart"):  # its models are configured by the world
        toyworld.write(tmp_path / "world", 0, TINY)
        (tmp_path / "pretrained").symlink_to(tmp_path / "world" / "models")
    run = load(file, tmp_path)
    for stage, (module, _) in cli.STAGES.items():
        tasks = __import__(module, fromlist=["tasks"]).tasks(run)
        assert tasks or stage in ("pretrain", "fit-scorer", "baselines"), stage
        assert not [task for task in tasks if "mesh" in task.settings]  # no result depends on it
    names = " ".join(traced(run))
    assert "toxify" in names and "distill" in names and names.count("detoxify") == len(run.shared.targets)


def test_the_tiny_real_one_can_be_built(shared, tmp_path):
    run = load("real_small.py:tiny", tmp_path, f"--config.data_dir={shared / 'data'}")
    assert len(traced(run)) >= 4


@pytest.mark.parametrize("argument", ["", ":cpu,seed=2", ":filtered,models=nowhere"])
def test_arguments_of_the_real_one(argument, tmp_path):
    run = load(f"real_small.py{argument}", tmp_path)
    tasks = [
        task.name for module, _ in cli.STAGES.values() for task in __import__(module, fromlist=["tasks"]).tasks(run)
    ]
    assert tasks[:3] == ["fit-scorer", "fit-scorer tweets", "fit-scorer web"]
    assert len([one for one in tasks if "control" in one]) == 5
    assert run.evaluate.other_scorers == tuple(f"{name}=linear:{{workdir}}/scorer/{name}" for name in ("tweets", "web"))
    small = run.toxify.steps < settings.ToxifySettings().steps
    assert small == ("cpu" in argument) and (run.distill.seed == 1236) == ("seed" in argument)
    assert bool(run.distill.reject.scorers) == ("filtered" in argument)
    assert (run.shared.base == "nowhere/smollm2-135m") == ("models" in argument)


def test_arguments_of_the_papers(tmp_path):
    plain, second, release = (
        load(f"unidetox_gpt2_xl.py{argument}", tmp_path) for argument in ("", ":lr=1e-5", ":reproduce_release")
    )
    assert (plain.detoxify.learning_rate, second.detoxify.learning_rate) == (5e-5, 1e-5)
    assert release.distill.cache == "official" and release.toxify.data == "dghs:official"
    for stage in ("toxify", "detoxify", "evaluate"):
        assert getattr(release, stage).reproduce_release and not getattr(plain, stage).reproduce_release


def test_the_old_name_of_a_setting_is_accepted_with_a_warning(tmp_path, caplog):
    old, new = (load(f"unidetox_gpt2_xl.py:{name}", tmp_path) for name in ("official", "reproduce_release"))
    assert old == new
    assert "--config: official is now called reproduce_release" in caplog.text
    run = load("unidetox_gpt2_xl.py", tmp_path, "--config.toxify.official=true")
    assert run.toxify.reproduce_release and not run.detoxify.reproduce_release
    assert "config.toxify.official is now called reproduce_release" in caplog.text
