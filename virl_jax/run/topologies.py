"""Machines that programs can be compiled for without having them: data sheets, and devices that JAX compiles for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from virl_jax.model import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    memory_gib: memory that programs can have.
    flops: dense bfloat16 operations a second.
    bandwidth: bytes a second, of its own memory.
    link: bytes a second that it receives from its neighbours in the same machine or slice.
    kind: what JAX calls it.
    cores, capability: multiprocessors and compute capability of a GPU.
    shared_kib: shared memory of each multiprocessor of a GPU.
  """

  platform: str
  memory_gib: float = math.inf
  flops: float = math.nan
  bandwidth: float = math.nan
  link: float = math.nan
  kind: str = ""
  cores: int = 0
  capability: tuple[int, int] = (0, 0)
  shared_kib: int = 0


# From vendors' data sheets: NVIDIA A100, H100 SXM, H200, RTX 4090; Google Cloud's pages of TPU v5e, v5p and v6e.
# TPU memory is what the compiler accepts, a little less than what is built in; of a GPU's, a GiB is the driver's.
CHIPS = {
    "a100-40": Chip("gpu", 38.5, 312e12, 1.555e12, 300e9, "NVIDIA A100-SXM4-40GB", 108, (8, 0), 164),
    "a100-80": Chip("gpu", 78.0, 312e12, 2.039e12, 300e9, "NVIDIA A100-SXM4-80GB", 108, (8, 0), 164),
    "h100": Chip("gpu", 78.0, 989e12, 3.352e12, 450e9, "NVIDIA H100 80GB HBM3", 132, (9, 0), 228),
    "h200": Chip("gpu", 139.0, 989e12, 4.8e12, 450e9, "NVIDIA H200", 132, (9, 0), 228),
    "rtx4090": Chip("gpu", 22.5, 165e12, 1.008e12, 32e9, "NVIDIA GeForce RTX 4090", 128, (8, 9), 100),
    "v5e": Chip("tpu", 15.75, 197e12, 0.819e12, 200e9, "TPU v5 lite"),
    "v5p": Chip("tpu", 95.0, 459e12, 2.765e12, 600e9, "TPU v5"),
    "v6e": Chip("tpu", 31.25, 918e12, 1.64e12, 448e9, "TPU v6 lite"),
    "cpu": Chip("cpu", kind="cpu"),
}
_ALSO = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}  # other names of the same chips
# Nothing runs on a chip, so that several processes may use the compiler at the same time.
_TPU_ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                    "TPU_WORKER_ID": "0"}
# A text proto, as XLA's GpuTargetConfigProto has it.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.7 device_memory_size: {memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: {cudnn} }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of chips, and how they are connected.

  Attributes:
    name: as it was asked for, such as "h100:8" or "v5e:8x8".
    chip: each of them.
    count: how many.
    shape: what follows the colon; "" for real devices.
  """

  name: str
  chip: Chip
  count: int
  shape: str


def parse(name: str) -> Topology:
  """Reads "h100:8", "v5e:8x8", "v5p:2x2x4", "cpu:8".

  Raises:
    ValueError: there is no such chip, or no such number of them.
  """
  kind, _, shape = name.partition(":")
  if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"topology must be one of {', '.join(CHIPS)}, a colon, and how many: h100:8, v5e:8x8, v5p:2x2x4, "
                     f"cpu:8. Received: {name!r}")
  return Topology(name, CHIPS[kind], math.prod(map(int, shape.split("x"))), shape)


def here(devices: list, memory_gib: float) -> Topology:
  """The machine that these devices are; its speeds are known only if `CHIPS` has their kind.

  Args:
    devices: devices that are here.
    memory_gib: memory that programs can have of each.
  """
  kind = devices[0].device_kind
  chip = known(kind) or Chip(sharding.platform(devices[0]), kind=kind)
  return Topology(f"{len(devices)} x {kind}", dataclasses.replace(chip, memory_gib=memory_gib), len(devices), "")


def known(kind: str) -> Chip | None:
  """The chip of `CHIPS` that JAX calls by this name, or None.

  Args:
    kind: `jax.Device.device_kind`.  TPUs have other names in other versions of libtpu.
  """
  kind = _ALSO.get(kind, kind)
  return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def peak_flops(kind: str) -> float | None:
  """Dense bfloat16 operations per second of the device that JAX calls by this name; None if unknown.

  Args:
    kind: `jax.Device.device_kind`.
  """
  chip = known(kind)
  return None if chip is None or math.isnan(chip.flops) else chip.flops


def prepare(topology: Topology) -> None:
  """Makes JAX look for CPU devices only; to be called before it looks for any.

  Raises:
    ValueError: a package is missing.
  """
  need = {"tpu": ("libtpu", "libtpu"), "gpu": ("jax_plugins.xla_cuda12", "jax-cuda12-plugin[with-cuda]")}
  module, package = need.get(topology.chip.platform, ("jax", "jax"))
  if not _found(module):
    raise ValueError(f"compiling for {topology.name} needs {package}, which is not installed: "
                     "pip install 'virl-jax[plan]'")
  jax.config.update("jax_platforms", "cpu")
  if topology.chip.platform == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.count)


def devices(topology: Topology) -> list:
  """The topology's devices, which programs can be compiled for but, except for a CPU's, not run on."""
  chip = topology.chip
  if chip.platform == "cpu":
    return jax.devices()[:topology.count]
  if chip.platform == "tpu":
    for key, value in _TPU_ENVIRONMENT.items():  # before what follows loads libtpu
      os.environ.setdefault(key, value)
    kind = topology.name.partition(":")[0]
    more = {}
    if topology.count == 1:
      more = {"chips_per_host_bounds": [1, 1, 1], "num_slices": 1}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{topology.shape}", **more).devices)
  target = _GPU.format(shared=chip.shared_kib * 1024, optin=(chip.shared_kib - 1) * 1024, cores=chip.cores,
                       bandwidth=int(chip.bandwidth), memory=int(chip.memory_gib * 2 ** 30), major=chip.capability[0],
                       minor=chip.capability[1], cudnn=_cudnn_minor(), kind=chip.kind)
  return list(topologies.get_topology_desc("", "cuda", target_config=target, topology=f"1x1x{topology.count}").devices)


def _found(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _cudnn_minor() -> int:
  try:
    return int(importlib.metadata.version("nvidia-cudnn-cu12").split(".")[1])
  except importlib.metadata.PackageNotFoundError:
    return 8
