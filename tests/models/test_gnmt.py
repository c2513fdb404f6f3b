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
from moejax.models import attention, gnmt, layers, lstm_lm
from moejax.models.recurrent import RecurrentMoE

V, D, H, N, E, F, K = 11, 4, 5, 3, 4, 3, 2
wirings = pytest.mark.parametrize("wiring", attention.WIRINGS)
# (length of the target, of the source) of the pairs of each row.
ROWS = [[(3, 2), (2, 3)], [(5, 4)]]
L, M = 6, 6


@functools.cache
def sized():
  """Rows of pairs: lengths, and random pieces (inputs, targets, source)."""
  rng = np.random.default_rng(5)
  return [
    [(sizes, tuple(rng.integers(0, V, (3, max(sizes))))) for sizes in row]
    for row in ROWS
  ]


def pack(rows, length=L, source_length=M, filler=0):
  """Puts pairs into rows; `filler` is what stands in padding."""

  def fill(of, size, filler=filler):
    """Puts of(number, lengths, pieces) of a row's pairs after each other."""
    found = ([of(i, *pair) for i, pair in enumerate(row, 1)] for row in rows)
    found = [[v for each in row for v in each] for row in found]
    full = [row + [filler] * (size - len(row)) for row in found]
    return np.array(full, np.int32)

  batch = {
    "inputs": fill(lambda i, n, pieces: pieces[0][: n[0]], length),
    "targets": fill(lambda i, n, pieces: pieces[1][: n[0]], length),
    "segment": fill(lambda i, n, pieces: [i] * n[0], length, 0),
    "source": fill(lambda i, n, pieces: pieces[2][: n[1]], source_length),
    "source_segment": fill(lambda i, n, _: [i] * n[1], source_length, 0),
  }
  for side in ("", "source_"):
    segment = batch[side + "segment"]
    batch[side + "start"] = np.diff(segment, axis=1, prepend=-1) != 0
  batch["mask"] = batch["segment"] > 0
  return {name: jnp.asarray(array) for name, array in batch.items()}


NO_DROPS = {"capacity_factor": None, "eval_capacity_factor": None}


def flat(choose=router.TopK, **options):
  options = NO_DROPS | options
  return moe.MoE(choose(E, K), experts.FeedForward(E, F), **options)


def two_levels(choose=router.NoisyTopK, **options):
  options = NO_DROPS | options
  inner = moe.MoE(choose(2, 1), experts.FeedForward(2, F), **options)
  return moe.HierarchicalMoE(choose(E, K), inner, **options)


def make(mixture=flat, form="product", wiring="recurrent", **fields):
  """GNMT's own encoder and residuals where the wiring is GNMT's."""
  lstm = layers.LSTM(D, H)
  encoder = (lstm, mixture())
  if wiring == "every_layer":
    both = layers.BidirectionalLSTM(lstm.clone(), lstm.clone())
    encoder, fields = (both, *encoder), {"residual_from": 3} | fields
  return gnmt.GNMT(
    V,
    D,
    encoder,
    (lstm.clone(), mixture(), lstm.clone()),
    attention.Attention(N, form, wiring),
    **fields,
  )


def parameters(model, seed=0):
  init = functools.partial(model.init, jax.random.key(0), method="loss")
  return recurrent.random_weights(init, seed, pack(sized()))


def loss(model, params, batch, train=False, **options):
  return model.apply(
    {"params": params},
    batch,
    train=train,
    method="loss",
    rngs={"router": jax.random.key(3)},
    **options,
  )


def close(got, want):
  check = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(check, got, want)


class Zero(nn.Module):
  """A mixture of experts that return nothing."""

  def __call__(self, x, *, train, mask=None, ids=None):
    return jnp.zeros_like(x)


def test_without_its_sigmoid_a_mixture_of_nothing_adds_nothing():
  """In both models, when they train and when they write."""
  batch, lstm = pack(sized()), layers.LSTM(D, H)
  translator = gnmt.GNMT(V, D, (lstm,), (lstm.clone(),), attention.Attention(N))
  model = lstm_lm.LSTMLM(V, D, (lstm,))
  of_both = parameters(translator), parameters(model)
  within = {"encoder": (lstm, Zero()), "decoder": (lstm.clone(), Zero())}

  def results(sigmoid=None):
    """Losses of both models, and what both write next."""
    pair, alone = translator, model
    if sigmoid is not None:
      pair = pair.clone(sigmoid=sigmoid, **within)
      alone = alone.clone(sigmoid=sigmoid, layers=(lstm, Zero()))
    at, other = ({"params": params} for params in of_both)
    memory = pair.apply(
      at,
      *(batch[f"source{n}"] for n in ("", "_segment", "_start")),
      method="encode",
    )
    state, ids = pair.begin(2, L), jnp.ones(2, jnp.int32)
    return (
      loss(pair, at["params"], batch),
      loss(alone, other["params"], batch),
      pair.apply(at, memory, state, ids, method="step")[1],
      alone.apply(other, alone.begin(2, L), batch["inputs"], method="read")[1],
    )

  want, got, with_sigmoid = results(), results(False), results(True)
  for each, same, other in zip(want, got, with_sigmoid, strict=True):
    np.testing.assert_array_equal(same, each)
    assert np.abs(other - each).max() > 1e-3


@pytest.mark.parametrize(
  "form, wiring",
  [("product", "recurrent"), ("sum", "every_layer"), ("product", "parallel")],
)
def test_loss_and_gradient_are_those_of_the_loops(form, wiring):
  """The gradient along one direction of all the weights."""
  model = make(form=form, wiring=wiring)
  params, batch = parameters(model), pack(sized())
  direction = kinds.in_float64(parameters(model, seed=1))
  pull = np.random.default_rng(2).normal(size=(len(ROWS), L))

  def total(params):
    nats = loss(model, params, batch)
    return (nats * jnp.asarray(pull, jnp.float32)).sum(), nats

  slopes, nats = jax.jit(jax.grad(total, has_aux=True))(params)
  given = {name: np.asarray(a) for name, a in batch.items()}

  def want(by):
    moved = jax.tree.map(
      lambda a, b: a + by * b, kinds.in_float64(params), direction
    )
    plain = model.residual_from - 1
    return recurrent.gnmt_loss(moved, K, form, wiring, given, plain)

  np.testing.assert_allclose(nats, want(0), rtol=1e-4, atol=1e-5)
  got = jax.tree.map(lambda a, b: (a * b).sum(), slopes, direction)
  along = ((want(1e-5) - want(-1e-5)) * pull).sum() / 2e-5
  np.testing.assert_allclose(sum(jax.tree.leaves(got)), along, rtol=1e-3)
  assert all(slope.any() for slope in jax.tree.leaves(slopes))


def recurrent_mixture(**options):
  """An LSTM of a mixture's matrices, which reads the context beside."""
  cells = experts.Linear(E, 4 * D)
  mixture = moe.MoE(router.TopK(E, K), cells, **NO_DROPS | options)
  return RecurrentMoE(D, mixture)


MIXTURES = {
  "noisy": functools.partial(flat, router.NoisyTopK),
  "balanced": functools.partial(flat, router.Balanced),
  "hierarchical": two_levels,
  "hierarchical balanced": functools.partial(two_levels, router.Balanced),
  "recurrent": recurrent_mixture,
}


@pytest.mark.parametrize(
  "name, wiring", [("balanced", "every_layer"), ("hierarchical", "parallel")]
)
def test_padding_changes_no_loss_or_figure(name, wiring):
  """Whatever stands in it, and however much of it there is."""
  model = make(MIXTURES[name], wiring=wiring)
  params = parameters(model)

  @jax.jit
  def run(params, batch):
    nats, sown = loss(model, params, batch, True, mutable=["routing"])
    aux, _ = losses.auxiliary(sown, {"importance": 0.3, "z": 0.1})
    return nats, aux, losses.balance(sown)

  # Noise depends on where a token stands, so there is none in longer rows.
  filled = [pack(sized(), filler=V - 1)]
  # No start needs to be marked in padding.
  for side, real in (("", "segment"), ("source_", "source_segment")):
    filled[0][f"{side}start"] &= filled[0][real] > 0
  if name == "balanced":
    filled.append(pack(sized(), L + 2, M + 2, 1))
  nats, *figures = run(params, pack(sized()))
  for batch in filled:
    others, *other_figures = run(params, batch)
    close((others[:, :L], other_figures), (nats, figures))
    assert not others[~batch["mask"]].any()


# -- decoding -----------------------------------------------------------------


def translate(model, params, batch):
  """log p of every piece, and its attention, fed piece by piece."""
  variables = {"params": params}
  source = [batch["source" + name] for name in ("", "_segment", "_start")]
  memory = model.apply(variables, *source, method="encode")

  def step(state, ids):
    state, log_p, weights = model.apply(
      variables, memory, state, ids, method="step"
    )
    return state, (log_p, weights)

  state = model.begin(len(batch["inputs"]), 0)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
  _, (log_p, weights) = jax.lax.scan(step, state, batch["inputs"].T)
  return log_p.swapaxes(0, 1), weights.swapaxes(0, 1)


@pytest.mark.parametrize(
  "name, wiring, form",
  [
    ("balanced", "recurrent", "product"),
    ("noisy", "every_layer", "sum"),
    ("hierarchical balanced", "parallel", "sum"),
    ("recurrent", "every_layer", "product"),
  ],
)
def test_steps_are_the_whole_pass(name, wiring, form):
  """Of a model that would drop tokens, made one that drops none."""
  mixture = functools.partial(MIXTURES[name], eval_capacity_factor=0.5)
  model = make(mixture, form, wiring, vocab_multiple=8).for_decoding()
  params = parameters(model)
  (a, b), (c,) = sized()
  batch = pack([[a], [b], [c]])

  @jax.jit
  def run(params, batch):
    return loss(model, params, batch), translate(model, params, batch)

  nats, (log_p, weights) = run(params, batch)
  picked = jnp.take_along_axis(log_p, batch["targets"][:, :, None], axis=2)
  close(jnp.where(batch["mask"], -picked[..., 0], 0), nats)
  # Of the table's rows five are no piece.
  assert log_p.shape[-1] == V
  close(np.exp(log_p).sum(-1), np.ones((3, L)))
  close(weights.sum(-1), np.ones((3, L)))
  assert not np.where(batch["source_segment"][:, None] == 0, weights, 0).any()
  # A translation depends on nothing else in the batch.
  _, (alone, _) = run(params, pack([[b], [], []]))
  close(alone[0], log_p[1])


def test_widths_that_do_not_fit_are_refused():
  """Both directions of an LSTM are twice as wide as the model."""
  for residual_from, complaint in [
    (1, "layer 1 makes 8 entries of 4, .* residual_from be 2"),
    (2, "ends in 8 entries for a width of 4; put an LSTM above"),
  ]:
    model = make(wiring="every_layer", residual_from=residual_from)
    with pytest.raises(ValueError, match=complaint):
      parameters(model.clone(encoder=model.encoder[:1]))


def test_experts_that_choose_cannot_translate():
  with pytest.raises(ValueError, match="ExpertChoice.*another router"):
    make(functools.partial(flat, router.ExpertChoice)).for_decoding()


# -- precision, dropout, layouts ----------------------------------------------


def test_bfloat16_is_close_and_finite():
  model = make(dtype="bfloat16")
  params, batch = parameters(model), pack(sized())

  @jax.jit
  def run(params):
    wide = loss(model.clone(dtype="float32"), params, batch, True)
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
  mixed = functools.partial(moe.MoE, router.Balanced(8, K))
  model = make(lambda: mixed(experts.FeedForward(8, F), L))
  row, (pair,) = sized()
  batch = pack([row, [pair]] * 4)
  params = parameters(model)

  def step(params, batch):
    def total(params):
      nats, sown = loss(model, params, batch, True, mutable=["routing"])
      aux, _ = losses.auxiliary(sown, {"importance": 0.3, "threshold": 0.2})
      return nats.mean() + aux, nats

    return jax.value_and_grad(total, has_aux=True)(params)

  want = jax.jit(step)(params, batch)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  init = functools.partial(model.init, jax.random.key(0), method="loss")
  boxed = jax.eval_shape(init, batch)["params"]
  places = sharding.shardings(boxed, layout, mesh)
  rows = sharding.batch_sharding(layout, mesh, 8)
  with sharding.use(layout, mesh):
    got = jax.jit(step, out_shardings=(None, places))(
      jax.device_put(params, places), jax.device_put(batch, rows)
    )
  slopes = jax.tree.leaves(got[1]["encoder_1"]["experts"])
  assert not any(leaf.is_fully_replicated for leaf in slopes)
  close(got, want)
