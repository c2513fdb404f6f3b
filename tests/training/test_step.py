"""One step: its loss, its gradient, its microbatches; where its state lies."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import experts, losses, moe, router, routing, sharding
from moejax.models import layers, lstm_lm
from moejax.planning import collectives
from moejax.training import state, step

B, L, D, V = 8, 4, 4, 20
LAYOUT = sharding.LAYOUTS["replicated"]
SGD = optax.sgd(1.0)
IMPORTANCE = (("importance", 1.0),)


def model(noisy=False, dropout=0.0, num_samples=0, capacity=None):
  chooser = router.NoisyTopK(8, 2) if noisy else router.TopK(8, 2)
  mixture = moe.MoE(
    chooser, experts.FeedForward(8, 6), group_size=L, capacity_factor=capacity
  )
  stack = (layers.LSTM(D), mixture)
  return lstm_lm.LSTMLM(V, D, stack, dropout, num_samples)


def make_batch():
  random = np.random.default_rng(0)
  words = np.array([4, 3, 4, 1, 4, 2, 4, 4])
  mask = np.arange(L) < words[:, None]
  start = random.random((B, L)) < 0.3
  start[:, 0] = True
  return {
    "inputs": random.integers(0, V, (B, L)).astype(np.int32) * mask,
    "targets": random.integers(0, V, (B, L)).astype(np.int32) * mask,
    "mask": mask,
    "start": start,
  }


BATCH = make_batch()


def shapes(rows):
  return {
    name: jax.ShapeDtypeStruct((rows, L), value.dtype)
    for name, value in BATCH.items()
  }


@functools.cache
def make(net, layout=LAYOUT, devices=1, tx=SGD, rows=B):
  mesh = sharding.make_mesh(layout, jax.devices()[:devices])
  return state.create(net, tx, shapes(rows), 0, layout, mesh), mesh


@functools.cache
def step_fn(
  net, tx=SGD, rows=B, aux=(), parts=1, scope="batch", over="microbatch"
):
  current, _ = make(net, tx=tx, rows=rows)
  fn = functools.partial(
    step.train_step,
    model=net,
    tx=tx,
    aux_weights=dict(aux),
    aux_scope=scope,
    seed=0,
    microbatches=parts,
    balance_over=over,
  )
  return jax.jit(fn, out_shardings=(state.shardings(current), None))


def run(net, batch=BATCH, steps=1, tx=SGD, **options):
  """Trains from the same start; compiles once for the same settings."""
  current, mesh = make(net, tx=tx, rows=len(batch["mask"]))
  fn = step_fn(net, tx, len(batch["mask"]), **options)
  rows = sharding.batch_sharding(LAYOUT, mesh, len(batch["mask"]))
  with sharding.use(LAYOUT, mesh):
    for _ in range(steps):
      current, metrics = fn(current, step.place(batch, rows))
  return jax.device_get((current, metrics))


def assert_close(got, want, rtol=1e-4, atol=1e-5):
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol),
    got,
    want,
  )


def test_loss_is_the_mean_over_real_words():
  net = model()
  params = {"params": make(net)[0].params}
  batch = jax.tree.map(jnp.asarray, BATCH)
  _, metrics = run(net)

  def logits_of(net, batch):
    return net.head.logits(net(batch))

  logits = jax.jit(nn.apply(logits_of, net))(params, batch)
  nats = -np.asarray(jax.nn.log_softmax(logits))
  picked = np.take_along_axis(nats, BATCH["targets"][..., None], 2)[..., 0]
  np.testing.assert_allclose(
    metrics["loss"], picked[BATCH["mask"]].mean(), rtol=1e-5
  )
  assert metrics["words"] == BATCH["mask"].sum()
  part = jax.jit(functools.partial(step.eval_step, model=net))(
    params["params"], batch
  )
  np.testing.assert_allclose(part["loss"], picked[BATCH["mask"]].sum(), 1e-5)
  assert part["words"] == BATCH["mask"].sum()
  assert part["dropped_fraction"] == 0


def test_update_is_the_gradient_of_loss_and_balance():
  net = model(noisy=True)
  aux = (("importance", 0.5), ("load", 0.25))
  before = make(net)[0].params
  plain, _ = run(net)
  balanced, metrics = run(net, aux=aux)
  assert metrics["auxiliary"] > 0
  assert int(plain.step) == 1

  def gate(tree):
    return tree["layers_1"]["router"]["gate"]["kernel"]

  # Balance reaches the router.
  assert np.abs(gate(plain.params) - gate(balanced.params)).max() > 1e-4
  norm = optax.tree.norm(jax.tree.map(jnp.subtract, before, balanced.params))
  np.testing.assert_allclose(norm, metrics["grad_norm"], rtol=1e-5)


def test_scope_of_the_balance_losses_is_the_groups_own():
  """Groups are the rows here: alone, a row is a batch of one group."""
  net = model()
  _, by_group = run(net, aux=IMPORTANCE, scope="group")
  rows = [
    run(net, {n: v[i : i + 1] for n, v in BATCH.items()}, aux=IMPORTANCE)[1]
    for i in range(B)
  ]
  want = np.mean([row["auxiliary"] for row in rows])
  np.testing.assert_allclose(by_group["auxiliary"], want, rtol=1e-5)
  _, whole = run(net, aux=IMPORTANCE)
  assert whole["auxiliary"] < 0.9 * want


def test_padding_changes_nothing():
  padding = ~BATCH["mask"]
  other = dict(BATCH)
  other["inputs"] = np.where(padding, 7, BATCH["inputs"]).astype(np.int32)
  other["targets"] = np.where(padding, 3, BATCH["targets"]).astype(np.int32)
  want = run(model(), aux=IMPORTANCE)
  got = run(model(), other, aux=IMPORTANCE)
  assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("parts, over", [(4, "microbatch"), (4, "batch")])
def test_microbatches_have_the_same_task_gradient(parts, over):
  want, metrics = run(model())
  got, part_metrics = run(model(), parts=parts, over=over)
  assert_close(got, want)
  for name in ("loss", "grad_norm", "words"):
    np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5)


def cv_squared(x):
  return jnp.var(x) / jnp.mean(x) ** 2


def balance(decisions):
  """CV^2 of importance and of load, of one layer's decisions together."""

  def total(name, found=decisions):
    return sum(getattr(each, name).sum(axis=0) for each in found)

  load = total("load")
  if decisions[0].primary is not None:
    above = [each.primary for each in decisions]
    reached = total("count", above) - total("dropped", above)
    share = total("load", above) / reached
    load = (load.reshape(share.size, -1) * share[:, None]).reshape(-1)
  return jnp.stack([cv_squared(total("importance")), cv_squared(load)])


WITHIN = moe.MoE(router.NoisyTopK(3, 2), experts.FeedForward(3, 6))
MIXTURES = {
  "two levels": moe.HierarchicalMoE(router.NoisyTopK(4, 2), WITHIN, L, 2),
  "in experts": moe.MoE(router.NoisyTopK(2, 1), experts.Each(2, WITHIN), L),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_balance_over_the_batch_is_that_of_all_decisions_together(kind):
  """Value and gradient, from the decisions of each microbatch by itself."""
  net, parts = lstm_lm.LSTMLM(V, D, (MIXTURES[kind],)), 2
  weights = jnp.array([0.5, 0.25])

  def of_part(params, i):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i)
    loss, sown = net.apply(
      {"params": params},
      {name: jnp.asarray(rows[i::parts]) for name, rows in BATCH.items()},
      train=True,
      rngs={"router": jax.random.fold_in(key, 1)},
      mutable=["routing"],
      method="loss",
    )
    return loss.sum() / jnp.float32(BATCH["mask"].sum()), losses.routings(sown)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def by_hand(params):
    tasks, found = zip(*(of_part(params, i) for i in range(parts)), strict=True)
    layers = list(zip(*found, strict=True))
    chosen = [[routing.edges(one).expert for one in layer] for layer in layers]
    together = jnp.stack([balance(layer) for layer in layers])
    apart = sum(balance([one]) for layer in layers for one in layer) / parts
    metrics = {
      "loss": sum(tasks),
      "auxiliary": (weights * together.sum(axis=0)).sum(),
      "cv_importance": jnp.sqrt(together[:, 0]).mean(),
      "cv_load": jnp.sqrt(together[:, 1]).mean(),
    }
    total = metrics["loss"] + metrics["auxiliary"]
    return total, (metrics, (weights * apart).sum(), chosen)

  before = make(net)[0].params
  slope, (want, mean, chosen) = by_hand(before)
  aux = (("importance", 0.5), ("load", 0.25))
  after, metrics = run(net, aux=aux, parts=parts, over="batch")
  assert_close({name: metrics[name] for name in want}, want)
  assert_close(jax.tree.map(jnp.subtract, before, after.params), slope)
  # CV^2 is not linear: the mean over microbatches is another quantity.
  assert mean > 1.02 * want["auxiliary"]
  if kind == "two levels":
    _, apart = run(net, aux=aux, parts=parts)
    np.testing.assert_allclose(apart["auxiliary"], mean, rtol=1e-4)
    assert_close(apart["count"], metrics["count"], rtol=0, atol=0)
  # Edges of all microbatches, mixture by mixture.
  counts = jax.tree.leaves(metrics["count"])
  for count, parts_of_layer in zip(counts, chosen, strict=True):
    edges = np.zeros(count.size)
    for expert in np.concatenate([np.ravel(each) for each in parts_of_layer]):
      if expert < edges.size:
        edges[expert] += 1
    np.testing.assert_array_equal(count, edges)


def test_counts_cost_no_exchange():
  """They are those that the balance takes."""
  layout, tx, found = sharding.LAYOUTS["expert"], SGD, []
  net = model(noisy=True)
  current, mesh = make(net, layout, 8, tx)
  whole = sharding.whole_sharding(mesh)
  rows = sharding.batch_sharding(layout, mesh, B)
  for has_counts in (True, False):

    def fn(current, batch, has_counts=has_counts):
      options = {"model": net, "tx": tx, "aux_weights": {}, "seed": 0}
      current, metrics = step.train_step(current, batch, **options)
      return current, metrics if has_counts else metrics | {"count": ()}

    places = state.shardings(current), whole
    with sharding.use(layout, mesh):
      lowered = jax.jit(fn, out_shardings=places).lower(
        current, step.place(BATCH, rows)
      )
    text = lowered.compile().as_text()
    found.append(
      sorted(
        (each.kind, each.bytes, each.axes)
        for each in collectives.read(text, mesh)
      )
    )
  assert found[0] == found[1] != []


def test_what_a_step_refuses():
  with pytest.raises(ValueError, match="balance_over is 'bath'.*'microbatch'"):
    run(model(), over="bath")
  with pytest.raises(ValueError, match="3 microbatches do not divide the 8"):
    run(model(), parts=3)


NOISY = {"noisy": True, "dropout": 0.2, "num_samples": 8, "capacity": 1.25}
CLIPPED_ADAM = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))


def test_every_step_draws_anew():
  net = model(**NOISY)
  frozen = {"tx": optax.sgd(0.0)}
  _, first = run(net, **frozen)
  _, second = run(net, steps=2, **frozen)
  assert first["loss"] != second["loss"]


def test_state_lies_as_the_layout_and_its_abstract_say():
  layout = sharding.LAYOUTS["expert"]
  net = model(**NOISY)
  current, mesh = make(net, layout, 8, CLIPPED_ADAM, B)
  moments = current.opt_state[1][0]
  for tree in (current.params, moments.mu, moments.nu):
    weight = tree["layers_1"]["experts"]["w_in"]
    assert weight.addressable_shards[0].data.shape == (1, D, 6)
    assert tree["embed"]["table"].is_fully_replicated
  abstract = state.abstract_state(net, CLIPPED_ADAM, shapes(B), layout, mesh)

  def same(want, got):
    assert want.shape == got.shape and want.dtype == got.dtype
    assert want.sharding.is_equivalent_to(got.sharding, want.ndim)

  jax.tree.map(same, abstract, current)
