"""Devices of a TPU that is not there, to compile for ahead of time."""

import functools
import os

import jax
import pytest


@functools.cache
def chips() -> list[jax.Device]:
  """Eight chips; skips the test where their compiler is not installed."""
  pytest.importorskip("libtpu")
  from jax.experimental import topologies

  # Else it asks the cloud what machine this is, and waits long.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # Nobody runs on it, so nobody need wait for another.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  return topologies.get_topology_desc("v5e:2x4", "tpu").devices
