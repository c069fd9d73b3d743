"""Plans: topologies by name, memory compared with the chip's, collectives of the compiled program."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from finetune_helpers import write_config
from jax.sharding import AxisType, Mesh
from variants import VARIANTS

from unidetox_jax import cli, devices, models, sharding
from unidetox_jax.benchmarks import meshes
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.errors import UserError
from unidetox_jax.models import costs
from unidetox_jax.plan import (
    abstract_programs,
    auto_mesh,
    compiler,
    cost_model,
    feasibility,
    hlo,
    stage_programs,
    topology,
)
from unidetox_jax.stages import settings

needs_libtpu = pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed: unidetox-jax[tpu]")
needs_gpu_compiler = pytest.mark.skipif(
    not topology.has_cuda_plugin(), reason="JAX's compiler for GPUs is not installed: unidetox-jax[plan-gpu]"
)
WIDTH = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Directories with model configurations but no weights, and a configuration file that uses them."""
    place = tmp_path_factory.mktemp("plan")
    for name, extra in {"gpt2": {"n_embd": WIDTH}, "llama-3": {"hidden_size": WIDTH}}.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps({**VARIANTS[name], "vocab_size": 512, **extra}))
    write_config(
        place / "config.py",
        base=str(place / "gpt2"),
        targets=(str(place / "llama-3"),),
        mesh="data:-1",
        toxify__steps=10,
        toxify__max_length=32,
        detoxify__max_length=32,
        distill__max_length=20,
        distill__batch_size=8,
        evaluate__batch_size=16,
        evaluate__score_batch_size=16,
        evaluate__perplexity_scorer=str(place / "llama-3"),
        evaluate__mmlu=(),
    )
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("v5e:4x4", "local"), marks=needs_libtpu),
        pytest.param(("h100:1", "local", "h100:8"), marks=needs_gpu_compiler),
    ],
    ids=" ".join,
)
def test_programs_use_the_kernels_of_their_platform(place, names):
    """Planning for several platforms in one process does not mix their kernels."""
    run = settings.parse_run(cli.load_config(f"{place}/config.py"))
    for name in names:
        devices_ = topology.get_topology(name).devices
        mesh, platform = sharding.make_mesh("data:-1", devices_), devices_[0].platform
        for program in (one for _, group in stage_programs.programs_by_stage(run, "bfloat16") for one in group):
            text = program.lower(mesh).as_text()
            of_llama = "llama" in program.name  # GPT-2 has dropout in its attention, and is not prompted
            fused = any(call in text for call in ("cudnn", "CustomSPMDPartitioning"))
            assert fused == (platform == "gpu" and of_llama), (name, program.name)
            if "distill" in program.name:  # on CPU top-k of a small vocabulary is a sort
                assert ("stablehlo.sort" in text) == (platform == "cpu")


def test_accelerator_types_are_slices():
    types = topology.accelerator_types()
    expected = {"v5e-4": "v5e:2x2", "v5e-16": "v5e:4x4", "v5p-8": "v5p:2x2x1", "v4-16": "v4:2x2x2", "v6e-8": "v6e:2x4"}
    assert expected.items() <= types.items()


def test_mistakes_are_one_line(place, capsys):
    for arguments, message in (
        (["--topology=v5e:3x3"], "no 'v5e:3x3'; expected local, or one of"),
        ([], "--topology: missing"),
        (["--topology=local", "--config.mesh=data:3"], "needs a multiple of 3 devices, found 8"),
        (["--topology=local", "--config.base=nowhere/at/all"], "nowhere/at/all"),
    ):
        assert cli.main(["plan", f"--config={place}/config.py", *arguments]) == 2
        line = capsys.readouterr().err.strip().rsplit("\n", 1)[-1]
        assert message in line
    assert "v5p-16 = v5p:2x2x2" in _refusal("v5p:5x5x5")


def _refusal(name):
    with pytest.raises(UserError) as error:
        topology.get_topology(name)
    return str(error.value)


@pytest.mark.slow
def test_plan_for_local_devices(place, capsys):
    assert cli.main(["plan", f"--config={place}/config.py", "--topology=local"]) == 0
    printed = capsys.readouterr().out
    stages = ("toxify gpt2", "distill (base, toxic)", "detoxify llama-3", "evaluate llama-3: generation")
    for stage in (*stages, "evaluate: perplexity by llama-3"):
        assert f"\n{stage}: fits\n" in printed
    assert "data:8, fsdp:1, model:1" in printed and "all-reduce" in printed
    assert "embed/tokens/embedding" in printed


def test_unfitting_program_gets_suggestions_and_exit_code_1(place, tmp_path, capsys, monkeypatch):
    cfg = models.config_from_hf(place / "gpt2")
    state = 3 * 4 * models.num_params(cfg)  # weights and both moments
    monkeypatch.setitem(devices.SPECS, "cpu", devices.Specs(int(0.9 * state), 1e12, 1e11, 1e10))
    monkeypatch.setattr(cost_model, "LOGITS_BYTES", 0)
    monkeypatch.setattr(abstract_programs, "MEMORY_SAVERS", abstract_programs.MEMORY_SAVERS[:1])
    toxify = lambda run, dtype: [("toxify", [abstract_programs.training_program("toxify gpt2", cfg, run.toxify)])]  # noqa: E731
    monkeypatch.setattr(stage_programs, "programs_by_stage", toxify)
    command = ["plan", f"--config={place}/config.py", "--topology=local", f"--json={tmp_path}/plan.json"]
    command += [
        "--config.evaluate.max_prompts=1",
        "--config.evaluate.samples=1",
    ]  # otherwise their texts take more disk than the models
    assert cli.main(command) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("toxify gpt2 does not fit on local; what makes it fit: --config.mesh=")
    assert "; --config.toxify.remat=full " in last
    plan = json.loads((tmp_path / "plan.json").read_text())
    (found,) = plan["programs"]
    assert not found["fits"] and found["mesh"] == {"data": 8, "fsdp": 1, "model": 1} and len(found["suggestions"]) == 2
    monkeypatch.setitem(devices.SPECS, "cpu", devices.Specs(1000, 1e12, 1e11, 1e10))
    assert cli.main(command) == 1
    printed = capsys.readouterr().out.strip()
    assert printed.endswith("what makes it fit: nothing that was tried")

    disk = plan["disk"]
    tasks = {task["name"]: task for task in disk["tasks"]}
    assert tasks["toxify"]["peak"] == pytest.approx(3 * state, abs=64)  # two kept, one being written; counters
    assert tasks["toxify"]["stays"] == state // 3  # the weights alone
    assert disk["stays"] == sum(task["stays"] for task in disk["tasks"])
    before = tasks["toxify"]["stays"] + tasks["distill"]["stays"]
    assert disk["peak"] == max(tasks["toxify"]["peak"], before + tasks["detoxify llama-3"]["peak"]) > 3 * state - 64
    assert tasks[disk["during"]]["peak"] <= disk["peak"]
    assert f"disk: the working directory holds 0.0 GB at most, during {disk['during']}, and" in printed


def decoding(name, layout, rows=8):
    """(collectives, abstract weights of each) of two models' decoding on eight devices."""
    cfg = models.config_from_hf({**VARIANTS[name], "vocab_size": 512})
    program = abstract_programs.decoding_program(
        "decode", [cfg, cfg], objectives.get("contrastive", alpha=0.1), [warpers.top_k(50)],
        rows=rows, prompt=20, new_tokens=24, batches=1,
    )  # fmt: skip
    mesh = sharding.make_mesh(layout)
    found = hlo.collectives(program.lower(mesh).compile().as_text())
    prepared, _ = program.resident(mesh)
    return {(one.kind, one.depth): one for one in found}, prepared


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("name", ["gpt2", "llama-3", "falcon-7b", "opt-125m"])
def test_decoding_over_the_model_axis_gathers_no_weights_or_cache(name):
    """Only activations are exchanged: every collective in the loop is smaller than a layer's smallest matrix, except
    the gathering of the candidates' logits (about 50 of each device's part of the vocabulary)."""
    found, params = decoding(name, "data:2,model:4")
    leaves = jax.tree_util.tree_leaves_with_path(params[0]["blocks"])
    matrices = [x.size // x.shape[0] for path, x in leaves if sharding.path_string(path).endswith("kernel")]
    in_loop = {key: one for key, one in found.items() if key[1] > 0}
    assert any(kind == "all-reduce" and depth == 2 for kind, depth in in_loop)  # the layers' partial sums
    for (kind, depth), one in in_loop.items():
        elements = 1
        for size in one.largest[one.largest.index("[") + 1 : -1].split(","):
            elements *= int(size or 1)
        if kind == "all-gather":
            assert depth == 1 and elements <= 4 * 51 * 4, one
        elif depth == 2:
            assert elements < min(matrices), one


def test_weights_over_fsdp_are_gathered_before_the_loop():
    found, (weights, _) = decoding("gpt2", "fsdp:8")
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(weights))
    assert found["all-gather", 0].bytes < 1000 and not [key for key in found if key[0] == "all-gather" and key[1] > 0]


@pytest.mark.slow
def test_training_arguments_are_counted_to_the_byte():
    cfg = models.config_from_hf({**VARIANTS["gpt2"], "vocab_size": 512})
    program = abstract_programs.training_program("train", cfg, settings.TrainingSettings(max_length=32))
    mesh = sharding.make_mesh("fsdp:8")
    report = compiler.compile_program(program, mesh)
    batch = 8 // 8 * 32 * (4 + 1 + 4)  # a row a device: tokens, mask, segments
    numbers = 4 * 4  # learning rate, steps, warm-up, the dropout's seed
    assert report.arguments == compiler.bytes_per_device(program.resident(mesh)) + batch + numbers


HLO = """
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.3 = f32[64,4]{1,0} all-gather(%x), dimensions={0}
  %inner = (s32[]) while(%t), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"6"}}
  %other = (s32[]) while(%t), condition=%cond.3, body=%body.3
}

%cond.2 (p: (s32[])) -> pred[] {
  %c = pred[] constant(true)
}

%cond.3 (p: (s32[])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %four), direction=LT
}

%body.2 (p: (s32[])) -> (s32[]) {
  %f = f32[2]{0} fusion(%y), kind=kLoop, calls=%fused.1
  %g = f32[2]{0} fusion(%f), kind=kLoop, calls=%fused.2
}

%body.3 (p: (s32[])) -> (s32[]) {
  %same = bf16[5]{0} all-reduce(%y), channel_id=7, to_apply=%cond.2
}

%fused.1 (p: f32[2]) -> f32[2] {
  %ar = (bf16[10]{0}, bf16[30]{0}) all-reduce-start(%p), channel_id=7, to_apply=%cond.2
}

%fused.2 (p: f32[2]) -> f32[2] {
  %again = (bf16[10]{0}, bf16[30]{0}) all-reduce-start(%p), channel_id=7, to_apply=%cond.2
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%i), condition=%cond.2, body=%body.1
  %d = f32[16]{0} all-reduce(%w), to_apply=%cond.2
}
"""


def test_collectives_are_counted_as_often_as_loops_run_them():
    """The outer loop's number of rounds is unknown, as that of decoding's is; each round is a step then."""
    places = {
        (one.kind, one.depth, one.times, one.in_steps): (one.count, one.bytes, one.largest)
        for one in hlo.collectives(HLO)
    }
    assert places == {
        ("all-reduce", 0, 1, False): (1, 64, "f32[16]"),
        ("all-gather", 1, 1, True): (1, 1024, "f32[64,4]"),
        ("all-reduce", 2, 6, True): (1, 60, "bf16[30]"),
        ("all-reduce", 2, 4, True): (1, 10, "bf16[5]"),
    }
    report = compiler.Report(0, 0, 0, hlo.collectives(HLO))
    program = abstract_programs.scoring_program("score", models.published_config("openai-community/gpt2"), 1, 8, 2, 1)
    assert compiler.network_bytes(program, report) == 64 + 1024 + 6 * 60 + 4 * 10
    assert compiler.network_bytes(program._replace(loops=2), report) == (1024 + 6 * 60 + 4 * 10) / 2


@pytest.mark.parametrize(
    "kind",
    [
        "local",
        pytest.param("v5e-4", marks=needs_libtpu),
        pytest.param("h100-4", marks=needs_gpu_compiler),
    ],
)
def test_how_often_loops_run_is_read_from_every_compilers_programs(kind):
    """Layers, and parts of a batch, in training; layers within an unknown number of steps in decoding."""
    cfg = models.config_from_hf({**VARIANTS["llama-3"], "num_hidden_layers": 5})
    members = topology.get_topology(kind).devices[:4]
    mesh = Mesh(np.asarray(members).reshape(1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)

    def places(program):
        found = hlo.collectives(program.lower(mesh).compile().as_text())
        return {(one.times, one.in_steps) for one in found if one.depth}

    recipe = settings.TrainingSettings(max_length=8, batch_size=8, accumulation=2)
    assert (2 * 5, False) in places(abstract_programs.training_program("train", cfg, recipe))
    decoding = abstract_programs.decoding_program(
        "decode", [cfg], objectives.get("base"), [], rows=8, prompt=20, new_tokens=24, batches=1, samples=2
    )
    assert {(5, False), (1, True), (5, True)} <= places(decoding)  # the first: of the prompt


GPU_HLO = """
%layers (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %two = bf16[4]{0} custom-call(%one), custom_call_target="__cublas$gemm"
}

%usual (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} copy(%p)
}

%rare (p: f32[8]) -> f32[8] {
  %c.1 = f32[8]{0} copy(%p)
  %c.2 = (f32[2,9]{1,0}, s32[2,9]{1,0}) sort(%c.1, %iota), dimensions={1}, to_apply=%less
}

%fused (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} add(%p, %p)
}

%step (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = f32[8]{0} get-tuple-element(%p), index=1
  %start = f32[8]{0} all-reduce-start(%t), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %done = f32[8]{0} all-reduce-done(%start)
  %inner = (s32[], f32[8]) while(%t), condition=%more, body=%layers
  %choice = f32[8]{0} conditional(%i, %t, %t), true_computation=%rare, false_computation=%usual
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%i), condition=%more, body=%step
}
"""


def test_kernels_and_sorts_of_a_gpu_program():
    """While loops and conditionals launch nothing themselves; of two branches the shorter counts."""
    assert hlo.kernels(GPU_HLO) == {0: 0, 1: 2, 2: 2}
    assert hlo.sorts(GPU_HLO) == {(1, "f32[2,9]"): 1}
    (one,) = hlo.collectives(GPU_HLO)
    assert (one.kind, one.depth, one.group) == ("all-reduce", 1, (0, 2, 4, 6))
    assert hlo._group("replica_groups={{0,1},{2,3}}") == (0, 1) and hlo._group("replica_groups=[2,2]<=[4]") == (0, 1)


@needs_gpu_compiler
def test_network_between_hosts_is_slower():
    place = topology.get_topology("h100-2x8")
    mesh = sharding.make_mesh("data:2,model:8", place.devices)
    seconds = {
        axis: compiler._network_seconds(450e9, 0, [mesh.devices.flat[at].process_index for at in group], place.specs)
        for axis, group in ((axis, compiler._first_group(mesh, axis)) for axis in ("data", "model"))
    }
    assert seconds["model"] == pytest.approx(1.0) and seconds["data"] == pytest.approx(450 / 2 / 50)


def test_auto_mesh_is_fast_and_fits():
    """LLaMA-2-7B's decoding on eight v5e reads an eighth of the weights a chip, instead of gathering all of them; GPT-2
    XL's 25 heads do not split, so only rows do. The devices are not used, only their speeds."""
    specs = devices.SPECS["TPU v5e"]
    place = topology.Topology("eight", "eight", tuple(jax.devices()), specs, specs.memory)

    def best(name, rows):
        cfg = dataclasses.replace(models.published_config(name), dtype="bfloat16")
        program = abstract_programs.decoding_program(
            "d", [cfg], objectives.get("base"), [], rows=rows, prompt=64, new_tokens=20, batches=1
        )
        return auto_mesh.rank_meshes([program], place)[0]

    llama, xl = best("meta-llama/Llama-2-7b-hf", 64), best("openai-community/gpt2-xl", 512)
    assert llama.layout == "data:1,fsdp:1,model:8" and llama.bound == "memory" and llama.fits
    assert xl.layout.endswith("model:1") and xl.fits
    assert auto_mesh.choose_mesh("auto", [], topology.get_topology("local")).shape == {"data": 1, "fsdp": 8, "model": 1}


def test_eight_bit_floats_take_one_byte():
    hlo_text = (
        "ENTRY %main (a: f8e4m3fn[8]) -> f8e4m3fn[16] {\n  %g = f8e4m3fn[16]{0} all-gather(%a), dimensions={0}\n}\n"
    )
    assert [(one.bytes, one.largest) for one in hlo.collectives(hlo_text)] == [(16, "f8e4m3fn[16]")]


def test_only_the_model_axis_divides_weight_traffic():
    cfg = models.published_config("meta-llama/Llama-2-7b-hf")
    program = abstract_programs.scoring_program("score", cfg, 8, 128, 32, 1)
    norms = 4 * 65 * cfg.hidden_size
    for layout, share in (("data:2,fsdp:4", 1), ("data:2,model:4", 4)):
        matrices = program.cost(sharding.make_mesh(layout).shape, "cpu").traffic - norms
        assert matrices == (costs.read_bytes(cfg) - norms) / share


def test_out_of_memory_messages_are_parsed():
    for message, expected in (
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 18.50G of 15.75G hbm.", 18.5 * (1 << 30)),
        ("the total memory required for HLO temporaries (21.00G) exceeds available HBM (15.75G).", 21 << 30),
        ("something else went wrong", None),
    ):
        assert compiler._needed_bytes(message) == expected


@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("heads", [(8, 2), (8, 1), (6, 3), (5, 5)], ids=str)
def test_unsplittable_heads_and_odd_lengths_compile_for_gpus(heads):
    """Over four devices, with fewer key-value heads than query heads, and with numbers of heads that 4 does not divide.
    Each layer calls cuDNN once forward and once backward; the forward call is not recomputed."""
    queries, keys = heads
    cfg = models.config_from_hf({
        **VARIANTS["llama-3"], "vocab_size": 512, "hidden_size": 64 * queries, "head_dim": 64,
        "num_attention_heads": queries, "num_key_value_heads": keys,
    })  # fmt: skip
    recipe = settings.TrainingSettings(max_length=33, remat="dots")
    program = abstract_programs.training_program("train", dataclasses.replace(cfg, dtype="bfloat16"), recipe)
    text = (
        program.lower(sharding.make_mesh("fsdp:2,model:4", topology.get_topology("h100-8").devices)).compile().as_text()
    )
    assert text.count('custom_call_target="__cudnn$fmha') == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "layout", "kind", "mesh"),
    [
        pytest.param("distill", "falcon 71/1 x 64", "h100", "data:1,fsdp:2,model:4", marks=needs_gpu_compiler),
        pytest.param("train", "llama 32/4 x 64", "h100", "data:1,fsdp:1,model:8", marks=needs_gpu_compiler),
        pytest.param(
            "evaluate",
            "gemma3_text 4/1 x 256, window in some layers",
            "v5e",
            "data:1,fsdp:1,model:8",
            marks=needs_libtpu,
        ),
    ],
)
def test_published_head_layouts_compile_on_meshes(program, layout, kind, mesh, shared, capsys):
    """A sample of the table printed by `python -m unidetox_jax.benchmarks.meshes`."""
    options = ["--devices", kind, "--meshes", mesh, "--layouts", layout, "--programs", program]
    assert meshes.main([str(shared / "hub"), *options]) == 0
    assert f"| {layout} | {kind} | ok |" in capsys.readouterr().out


def test_table_of_meshes_distinguishes_refusals_from_failures(monkeypatch, capsys, tmp_path):
    """It has every mesh of up to 8 devices and every layout; a UserError is a refusal, any other error a failure. Of
    what a file of results has, only failures are compiled again."""
    assert len(set(meshes.MESHES)) == 1 + 3 + 6 + 10
    assert {name.split()[0] for name in meshes.layouts()} >= {"gpt2", "opt", "falcon", "llama", "phi3", "gemma2"}
    monkeypatch.setattr(meshes, "mesh_of", lambda kind, layout: layout)

    lowered = []

    def lower(mesh):
        lowered.append(mesh)
        raise {"data:2": UserError("cannot"), "data:4": NotImplementedError("odd\nlength")}[mesh]

    program = abstract_programs.scoring_program("score", models.published_config("openai-community/gpt2"), 8, 8, 4, 1)
    monkeypatch.setattr(meshes, "programs_of", lambda cfg: [program._replace(lower=lower)])
    for layouts, cells in ((("data:2",), "refused 1"), (("data:2", "data:4"), "refused 1 | FAILED 2")):
        options = ["--meshes", *layouts, "--layouts", "gpt2 12/12", "--results", str(tmp_path / "results")]
        failed = meshes.main(["--devices", "h100", *options])
        printed = capsys.readouterr().out
        assert failed == ("FAILED" in cells) and f"| gpt2 12/12 x 64 | h100 | {cells} |" in printed
    assert printed.endswith("1. cannot\n\n2. score: NotImplementedError: odd length\n")
    assert lowered == ["data:2", "data:4"]
    assert meshes.main(["--devices", "h100", *options]) and lowered == ["data:2", "data:4", "data:4"]


def paper_distillation(place, layout):
    """The compiled distillation of 128 texts from GPT-2 XL and its twin."""
    cfg = dataclasses.replace(models.published_config("openai-community/gpt2-xl"), dtype="bfloat16")
    program = abstract_programs.decoding_program(
        "distill", [cfg, cfg], objectives.get("contrastive"), warpers.choose(top_k=50), rows=128, prompt=1,
        new_tokens=255, batches=5,
    )  # fmt: skip
    return program.lower(sharding.make_mesh(layout, topology.get_topology(place).devices)).compile()


@needs_libtpu
@pytest.mark.slow
def test_paper_distillation_fits_four_v5e():
    """Heads of size 64 are stored in pairs; separately, the caches alone would take twice as much."""
    assert paper_distillation("v5e-4", "fsdp:-1").memory_analysis().peak_memory_in_bytes < 14.5 * 2**30


@needs_gpu_compiler
@pytest.mark.slow
def test_paper_distillation_on_one_h100():
    """No step sorts the vocabulary or copies a cache, and few kernels run."""
    compiled = paper_distillation("h100-1", "")
    text = compiled.as_text()
    assert compiled.memory_analysis().peak_memory_in_bytes < 26 << 30
    assert hlo.kernels(text)[1] <= 700
    assert all(math.prod(map(int, re.findall(r"\d+", shape)[2:])) <= 8192 for _, shape in hlo.sorts(text))
    bodies = re.findall(r"while\(.*body=%?([\w.\-]+)", text)
    steps = [one for body in bodies for one in hlo.parse(text).computations[body]]
    caches = [one.opcode for one in steps if one.shape.startswith("bf16[2,128,25,256,64]")]
    assert caches.count("fusion") >= 2 * 48 and "copy" not in caches


@needs_libtpu
@pytest.mark.slow
def test_table_for_an_absent_slice(place):
    run = settings.parse_run(cli.load_config(f"{place}/config.py", ["--config.mesh=fsdp:-1"]))
    v5e, v4 = topology.get_topology("v5e-4"), topology.get_topology("v4-16")
    assert len(v5e.devices) == v5e.chips == 4 and v5e.specs.memory == 16 << 30
    assert v4.chips == len(v4.devices) == 8  # megacore
    lines = list(feasibility.table(run, [v5e], ["", str(place / "llama-3")]))
    assert lines[0] == "| GiB a device | v5e-4 |" and len(lines) == 4
    assert lines[2].startswith("| distill base, toxic | 0.") and lines[3].startswith("| fine-tune llama-3 | 0.")


@needs_libtpu
def test_largest_model_is_refused_without_compiling():
    run = settings.parse_run(settings.default_config())
    lines = list(feasibility.table(run, [topology.get_topology("v5e-4")], ["meta-llama/Llama-3.1-70B"]))
    assert "no: about 2" in lines[-1]
