"""What a state takes of a device, before there is one."""

import functools
import re

import jax
import pytest

from moejax import dispatch as dispatch_lib
from moejax import experts, moe, router, sharding
from moejax.data import packing
from moejax.models import lstm_lm
from moejax.training import optim, session, state

B, L, D, E, F, V = 32, 4, 8, 8, 64, 16
# Of the experts, and of all else: embedding, softmax and gate.
EXPERTS, OTHERS = E * 2 * D * F, 2 * V * D + D * E
# Parameters, their gradients and two moments; three counters of steps.
BYTES, COUNTERS = 4 * 4, 3 * 4
ADAM = optim.adam(lambda count: 1e-3)


MIXTURE = moe.MoE(router.TopK(E, 2), experts.FeedForward(E, F), L)


def built(layout, mesh, tx=ADAM, mixtures=(MIXTURE,)):
  model = lstm_lm.LSTMLM(V, D, mixtures)
  batch = packing.batch_shapes(B, L)
  abstract = state.abstract_state(model, tx, batch, layout, mesh)
  return session.Session(None, model, tx, layout, mesh, None, batch, abstract)


@functools.cache
def on(name, **options):
  layout = sharding.LAYOUTS[name]
  return built(layout, sharding.make_mesh(layout), **options)


def needs(name):
  return state.with_gradients(on(name).abstract_state)


@pytest.fixture
def refused(monkeypatch):
  """refused(session, has): what is said of devices that have so many bytes."""

  def refused(about, has):
    monkeypatch.setattr(state, "device_memory", lambda device: has)
    with pytest.raises(ValueError, match=f"which has {has:,}") as caught:
      session.check_fits(about)
    return str(caught.value)

  return refused


@pytest.mark.parametrize(
  "name, copies", [("replicated", 8), ("expert", 1), ("data_expert", 2)]
)
def test_bytes_of_a_device(name, copies):
  want = BYTES * (EXPERTS * copies // 8 + OTHERS) + COUNTERS
  assert needs(name) == want


def test_what_fits_is_let_through(refused, monkeypatch):
  least = needs("replicated")
  assert f"take {least:,} bytes of" in refused(on("replicated"), least - 1)
  monkeypatch.setattr(state, "device_memory", lambda device: least)
  session.check_fits(on("replicated"))


def test_what_does_not_names_the_layouts_that_would(refused):
  said = refused(on("replicated"), needs("data_expert"))
  fits = {"expert", "data_expert", "expert_model", "fsdp"}
  assert {*re.findall("'([a-z_]+)'", said)} == fits | {"replicated"}


def test_what_fits_nowhere_names_where_it_would(refused):
  least = needs("fsdp")
  said = refused(on("expert"), least - least // 4)
  # Embedding, softmax and gate stay whole where only experts are split.
  assert (
    "no layout fits on 8 device(s); take 16, on which config.layout" in said
  )
  assert "'fsdp' would fit, or a smaller model, or config.optim" in said
  assert said.endswith("config.optimizer.kind 'factored_adam'.")


def test_what_no_number_of_devices_holds(refused):
  assert "on 8 device(s); take a smaller model, or" in refused(on("expert"), 9)
  # Nor other optimizers: no moments of experts, no experts.
  for options in (
    {"tx": optim.factored_adam(lambda count: 1e-3)},
    {"mixtures": ()},
  ):
    said = refused(on("expert", **options), 9)
    assert said.endswith("; take a smaller model.")


def test_a_layout_of_ones_own_is_among_those_that_would_fit(refused):
  own = sharding.Layout("own", (1, -1, 1), sharding.rules(vocab="expert"))
  there = built(own, sharding.abstract_mesh(own, 4)).abstract_state
  one = built(own, sharding.make_mesh(own, jax.devices()[:1]))
  said = refused(one, state.with_gradients(there))
  assert re.search(r"take 4, on which .*'own'.* would fit", said)


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
