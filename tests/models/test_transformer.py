"""The Transformer against loops; packing, scan, recompute, caches, layouts."""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from moejax import config_fields, experts, losses, moe, router, sharding
from moejax.models import transformer
from moejax.models.build import MODELS

V, D, N, K, H, F, E, L = 11, 8, 4, 2, 2, 6, 4, 7
pytestmark = pytest.mark.usefixtures("standard_promotion")


def dense():
  return moe.MoE(router.Single(), experts.FeedForward(1, F))


def mixture(choose=router.TopK, experts_in_all=E, **fields):
  free = {"capacity_factor": None, "eval_capacity_factor": None} | fields
  has_k = "k" in choose.__dataclass_fields__
  chosen = choose(experts_in_all, **({"k": 2} if has_k else {}))
  return moe.MoE(
    chosen, experts.FeedForward(experts_in_all, F, gated=True), **free
  )


def make(moe=mixture, attention=None, tied=False, dtype="float32", **fields):
  shape = {"num_layers": 3, "pattern": (moe,), "first": (dense,)} | fields
  attends = functools.partial(
    transformer.MultiHeadAttention, N, K, **(attention or {})
  )
  if attention and "rank" in attention:
    attends = functools.partial(transformer.LatentAttention, N, **attention)
  stack = transformer.Blocks(attention=attends, **shape)
  return transformer.Transformer(V, D, stack, tied, dtype=dtype)


def batch(rows=2, lengths=((4, 3), (5,))):
  """Rows of sentences of these lengths, and padding."""
  rng = np.random.default_rng(3)
  start, mask = np.zeros((2, rows, L), bool)
  for r, row in enumerate(lengths):
    ends = np.cumsum(row)
    start[r, [0, *ends[ends < L]]] = True
    mask[r, : ends[-1]] = True
  ids = rng.integers(0, V, (2, rows, L)).astype(np.int32)
  return {
    "inputs": jnp.asarray(ids[0]),
    "targets": jnp.asarray(ids[1]),
    "start": jnp.asarray(start),
    "mask": jnp.asarray(mask),
  }


LATENT = {"rank": 5, "head_dim": 3, "rotary_dim": 2}
KEYS = ("key", "value")
RNGS = {name: jax.random.key(i) for i, name in enumerate(("router", "dropout"))}


def params_of(model, given):
  """Random parameters of every kind, norms too."""
  shapes = jax.eval_shape(
    lambda: model.init(
      {"params": jax.random.key(0), **RNGS}, given, method="loss"
    )
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda a: kinds.to_device(rng.normal(size=a.shape) / 2, a.dtype),
    nn.unbox(shapes)["params"],
  )


def loss_of(model, train=False):
  @jax.jit
  def loss(params, given):
    rngs = RNGS if train else None
    value, sown = model.apply(
      {"params": params},
      given,
      train=train,
      rngs=rngs,
      mutable=[moe.ROUTING],
      method="loss",
    )
    weights = {"importance": 0.3, "switch_balance": 0.2}
    routings = losses.routings(sown)
    if train and any(each.k is not None for each in routings):
      weights["quantile"] = 0.1
    return value, losses.auxiliary(routings, weights)[0], len(routings)

  return loss


# -- in loops -----------------------------------------------------------------


def normed(x, scale, epsilon=1e-6):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def turned(x, position, base=10_000.0):
  """One head's entries [H], turned pair by pair."""
  y, half = np.array(x), len(x) // 2
  for i in range(half):
    angle = position * base ** (-2 * i / len(x))
    turn = np.array(
      [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    y[[i, i + half]] = turn @ x[[i, i + half]]
  return y


def bucket(distance):
  if distance < 16:
    return distance
  return min(16 + int(np.log(distance / 16) / np.log(128 / 16) * 16), 31)


def attention_of(x, p, sentence, kind, table):
  """One row [L D], whose tokens have the number of a sentence."""
  query, key, value = (x @ p[f"w_{n}"] for n in ("query", "key", "value"))
  if kind == "width":
    query = normed(query, p["norm_query"]["scale"])
    key = normed(key, p["norm_key"]["scale"])
  query, key, value = (
    a.reshape(len(x), heads, H)
    for a, heads in ((query, N), (key, K), (value, K))
  )
  if kind == "head":
    query = normed(query, p["norm_query"]["scale"])
    key = normed(key, p["norm_key"]["scale"])
  y = np.zeros((len(x), N, H))
  for t in range(len(x)):
    seen = [s for s in range(t + 1) if sentence[s] == sentence[t]]
    for n in range(N):
      k = n // (N // K)
      scores = []
      for s in seen:
        q, each = query[t, n], key[s, k]
        if table is None:
          q, each = turned(q, t - seen[0]), turned(each, s - seen[0])
        score = q @ each / np.sqrt(H)
        scores.append(
          score if table is None else score + table[bucket(t - s), n]
        )
      weights = np.exp(scores - np.max(scores))
      weights /= weights.sum()
      y[t, n] = sum(w * value[s, k] for w, s in zip(weights, seen, strict=True))
  return y.reshape(len(x), N * H) @ p["w_out"]


def latent_attention_of(x, p, sentence):
  """The same, of keys and values that come of a short vector."""
  R = p["w_rotary"].shape[1]
  c = normed(x @ p["w_latent"], p["norm_latent"]["scale"])
  shared, asked = x @ p["w_rotary"], x
  if "w_query_latent" in p:
    asked = x @ p["w_query_latent"]
    asked = normed(asked, p["norm_query_latent"]["scale"])
  query = (asked @ p["w_query"]).reshape(len(x), N, -1)
  key, value = ((c @ p[f"w_{n}"]).reshape(len(x), N, -1) for n in KEYS)
  H = key.shape[-1]
  y = np.zeros((len(x), N, H))
  for t in range(len(x)):
    seen = [s for s in range(t + 1) if sentence[s] == sentence[t]]
    for n in range(N):
      asks = turned(query[t, n, H:], t - seen[0])
      scores = [
        query[t, n, :H] @ key[s, n] + asks @ turned(shared[s], s - seen[0])
        for s in seen
      ]
      weights = np.exp(scores / np.sqrt(H + R))
      weights /= weights.sum()
      y[t, n] = sum(w * value[s, n] for w, s in zip(weights, seen, strict=True))
  return y.reshape(len(x), -1) @ p["w_out"]


def feed_forward_of(x, p):
  """The dense layer, or 2 of E gated experts for each token."""
  relu, w = (lambda a: np.maximum(a, 0)), p["experts"]
  if "router" not in p:
    return relu(x @ w["w_in"][0]) @ w["w_out"][0]
  y = np.zeros_like(x)
  for t, token in enumerate(x):
    logits = token @ p["router"]["gate"]["kernel"]
    chosen = np.argsort(-logits, kind="stable")[:2]
    gates = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
    for gate, e in zip(gates, chosen, strict=True):
      hidden = relu(token @ w["w_in"][e]) * (token @ w["w_gate"][e])
      y[t] += gate * (hidden @ w["w_out"][e])
  return y


def reference(params, given, kind="none"):
  """Nats of every target, by loops over tokens and heads."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  table = p["embed"]["table"] if "embed" in p else p["head"]["table"]
  out = np.zeros(given["inputs"].shape)
  for r, ids in enumerate(np.asarray(given["inputs"])):
    x, sentence = table[ids], np.cumsum(given["start"][r])
    for i in range(3):
      block = p["blocks"][f"layers_{i}"]["block_0"]
      read = normed(x, block["norm_1"]["scale"]), block["attention"], sentence
      if kind == "latent":
        x = x + latent_attention_of(*read)
      else:
        x = x + attention_of(*read, kind, p["blocks"].get("distances"))
      x = x + feed_forward_of(
        normed(x, block["norm_2"]["scale"]), block["feed_forward"]
      )
    logits = normed(x, p["blocks"]["norm_out"]["scale"]) @ p["head"]["table"].T
    for t, target in enumerate(np.asarray(given["targets"][r])):
      out[r, t] = np.log(np.exp(logits[t]).sum()) - logits[t, target]
  return np.where(given["mask"], out, 0)


CASES = (
  ({}, "none"),
  ({"attention": {"qk_norm": "head"}, "tied": True}, "head"),
  ({"attention": {"qk_norm": "width"}, "position": "relative"}, "width"),
  ({"attention": LATENT}, "latent"),
  ({"attention": LATENT | {"query_rank": 3}}, "latent"),
)


@pytest.mark.parametrize("fields, kind", CASES)
def test_loss_is_that_of_loops(fields, kind):
  model, given = make(**fields), batch()
  params = params_of(model, given)
  got, _, _ = loss_of(model)(params, given)
  np.testing.assert_allclose(got, reference(params, given, kind), rtol=2e-4)


def test_gradients_are_finite_differences():
  model, given = make(), batch()
  params, loss = params_of(model, given), loss_of(model)
  grads = jax.grad(lambda p: loss(p, given)[0].sum())(params)
  rng = np.random.default_rng(5)
  along = jax.tree.map(lambda a: rng.normal(size=a.shape), params)
  step = 1e-6

  def moved(by):
    at = jax.tree.map(
      lambda a, b: np.asarray(a, np.float64) + by * b, params, along
    )
    return reference(at, given).sum()

  slope = sum(
    (np.asarray(g) * a).sum()
    for g, a in zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True)
  )
  assert slope == pytest.approx(
    (moved(step) - moved(-step)) / (2 * step), rel=1e-3
  )


# -- what must change nothing -------------------------------------------------


def stacked(params):
  """The parameters of layers 1 and 2 as a scan has them."""
  stack = dict(params["blocks"])
  parts = [stack.pop(f"layers_{i}") for i in (1, 2)]
  stack["layers"] = jax.tree.map(lambda *a: jnp.stack(a), *parts)
  return params | {"blocks": stack}


@pytest.mark.parametrize("recompute", [False, True])
def test_scan_and_recompute_change_nothing(recompute):
  given = batch()
  one, other = make(), make(scan=True, recompute=recompute)
  params = params_of(one, given)

  def everything(model, params):
    def total(params):
      value, auxiliary, count = loss_of(model)(params, given)
      return value.sum() + auxiliary, (value, auxiliary)

    return jax.grad(total, has_aux=True)(params)

  grads, values = everything(one, params)
  together = params_of(other, given)
  shapes = (jax.tree.map(jnp.shape, t) for t in (stacked(params), together))
  assert next(shapes) == next(shapes)
  got, others = everything(other, stacked(params))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, (got, others), (stacked(grads), values))
  assert values[1] > 0  # All layers have reported what their routers did.


def decided(model, params, given):
  """Shapes and types of what each layer's router does."""

  def run(params, given):
    apply = functools.partial(model.apply, mutable=[moe.ROUTING], method="loss")
    return losses.routings(apply(params, given)[1])

  return jax.eval_shape(run, params, given)


def test_all_layers_report():
  given = batch()
  for scan in (False, True):
    model = make(scan=scan)
    params = {"params": params_of(model, given)}
    found = decided(model, params, given)
    assert [each.count.shape for each in found] == [(1, E)] * 2


def test_sentences_of_a_row_do_not_see_each_other():
  model = make()
  packed = batch(1, [(4, 3)])
  params, loss = params_of(model, packed), loss_of(model)
  both = loss(params, packed)[0]
  for first, last in ((0, 4), (4, 7)):
    alone = {
      name: jnp.zeros_like(each).at[:, : last - first].set(each[:, first:last])
      for name, each in packed.items()
    }
    alone["start"] = alone["start"].at[:, last - first :].set(True)
    got = loss(params, alone)[0][:, : last - first]
    np.testing.assert_allclose(got, both[:, first:last], rtol=1e-4)


@pytest.mark.parametrize(
  "fields",
  [{}, {"scan": True, "attention": LATENT}, {"position": "relative"}],
)
def test_reading_on_is_the_whole_pass(fields):
  model, given = make(**fields), batch(2, [(L,), (L,)])
  params = params_of(model, given)
  loss = loss_of(model)(params, given)[0]

  @functools.partial(jax.jit, static_argnums=2)
  def read(state, ids, last):
    state, log_p = model.apply({"params": params}, state, ids, method="read")
    return state, log_p

  state, found = model.begin(2, L), []
  for first, last in ((0, 3), (3, 4), (4, 5), (5, L)):
    state, log_p = read(state, given["inputs"][:, first:last], last == L)
    found.append(log_p)
  log_p = jnp.concatenate(found, axis=1)
  chosen = jnp.take_along_axis(log_p, given["targets"][..., None], axis=-1)
  np.testing.assert_allclose(-chosen[..., 0], loss, rtol=1e-4, atol=1e-5)
  assert state.filled.tolist() == [L, L]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("choose", list(router.ROUTERS.values()))
def test_no_token_sees_a_later_one(choose, train):
  """But for gates whose docstring says so: there experts choose."""
  model = make(functools.partial(mixture, choose), num_layers=2)
  given = batch(2, [(L,), (L,)])
  params, loss = params_of(model, given), loss_of(model, train)
  later = given | {"inputs": given["inputs"].at[:, 4:].add(1) % V}
  before, after = (loss(params, each)[0][:, :4] for each in (given, later))
  looks_ahead = choose is router.ExpertChoice or (
    choose is router.Balanced and train
  )
  assert looks_ahead != bool(jnp.allclose(before, after, rtol=1e-6))


def test_bfloat16_leaves_the_router_its_float32():
  model, given = make(dtype="bfloat16"), batch()
  params = params_of(model, given)
  first, _ = decided(model, {"params": params}, given)
  assert first.logits.dtype == jnp.float32
  half, whole = (loss_of(m)(params, given)[0] for m in (model, make()))
  np.testing.assert_allclose(half, whole, atol=0.15)


@pytest.mark.parametrize("layout", sharding.LAYOUTS)
def test_layouts_agree(layout):
  model = make(
    functools.partial(mixture, experts_in_all=8, group_size=L), scan=True
  )
  given = batch(8, [(4, 3), (5,)] * 4)
  params = params_of(model, given)
  alone = loss_of(model)(params, given)[:2]
  layout = sharding.LAYOUTS[layout]
  with sharding.use(layout, sharding.make_mesh(layout)):
    got = loss_of(model)(params, given)[:2]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4), got, alone
  )


@pytest.mark.parametrize(
  "heads, message",
  [
    ((3, None, None), "3 heads do not divide a width of 8"),
    ((4, 3, None), "3 heads of keys and values do not divide 4 heads"),
    ((4, 2, 3), "a head has 3 entries"),
  ],
)
def test_heads_that_do_not_divide_are_refused(heads, message):
  with pytest.raises(ValueError, match=message):
    transformer.MultiHeadAttention(*heads).sizes(D)


def test_parameters_lie_where_they_are_named():
  given = batch()
  names = flax.traverse_util.flatten_dict(params_of(make(), given), sep="/")
  assert "blocks/layers_0/block_0/attention/w_query" in names
  assert "blocks/layers_1/block_0/feed_forward/router/gate/kernel" in names


# -- pairs ---------------------------------------------------------------------

M = 6


def make_pairs(**fields):
  attends = functools.partial(transformer.MultiHeadAttention, N, K)
  layers = {"pattern": (mixture,), "first": (dense,)} | fields
  encoder, decoder = (
    transformer.Blocks(3, attends, **layers, **sides)
    for sides in ({"causal": False}, {"reads_source": True})
  )
  return transformer.PairTransformer(V, D, encoder, decoder, tied=True)


def pairs(lengths, source_lengths):
  """One row of packed pairs of these lengths."""
  given = batch(1, [lengths])
  segment = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  of_source = np.repeat(np.arange(1, len(lengths) + 1), source_lengths)
  source = np.random.default_rng(7).integers(0, V, (1, M)).astype(np.int32)
  start = np.r_[True, np.diff(of_source) > 0]

  def row(values, length):
    zeros = jnp.zeros((1, length), values.dtype)
    return zeros.at[0, : len(values)].set(values)

  return given | {
    "segment": row(segment.astype(np.int32), L),
    "source": jnp.asarray(source),
    "source_segment": row(of_source.astype(np.int32), M),
    "source_start": row(start, M),
  }


@pytest.mark.parametrize(
  "fields", [{}, {"position": "relative", "scan": True, "recompute": True}]
)
def test_pairs_of_a_row_do_not_see_each_other(fields):
  model, both = make_pairs(**fields), pairs((4, 3), (2, 4))
  params, loss = params_of(model, both), loss_of(model)
  together = loss(params, both)[0]
  for first, last, source in ((0, 4, slice(0, 2)), (4, 7, slice(2, 6))):
    alone = {}
    for name, each in both.items():
      at = source if "source" in name else slice(first, last)
      part = each[:, at]
      if "segment" in name:
        part = jnp.ones_like(part)
      alone[name] = jnp.zeros_like(each).at[:, : part.shape[1]].set(part)
    got = loss(params, alone)[0][:, : last - first]
    np.testing.assert_allclose(got, together[:, first:last], rtol=2e-4)
    # Every token of the source counts, for the first of the target too.
    for s in range(source.start, source.stop):
      other = both["source"].at[0, s].add(1) % V
      moved = loss(params, both | {"source": other})[0][:, first]
      assert not jnp.allclose(moved, together[:, first], rtol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"scan": True, "position": "relative"}])
def test_steps_of_a_translation_are_the_whole_pass(fields):
  model, given = make_pairs(**fields), pairs((L,), (5,))
  params = params_of(model, given)
  apply = functools.partial(model.for_decoding().apply, {"params": params})
  source = (given[f"source{name}"] for name in ("", "_segment", "_start"))
  memory = apply(*source, method="encode")
  state, log_p = model.begin(1, L), []
  step = jax.jit(functools.partial(apply, method="step"))
  for t in range(L):
    state, now, weights = step(memory, state, given["inputs"][:, t])
    log_p.append(now[0, given["targets"][0, t]])
  np.testing.assert_array_equal(weights[0], [1] * 5 + [0])
  # What a search sorts: rows are the first axis of all of a state.
  assert {leaf.shape[0] for leaf in jax.tree.leaves((state, memory))} == {1}
  loss = loss_of(model)(params, given)[0][0]
  np.testing.assert_allclose(-np.array(log_p), loss, rtol=1e-4, atol=1e-5)


def test_buckets_are_those_of_t5():
  """By hand from the figures of 1910.10683's code: 32 buckets, 128 far."""
  distance = jnp.array([-200, -20, -9, -8, -1, 0, 1, 7, 8, 9, 15, 16, 20, 200])
  ahead = transformer._bucket(distance, causal=False).tolist()
  assert ahead == [31, 26, 24, 24, 17, 0, 1, 7, 8, 8, 9, 10, 10, 15]
  behind = transformer._bucket(distance, causal=True).tolist()
  assert behind == [0] * 6 + [1, 7, 8, 9, 15, 16, 17, 31]


def test_configs_build_both():
  """Sections of blocks, with feed-forward layers by name."""
  blocks = {
    "num_layers": 3,
    "attention": {
      "kind": "multi_head",
      "num_heads": N,
      "num_kv_heads": K,
      "qk_norm": "head",
    },
    "pattern": ("moe", "dense"),
    "first": ("dense",),
    "dense": {"kind": "feed_forward", "hidden": F},
    "moe": {
      "num_experts": E,
      "router": {"kind": "switch"},
      "experts": {"kind": "feed_forward", "hidden": F},
    },
  }

  def built(**section):
    section = {"width": D, **section}
    return config_fields.build(MODELS, section, "config.model", vocab_size=V)

  model = built(kind="transformer", blocks=blocks, tied=True)
  names = flax.traverse_util.flatten_dict(params_of(model, batch()), sep="/")
  sparse = {name.split("/")[1] for name in names if "/router/" in name}
  assert sparse == {"layers_1"} and not [n for n in names if "embed" in n]
  decoder = blocks | {"scan": True, "first": (), "num_layers": 4}
  model = built(kind="pair_transformer", encoder=blocks, decoder=decoder)
  assert not model.encoder.causal and model.decoder.reads_source
  names = flax.traverse_util.flatten_dict(
    params_of(model, pairs((L,), (M,))), sep="/"
  )
  gate = "decoder/layers/block_0/feed_forward/router/gate/kernel"
  assert names[gate].shape == (2, D, E)
  for change, message in (
    ({"pattern": ()}, "pattern of blocks is empty"),
    ({"pattern": ("lstm",)}, "'lstm'.*'dense'"),
    ({"norm": "batch"}, "norm is 'batch'.*'rms'"),
    ({"num_layers": 0}, "num_layers is 0; give 1"),
    ({"moe": None}, "blocks.moe.num_experts is missing"),
  ):
    with pytest.raises(ValueError, match=message):
      built(kind="transformer", blocks=blocks | change)
  latent = {"kind": "latent", "num_heads": N, **LATENT}
  for change, position, message in (
    ({"rotary_dim": 3}, "rotary", "rotary_dim is 3.*even"),
    ({}, "relative", "rotary positions alone"),
  ):
    changes = {"attention": latent | change, "position": position}
    with pytest.raises(ValueError, match=message):
      params_of(built(kind="transformer", blocks=blocks | changes), batch())
  blocks["moe"] |= {"router": {"kind": "expert_choice", "k": 1}}
  with pytest.raises(ValueError, match="ExpertChoice.*future.*looks_ahead"):
    built(kind="transformer", blocks=blocks)
  assert built(kind="transformer", blocks=blocks, looks_ahead=True)
