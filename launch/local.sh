#!/usr/bin/env bash
# Trains on this one host, on the fastest kind of device that is here: TPU, else NVIDIA GPU, else CPU.
#
#   bash launch/local.sh configs/tiny.py --workdir=runs/tiny [--config.KEY=VALUE ...]
#
# What follows the config file goes to `python -m virl_jax.train` unchanged.  To choose for yourself, set
# JAX_PLATFORMS (cpu, cuda or tpu) or PYTHON (the interpreter).
set -euo pipefail

usage="usage: bash launch/local.sh CONFIG.py [--workdir=DIR] [--config.KEY=VALUE ...]"
if [[ $# -lt 1 || $1 == -* ]]; then
  echo "The first argument must be a config file, such as configs/tiny.py." >&2
  echo "$usage" >&2
  exit 2
fi
config=$1
shift
if [[ ! -f $config ]]; then
  echo "There is no config file '$config' (looked from $PWD)." >&2
  echo "$usage" >&2
  exit 2
fi
python=${PYTHON:-python}
if ! command -v "$python" > /dev/null; then
  echo "There is no Python at '$python'.  Activate an environment with virl_jax, or set PYTHON." >&2
  exit 2
fi

installed() {  # whether one of these modules can be imported
  "$python" -c 'import importlib.util, sys
sys.exit(not any(map(importlib.util.find_spec, sys.argv[1:])))' "$@"
}

platforms=${JAX_PLATFORMS:-}
if [[ -z $platforms ]]; then
  platforms=cpu
  if compgen -G '/dev/accel*' > /dev/null || compgen -G '/dev/vfio/[0-9]*' > /dev/null; then
    if installed libtpu; then
      platforms=tpu,cpu
    else
      echo "If this host has a TPU, install JAX for it: pip install 'virl-jax[tpu]'" >&2
    fi
  fi
  if [[ $platforms == cpu ]] && nvidia-smi -L > /dev/null 2>&1; then
    if installed jax_cuda12_plugin jax_cuda13_plugin; then
      platforms=cuda,cpu
    else
      echo "An NVIDIA GPU is here, but this JAX cannot use it: pip install 'virl-jax[cuda12]' (or cuda13)" >&2
    fi
  fi
fi
export JAX_PLATFORMS=$platforms

if [[ $platforms == cuda* || $platforms == gpu* ]]; then
  # Lets collectives overlap with computation.
  export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
fi

echo "config $config, JAX_PLATFORMS=$JAX_PLATFORMS, XLA_FLAGS=${XLA_FLAGS:-}"
exec "$python" -m virl_jax.train --config="$config" "$@"
