"""What all tests share: eight host devices, one compilation cache, real data where it lies beside the repository."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


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
    if not path.is_dir():
        pytest.skip("real models are not here: UNIDETOX_REAL_MODELS names no folder")
    return path


@pytest.fixture(scope="module")
def compile_fast():
    """Hundreds of small programs: their compilation is all the time that these tests take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
