"""What a state takes of a device, before there is one."""

import functools
import re

import jax
import pytest

from moejax import dispatch as dispatch_lib
from moejax import experts, moe, router, sharding
from moejax.data import packing
from moejax.models import lstm_lm
from moejax.training import optim, state

B, L, D, E, F, V = 32, 4, 8, 8, 64, 16
# Of the experts, and of all else: embedding, softmax and gate.
EXPERTS, OTHERS = E * 2 * D * F, 2 * V * D + D * E
# Parameters, their gradients and two moments; three counters of steps.
BYTES, COUNTERS = 4 * 4, 3 * 4
ADAM = optim.adam(lambda count: 1e-3)


MIXTURE = moe.MoE(router.TopK(E, 2), experts.FeedForward(E, F), L)


def in_layout(layout, mesh, tx=ADAM, mixtures=(MIXTURE,)):
  model = lstm_lm.LSTMLM(V, D, mixtures)
  batch = packing.batch_shapes(B, L)
  return state.abstract_state(model, tx, batch, layout, mesh)


@functools.cache
def abstract(name):
  layout = sharding.LAYOUTS[name]
  mesh = sharding.make_mesh(layout)
  return in_layout(layout, mesh), layout, mesh


@pytest.mark.parametrize(
  "name, copies", [("replicated", 8), ("expert", 1), ("data_expert", 2)]
)
def test_bytes_of_a_device(name, copies):
  want = BYTES * (EXPERTS * copies // 8 + OTHERS) + COUNTERS
  assert state.with_gradients(abstract(name)[0]) == want


def check(name, has, monkeypatch):
  monkeypatch.setattr(state, "device_memory", lambda device: has)
  wanted, layout, mesh = abstract(name)
  state.check_fits(wanted, in_layout, layout, mesh)


def test_what_fits_is_let_through(monkeypatch):
  needs = state.with_gradients(abstract("replicated")[0])
  check("replicated", needs, monkeypatch)
  with pytest.raises(ValueError, match=f"take {needs:,} bytes of each"):
    check("replicated", needs - 1, monkeypatch)


def test_what_does_not_names_the_layouts_that_would(monkeypatch):
  has = state.with_gradients(abstract("data_expert")[0])
  with pytest.raises(ValueError, match=f"which has {has:,}") as caught:
    check("replicated", has, monkeypatch)
  named = set(re.findall("'([a-z_]+)'", str(caught.value)))
  fits = {"expert", "data_expert", "expert_model", "fsdp"}
  assert named == fits | {"replicated"}


def test_what_fits_nowhere_names_where_it_would(monkeypatch):
  least = state.with_gradients(abstract("fsdp")[0])
  with pytest.raises(ValueError, match=r"no layout fits on 8 dev") as caught:
    check("expert", least - least // 4, monkeypatch)
  said = str(caught.value)
  # Embedding, softmax and gate stay whole where only experts are split.
  assert "take 16, on which config.layout 'fsdp' would fit, or a sma" in said
  assert said.endswith("config.optimizer.kind 'factored_adam'.")


def test_what_no_number_of_devices_holds(monkeypatch):
  with pytest.raises(ValueError, match=r"on 8 device\(s\); take a smaller mod"):
    check("expert", 100, monkeypatch)


@pytest.mark.parametrize(
  "options",
  [
    {"tx": optim.factored_adam(lambda count: 1e-3)},
    {"mixtures": ()},
  ],
  ids=["no moments of experts", "no experts"],
)
def test_no_other_optimizer_where_it_would_not_help(options, monkeypatch):
  monkeypatch.setattr(state, "device_memory", lambda device: 100)
  make = functools.partial(in_layout, **options)
  _, layout, mesh = abstract("expert")
  with pytest.raises(ValueError, match=r"; take a smaller model\.$"):
    state.check_fits(make(layout, mesh), make, layout, mesh)


def test_a_layout_of_ones_own_is_among_those_that_would_fit(monkeypatch):
  own = sharding.Layout("own", (1, -1, 1), sharding.rules(vocab="expert"))
  one = sharding.make_mesh(own, jax.devices()[:1])
  there = in_layout(own, sharding.abstract_mesh(own, 4))
  monkeypatch.setattr(
    state, "device_memory", lambda device: state.with_gradients(there)
  )
  with pytest.raises(ValueError, match=r"take 4, on which .*'own'.* would fit"):
    state.check_fits(in_layout(own, one), in_layout, own, one)


@pytest.mark.parametrize("content, counts", [("12345\n", True), ("max", False)])
def test_a_container_has_less_than_its_machine(
  content, counts, monkeypatch, tmp_path
):
  whole = state.device_memory(jax.devices()[0])
  (tmp_path / "limit").write_text(content)
  limits = [str(tmp_path / name) for name in ("limit", "nowhere")]
  monkeypatch.setattr(state, "_LIMITS", limits)
  has = state.device_memory(jax.devices()[0])
  assert has == 12345 // 8 if counts else has >= whole > 1e8


@pytest.mark.parametrize("dispatch", dispatch_lib.DISPATCH)
def test_a_state_is_made_of_layers_that_recompute(dispatch):
  """By running the program: shapes alone show nothing of a trace that leaks."""
  layer = MIXTURE.clone(dispatch=dispatch, recompute=True)
  model = lstm_lm.LSTMLM(V, D, (layer,))
  shapes = packing.batch_shapes(B, L)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  made = state.create(model, ADAM, shapes, 0, layout, mesh)
  assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(made))
