"""What a state takes of a device, before there is one."""

import functools
import re

import jax
import optax
import pytest

from moejax import experts, moe, router, sharding
from moejax.data import text
from moejax.models import lstm_lm
from moejax.training import state

B, L, D, E, F, V = 8, 4, 8, 8, 64, 16
# Of the experts, and of all else: embedding, softmax and gate.
EXPERTS, OTHERS = E * 2 * D * F, 2 * V * D + D * E
# Parameters, their gradients and two moments; two counters of steps.
BYTES, COUNTERS = 4 * 4, 2 * 4


def in_layout(layout, mesh):
  mixture = moe.MoE(router.TopK(E, 2), experts.FeedForward(E, F), L)
  model = lstm_lm.LSTMLM(V, D, (mixture,))
  batch = {
    name: jax.ShapeDtypeStruct((B, L), dtype)
    for name, dtype in text.TYPES.items()
  }
  return state.target(model, optax.adam(1e-3), batch, layout, mesh)


@functools.cache
def target(name):
  layout = sharding.LAYOUTS[name]
  mesh = sharding.make_mesh(layout)
  return in_layout(layout, mesh), layout, mesh


def needed(target):
  return state.bytes_per_device((target, target.params))


@pytest.mark.parametrize(
  "name, copies", [("replicated", 8), ("expert", 1), ("data_expert", 2)]
)
def test_bytes_of_a_device(name, copies):
  want = BYTES * (EXPERTS * copies // 8 + OTHERS) + COUNTERS
  assert needed(target(name)[0]) == want


def check(name, has, monkeypatch):
  monkeypatch.setattr(state, "device_memory", lambda device: has)
  wanted, layout, mesh = target(name)
  state.check_fits(wanted, in_layout, layout, mesh)


def test_what_fits_is_let_through(monkeypatch):
  needs = needed(target("replicated")[0])
  check("replicated", needs, monkeypatch)
  with pytest.raises(ValueError, match=f"take {needs:,} bytes of each"):
    check("replicated", needs - 1, monkeypatch)


def test_what_does_not_names_the_layouts_that_would(monkeypatch):
  has = needed(target("data_expert")[0])
  with pytest.raises(ValueError, match=f"which has {has:,}") as caught:
    check("replicated", has, monkeypatch)
  named = set(re.findall("'([a-z_]+)'", str(caught.value)))
  fits = {"expert", "data_expert", "expert_model", "fsdp"}
  assert named == fits | {"replicated"}


def test_what_fits_nowhere_names_how_many_devices_it_takes(monkeypatch):
  least = needed(target("fsdp")[0])
  with pytest.raises(ValueError, match=r"on 8 device\(s\); take 16 or more"):
    check("expert", least // 2, monkeypatch)


def test_this_machine_has_memory():
  assert 1e8 < state.device_memory(jax.devices()[0]) < 1e13
