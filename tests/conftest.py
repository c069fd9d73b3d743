"""What all tests share: eight host devices, a compilation cache for the processes that they start, real data."""

import collections
import gc
import importlib.util
import os
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
HANGS = 3600  # seconds after which a process or a wait counts as hanging, however busy the machine is
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # to compile for GPUs, not to run on one
# Thousands of small programs: their compilation is most of the time that the tests take
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for one another by turning round

import jax  # noqa: E402
import pytest  # noqa: E402
from etils import epath  # noqa: E402
from jax._src import compilation_cache, compiler  # noqa: E402
from jax.extend.backend import clear_backends  # noqa: E402

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
    compile_or_get_cached = compiler.compile_or_get_cached

    def single_device_cached(backend, computation, devices, *rest, **named):
        """Programs of one device are kept on disk; `distributed.use_compilation_cache` says why no others."""
        compilation_cache._cache_checked, compilation_cache._cache_used = True, devices.size == 1
        return compile_or_get_cached(backend, computation, devices, *rest, **named)

    compiler.compile_or_get_cached = single_device_cached
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]  # splitting costs more than it gains where all cores are busy
if jax.__version_info__ < (0, 11):  # LLVM alone compiles in half the time; later versions always emit by MLIR
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
gc.set_threshold(100_000, 50, 100)  # tracing makes so many objects that collecting them took a twentieth of the time

if importlib.util.find_spec("torch") is None:  # EXTRA=quick of launch/test.sh
    IMPORTS = re.compile(r"^(import|from) (\w+\.)?(torch|eval_helpers)\b", re.MULTILINE)
    collect_ignore = [file.name for file in ROOT.glob("tests/test_*.py") if IMPORTS.search(file.read_text())]


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Real data and the real tiny model; a test that needs them is skipped where they are absent."""
    path = pathlib.Path(os.environ.get("UNIDETOX_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("real data is not here: ../shared is absent")
    return path


@pytest.fixture(scope="session")
def real_models() -> pathlib.Path:
    """SmolLM2-135M and Gemma 3 270M; a test that needs them is skipped where they are absent."""
    path = pathlib.Path(os.environ.get("UNIDETOX_REAL_MODELS", ROOT.parent / "real_models"))
    missing = [name for name in ("smollm2-135m", "gemma3-270m") if not (path / name).is_dir()]
    if missing:
        pytest.skip(f"real models are not here: UNIDETOX_REAL_MODELS names no folder with {' and '.join(missing)}")
    return path


@pytest.fixture(scope="session")
def bucket():
    """`gs://bucket`, empty at first, of an emulator that this process and those it starts find."""
    from gcs_emulator import emulator

    with emulator() as environment:
        os.environ.update(environment)
        yield epath.Path("gs://bucket")


EVERY = "UNIDETOX_EVERY_VARIANT" in os.environ


@pytest.fixture(scope="function" if EVERY else "module", autouse=True)
def forget_programs():
    """A module's compiled programs go with it, or a test's where a module has as many as all have otherwise: together
    they take more memory maps than a process may have, and XLA then dies in the middle of a compilation."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """One CPU device in this process, for tests that are not about meshes: its programs are smaller, and kept on disk.
    Nothing changes on a GPU."""
    _set_cpu_devices(1)
    yield
    _set_cpu_devices(8)


def _set_cpu_devices(count: int):
    if os.environ["JAX_PLATFORMS"] == "cpu":
        clear_backends()
        jax.config.update("jax_num_cpu_devices", count)


@pytest.fixture(scope="module")
def optimized():
    """Programs as users get them, here and in processes that are started, for tests that run them long."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
            patch.delenv(name, raising=False)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


UNTRACKED = pytest.StashKey[set[str]]()


def untracked() -> set[str]:
    """Files of the repository that git neither tracks nor ignores; none where this is no repository."""
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines())


def pytest_report_header():
    return (
        f"without PyTorch; not collected: {' '.join(sorted(collect_ignore))}" if "collect_ignore" in globals() else []
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "quick_variants(names or a count): of a parametrised test, only these or so many of the first are not slow",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(items):
    """Files with the most slow tests come first: xdist's workers take whole files, and none should begin a long one
    last. Then variants that are not among the quick ones are marked slow as well."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    before: collections.Counter = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("quick_variants"):
            test, variant = item.nodeid.removesuffix("]").split("[", 1)
            if variant not in mark.args and not (isinstance(mark.args[0], int) and before[test] < mark.args[0]):
                item.add_marker(pytest.mark.slow)
            before[test] += 1


def pytest_terminal_summary(terminalreporter):
    """How far apart things were at most that tests compare, where they recorded it: for launch/proofs.sh families."""
    if not EVERY:
        return
    most: dict[str, float] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            most[name] = max(value, most.get(name, 0.0))
    for name, value in sorted(most.items()):
        terminalreporter.write_line(f"{name}: {value:.1e}")


def pytest_sessionstart(session):
    session.config.stash[UNTRACKED] = untracked()


def pytest_sessionfinish(session):
    """Fails the run if a test left a file in the repository."""
    left = sorted(untracked() - session.config.stash[UNTRACKED])
    if left and not hasattr(session.config, "workerinput"):  # xdist's workers leave it to the process that started them
        print(f"\nleft in the repository by a test: {', '.join(left)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
