"""The translation model against loops; packing, padding, decoding, layouts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import recurrent

from moejax import experts, losses, moe, router, sharding
from moejax.models import attention, gnmt, layers

V, D, H, N, E, F, K = 11, 4, 5, 3, 4, 3, 2
forms = pytest.mark.parametrize("form", attention.FORMS)
wirings = pytest.mark.parametrize("wiring", gnmt.WIRINGS)
# (length of the target, of the source) of the pairs of each row.
ROWS = [[(3, 2), (2, 3)], [(5, 4)]]
L, M = 6, 6


def pairs():
  """Pairs of random pieces, as (inputs, targets, source)."""
  rng = np.random.default_rng(5)
  return [
    [
      tuple(rng.integers(0, V, (3, max(target, source))))
      for target, source in row
    ]
    for row in ROWS
  ]


def pack(rows, length=L, source_length=M, filler=0):
  """Puts pairs into rows; `filler` is what stands in padding."""
  size, source_size = (len(rows), length), (len(rows), source_length)
  batch = {
    "inputs": np.full(size, filler, np.int32),
    "targets": np.full(size, filler, np.int32),
    "segment": np.zeros(size, np.int32),
    "source": np.full(source_size, filler, np.int32),
    "source_segment": np.zeros(source_size, np.int32),
  }
  for r, row in enumerate(rows):
    at = source_at = 0
    for number, ((target, source), pieces) in enumerate(row, 1):
      here = slice(at, at + target)
      there = slice(source_at, source_at + source)
      batch["inputs"][r, here] = pieces[0][:target]
      batch["targets"][r, here] = pieces[1][:target]
      batch["segment"][r, here] = number
      batch["source"][r, there] = pieces[2][:source]
      batch["source_segment"][r, there] = number
      at, source_at = here.stop, there.stop
  for side in ("", "source_"):
    segment = batch[side + "segment"]
    batch[side + "start"] = np.diff(segment, axis=1, prepend=-1) != 0
  batch["mask"] = batch["segment"] > 0
  return {name: jnp.asarray(array) for name, array in batch.items()}


def sized():
  """Every row's pairs with their lengths."""
  return [
    list(zip(sizes, pieces, strict=True))
    for sizes, pieces in zip(ROWS, pairs(), strict=True)
  ]


def flat(choose=router.TopK, **options):
  drops = {"capacity_factor": None, "eval_capacity_factor": None} | options
  return moe.MoE(choose(E, K), experts.FeedForward(E, F), **drops)


def two_levels(choose=router.NoisyTopK, **options):
  drops = {"capacity_factor": None, "eval_capacity_factor": None} | options
  inner = moe.MoE(choose(2, 1), experts.FeedForward(2, F), **drops)
  return moe.HierarchicalMoE(choose(E, K), inner, **drops)


def make(mixture=flat, form="product", wiring="recurrent", **fields):
  lstm = layers.LSTM(D, H)
  return gnmt.GNMT(
    V,
    D,
    (lstm, mixture()),
    (lstm.clone(), mixture(), lstm.clone()),
    attention.Attention(N, form),
    wiring,
    **fields,
  )


def parameters(model, seed=0):
  """Weights far from the start, so that all of them matter."""
  keys = {"params": jax.random.key(0)}
  init = functools.partial(model.init, keys, method="loss")
  tree = nn.unbox(jax.eval_shape(init, pack(sized())))["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.7, a.dtype), tree
  )


def loss(model, params, batch, train=False, **options):
  return model.apply(
    {"params": params},
    batch,
    train=train,
    method="loss",
    rngs={"router": jax.random.key(3)},
    **options,
  )


@forms
@wirings
def test_loss_and_gradient_are_those_of_the_loops(form, wiring):
  """The gradient along one direction of all the weights."""
  model = make(form=form, wiring=wiring)
  params, batch = parameters(model), pack(sized())
  way = parameters(model, seed=1)
  pull = np.random.default_rng(2).normal(size=(len(ROWS), L))

  def along(params):
    run = functools.partial(loss, model, batch=batch)

    def total(params):
      nats = run(params)
      return (nats * jnp.asarray(pull, jnp.float32)).sum(), nats

    slopes, nats = jax.grad(total, has_aux=True)(params)
    return slopes, nats

  slopes, nats = jax.jit(along)(params)
  here, way = kinds.in_float64(params), kinds.in_float64(way)
  given = {name: np.asarray(a) for name, a in batch.items()}
  want = recurrent.gnmt_loss(here, K, form, wiring, given)
  np.testing.assert_allclose(nats, want, rtol=1e-4, atol=1e-5)
  ends = []
  for by in (1e-5, -1e-5):
    moved = jax.tree.map(lambda a, b, by=by: a + by * b, here, way)
    nats = recurrent.gnmt_loss(moved, K, form, wiring, given)
    ends.append((nats * pull).sum())
  got = sum(
    (np.asarray(a, np.float64) * b).sum()
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(way), strict=True)
  )
  np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-3)
  for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
    assert slope.any(), path


# -- packing and padding ------------------------------------------------------


@wirings
def test_two_pairs_in_a_row_are_two_rows(wiring):
  model = make(wiring=wiring)
  params = parameters(model)
  run = jax.jit(functools.partial(loss, model))
  (a, b), (c,) = sized()
  packed = run(params, pack([[a, b], [c], []]))
  apart = run(params, pack([[a], [b], [c]]))
  np.testing.assert_allclose(packed[0, :3], apart[0, :3], rtol=1e-5)
  np.testing.assert_allclose(packed[0, 3:5], apart[1, :2], rtol=1e-5)
  np.testing.assert_allclose(packed[1, :5], apart[2, :5], rtol=1e-5)
  assert not packed[0, 5:].any()
  # And a pair is not what stands before it.
  other = run(params, pack([[c], [b], []]))
  np.testing.assert_allclose(other[1, :2], packed[0, 3:5], rtol=1e-5)


MIXTURES = {
  "flat": flat,
  "noisy": functools.partial(flat, router.NoisyTopK),
  "balanced": functools.partial(flat, router.Balanced),
  "hierarchical": two_levels,
  "hierarchical balanced": functools.partial(two_levels, router.Balanced),
}
BALANCE = {"importance": 0.3, "z": 0.1}


@pytest.mark.parametrize(
  "name, wiring", [("balanced", "recurrent"), ("hierarchical", "parallel")]
)
def test_padding_changes_no_loss_or_figure(name, wiring):
  """Whatever stands in it, and however much of it there is."""
  model = make(MIXTURES[name], wiring=wiring)
  params = parameters(model)

  @jax.jit
  def run(params, batch):
    nats, sown = loss(model, params, batch, True, mutable=["routing"])
    aux, _ = losses.auxiliary(sown, BALANCE)
    return nats, aux, losses.balance(sown)

  # Noise depends on where a token stands, so there is none in longer rows.
  filled = [pack(sized(), filler=V - 1)]
  if name == "balanced":
    filled.append(pack(sized(), L + 2, M + 2, 1))
  nats, *figures = run(params, pack(sized()))
  same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  for batch in filled:
    others, *other_figures = run(params, batch)
    same(others[:, :L], nats)
    assert not others[~batch["mask"]].any()
    jax.tree.map(same, other_figures, figures)


# -- decoding -----------------------------------------------------------------


def decoding(name, wiring, form):
  """A model that would drop tokens, made one that drops none."""
  mixture = functools.partial(MIXTURES[name], eval_capacity_factor=0.5)
  model = make(mixture, form, wiring, vocab_multiple=8)
  model = gnmt.for_decoding(model)
  return model, parameters(model)


def translate(model, params, batch):
  """log p and attention of every place, fed piece by piece."""
  variables = {"params": params}
  source = [batch["source" + name] for name in ("", "_segment", "_start")]
  memory = model.apply(variables, *source, method="encode")

  def step(state, ids):
    state, log_p, weights = model.apply(
      variables, memory, state, ids, method="step"
    )
    return state, (log_p, weights)

  state = model.begin(len(batch["inputs"]))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
  _, (log_p, weights) = jax.lax.scan(step, state, batch["inputs"].T)
  return log_p.swapaxes(0, 1), weights.swapaxes(0, 1)


@pytest.mark.parametrize(
  "name, wiring, form",
  [
    ("noisy", "recurrent", "product"),
    ("balanced", "recurrent", "sum"),
    ("hierarchical", "parallel", "product"),
    ("hierarchical balanced", "parallel", "sum"),
  ],
)
def test_steps_are_the_whole_pass(name, wiring, form):
  model, params = decoding(name, wiring, form)
  rows = [[pair] for row in sized() for pair in row]
  batch = pack(rows)

  @jax.jit
  def run(params, batch):
    return loss(model, params, batch), translate(model, params, batch)

  nats, (log_p, weights) = run(params, batch)
  picked = jnp.take_along_axis(log_p, batch["targets"][:, :, None], axis=2)
  real = np.asarray(batch["mask"])
  np.testing.assert_allclose(
    -picked[..., 0][real], nats[real], rtol=1e-4, atol=1e-5
  )
  # Of the table's rows five are no piece.
  assert log_p.shape[-1] == V
  np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  of_padding = np.broadcast_to(
    batch["source_segment"][:, None] == 0, weights.shape
  )
  assert not weights[of_padding].any()


def test_a_translation_depends_on_nothing_else_in_the_batch():
  model, params = decoding("balanced", "recurrent", "product")
  (a, b), (c,) = sized()
  run = jax.jit(functools.partial(translate, model))
  one, _ = run(params, pack([[b], [], []]))
  other, _ = run(params, pack([[b], [c], [a]]))
  np.testing.assert_allclose(other[0], one[0], rtol=1e-5, atol=1e-6)


def test_experts_that_choose_cannot_translate():
  with pytest.raises(ValueError, match="expert_choice.*another router"):
    gnmt.for_decoding(make(functools.partial(flat, router.ExpertChoice)))


# -- precision, dropout, layouts ----------------------------------------------


def test_bfloat16_is_close_and_finite():
  model = make(dtype=jnp.bfloat16)
  params, batch = parameters(model), pack(sized())

  @jax.jit
  def run(params):
    wide = loss(model.clone(dtype=jnp.float32), params, batch, True)
    narrow = jax.value_and_grad(lambda p: loss(model, p, batch, True).sum())
    return wide.sum(), narrow(params)

  wide, (narrow, slopes) = run(params)
  np.testing.assert_allclose(narrow, wide, rtol=0.05)
  for slope in jax.tree.leaves(slopes):
    assert slope.dtype == jnp.float32 and np.isfinite(slope).all()


@wirings
def test_dropout_reaches_every_layer(wiring):
  """Where it leaves nothing of any output, nothing is left."""
  model = make(wiring=wiring, dropout=1 - 1e-7)
  run = jax.jit(functools.partial(model.apply, train=True))
  rngs = {"dropout": jax.random.key(0)}
  assert not run({"params": parameters(model)}, pack(sized()), rngs=rngs).any()


def test_experts_over_eight_devices_give_the_same():
  """Loss, balance losses and gradients, in groups of one row."""
  model = make(
    lambda: moe.HierarchicalMoE(
      router.Balanced(8, K),
      moe.MoE(router.Balanced(2, 1), experts.FeedForward(2, F)),
      L,
    )
  )
  row, (pair,) = sized()
  batch = pack([row, [pair]] * 4)
  params = parameters(model)
  weights = {"importance": 0.3, "threshold": 0.2}

  def step(params, batch):
    def total(params):
      nats, sown = loss(model, params, batch, True, mutable=["routing"])
      aux, _ = losses.auxiliary(sown, weights)
      return nats.mean() + aux, nats

    return jax.value_and_grad(total, has_aux=True)(params)

  want = jax.jit(step)(params, batch)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  init = functools.partial(model.init, jax.random.key(0), method="loss")
  boxed = jax.eval_shape(init, batch)["params"]
  places = sharding.shardings(boxed, layout, mesh)
  where = sharding.batch_sharding(layout, mesh, 8)
  with sharding.use(layout, mesh):
    got = jax.jit(step, out_shardings=(None, places))(
      jax.device_put(params, places), jax.device_put(batch, where)
    )
  kernel = got[1]["encoder_1"]["secondary"]
  assert not any(leaf.is_fully_replicated for leaf in jax.tree.leaves(kernel))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, got, want)
