"""Machines by name."""

import pytest

from virl_jax.run import topologies


@pytest.mark.parametrize("name, kind, count", [("h100:8", "gpu", 8), ("v5e:8x8", "tpu", 64), ("v5p:2x2x4", "tpu", 16),
                                               ("v6e:1x1", "tpu", 1), ("cpu:8", "cpu", 8)])
def test_names(name, kind, count):
  found = topologies.parse(name)
  assert (found.chip.platform, found.count) == (kind, count)


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:0", "h800:8", "v5e:8x", "v5e:x8", ":8", "cpu:-1", ""])
def test_a_name_that_is_not_known(name):
  with pytest.raises(ValueError, match="topology must be one of a100-40, .*h100:8.*Received"):
    topologies.parse(name)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(topologies, "_found", lambda module: False)
  with pytest.raises(ValueError, match="compiling for v5e:2x2 needs libtpu, which is not installed: pip install"):
    topologies.prepare(topologies.parse("v5e:2x2"))
  with pytest.raises(ValueError, match="needs jax-cuda12-plugin"):
    topologies.prepare(topologies.parse("h100:8"))


@pytest.mark.parametrize("kind, flops", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12),
    ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12),
    ("cpu", None), ("NVIDIA H100 PCIe", None), ("", None)])
def test_what_a_device_can_do_by_its_name(kind, flops):
  """A device that is not in the table has no known speed: an H100 for PCIe is slower than an H100 SXM."""
  assert topologies.peak_flops(kind) == flops
