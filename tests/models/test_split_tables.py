"""Tables of words split over devices: the numbers of whole ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.data import packing
from moejax.models import lstm_lm, softmax
from moejax.planning import collectives

# Rows up to a multiple of 8: six of them are no word.
B, L, V, D, ROWS = 8, 3, 2042, 64, 2048
TABLE = 4 * ROWS * D
LAYOUTS = {
  "all": sharding.Layout("all", (1, -1, 1), sharding.rules(vocab="expert")),
  "half": sharding.Layout("half", (2, -1, 1), sharding.rules(vocab="expert")),
}


def model(num_samples):
  return lstm_lm.LSTMLM(V, D, (), num_samples=num_samples, vocab_multiple=8)


def batch():
  random = np.random.default_rng(0)
  words = random.integers(0, V, (2, B, L)).astype(np.int32)
  # The last word of all, whose rows are next to those that are none.
  words[:, 0, 0] = V - 1
  mask = np.ones((B, L), bool)
  fields = {"inputs": words[0], "targets": words[1], "mask": mask}
  fields["start"] = ~mask
  types = {n: s.dtype for n, s in packing.batch_shapes(B, L).items()}
  assert {n: a.dtype for n, a in fields.items()} == types
  return jax.tree.map(jnp.asarray, fields)


@functools.cache
def boxed():
  init = functools.partial(model(0).init, jax.random.key(0), method="loss")
  return jax.jit(init)(batch())["params"]


def gradient(num_samples, params, batch):
  def loss(params):
    return (
      model(num_samples)
      .apply(
        {"params": params},
        batch,
        train=num_samples > 0,
        method="loss",
        rngs={"softmax": jax.random.key(1)},
      )
      .mean()
    )

  return jax.value_and_grad(loss)(params)


def test_rows_that_are_no_word_have_no_chance():
  params, rows = nn.unbox(boxed()), batch()
  assert params["head"]["table"].shape == (ROWS, D)
  whole = lstm_lm.LSTMLM(V, D, ())
  cut = jax.tree.map(lambda table: table[:V], params)
  loss = functools.partial(whole.apply, method="loss")
  want = loss({"params": cut}, rows)
  got = model(0).apply({"params": params}, rows, method="loss")
  np.testing.assert_allclose(got, want, rtol=1e-6)
  _, slope = jax.jit(gradient, static_argnums=0)(0, params, rows)
  assert not slope["head"]["table"][V:].any()
  assert slope["head"]["table"][:V].any(axis=1).all()


@pytest.mark.parametrize("num_samples", [0, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_split_tables_agree_with_whole_ones(num_samples, name):
  """And none is ever on the wire, but sums over the copies of a part."""
  layout, params = LAYOUTS[name], nn.unbox(boxed())
  mesh = sharding.make_mesh(layout)
  places = sharding.shardings(boxed(), layout, mesh)
  given = (
    jax.device_put(params, places),
    jax.device_put(batch(), sharding.batch_sharding(layout, mesh, B)),
  )
  run = functools.partial(gradient, num_samples)
  with sharding.use(layout, mesh):
    on_mesh = jax.jit(run, out_shardings=(None, places))
    compiled = on_mesh.lower(*given).compile()
  parts = {"all": 8, "half": 4}[name]
  for table in jax.tree.leaves(given[0]):
    assert table.addressable_shards[0].data.shape == (ROWS // parts, D)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, compiled(*given), jax.jit(run)(params, batch()))
  found = collectives.read(compiled.as_text(), mesh)
  assert found
  part = 2 * TABLE // 4 if name == "half" else 0
  for each in found:
    if each.axes == ("data",):
      assert each.bytes <= part
    else:
      assert each.bytes < TABLE // 8, each


@pytest.mark.parametrize(
  "layout", [*LAYOUTS.values(), sharding.LAYOUTS["fsdp"]]
)
def test_the_bound_of_logits_is_a_devices_own(layout, monkeypatch):
  """Of all time steps here; of one alone where a device had all logits."""
  monkeypatch.setattr(softmax, "_LOGITS", B * L * ROWS // 8)

  def loops():
    run = functools.partial(model(0).apply, method="loss")
    traced = jax.make_jaxpr(run)({"params": sharding.unbox(boxed())}, batch())
    return str(traced).count("scan[")

  assert loops() == 1
  with sharding.use(layout, sharding.make_mesh(layout)):
    assert loops() == 0
