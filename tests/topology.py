"""Devices of a TPU that is not there, to compile for ahead of time."""

import functools

import jax
import pytest

from moejax.planning.chips import find


@functools.cache
def chips() -> list[jax.Device]:
  """Eight chips; skips the test where their compiler is not installed."""
  pytest.importorskip("libtpu")
  return find("v5e:2x4").devices
