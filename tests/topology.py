"""Devices that are not there, to compile for ahead of time."""

import functools

import jax
import pytest

from moejax.planning.chips import Topology, find


def gpus(name: str) -> Topology:
  """Skips the test where the compiler of GPUs is not installed."""
  pytest.importorskip("jax_plugins.xla_cuda13")
  return find(name)


@functools.cache
def chips() -> list[jax.Device]:
  """Eight chips; skips the test where their compiler is not installed."""
  pytest.importorskip("libtpu")
  with pytest.MonkeyPatch.context() as patch:
    # It reads these for its first program, and ends this process for a flag of
    # a CPU that it does not know.
    patch.delenv("XLA_FLAGS")
    devices = find("v5e:2x4").devices
    where = jax.sharding.SingleDeviceSharding(devices[0])
    jax.jit(lambda: 0, out_shardings=where).lower().compile()
  return devices
