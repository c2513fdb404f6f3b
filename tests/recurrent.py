"""LSTM, attention and the translation model in NumPy loops (app. C, E, G)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import kinds
import numpy as np
import reference


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def cell(z, c):
  """The next m and c, one unit at a time."""
  m, c, hidden = np.zeros_like(c), c.copy(), len(c)
  for u in range(hidden):
    i, f, g, o = z[u], z[u + hidden], z[u + 2 * hidden], z[u + 3 * hidden]
    c[u] = sigmoid(f) * c[u] + sigmoid(i) * np.tanh(g)
    m[u] = sigmoid(o) * np.tanh(c[u])
  return m, c


def lstm(x, start, w_in, w_rec, bias, w_out=None):
  """One row, one step, one unit at a time."""
  width, hidden = len(w_rec), len(bias) // 4
  out = np.zeros((*start.shape, width))
  for b in range(len(x)):
    y, c = np.zeros(width), np.zeros(hidden)
    for t in range(x.shape[1]):
      if start[b, t]:
        y, c = np.zeros(width), np.zeros(hidden)
      m, c = cell(x[b, t] @ w_in + y @ w_rec + bias, c)
      y = out[b, t] = m if w_out is None else m @ w_out
  return out


class Mixed(NamedTuple):
  """What a recurrent mixture gives; sums are of all steps."""

  y: np.ndarray  # [B, L, u]
  importance: np.ndarray  # [E], eq. 6
  load: np.ndarray  # [E], eq. 10
  logits: np.ndarray  # [B, L, E], of real tokens
  noise_std: np.ndarray


def mixed_lstm(params, k, x, start, mask, noise):
  """The LSTM whose matrices are a mixture (sec. 3.1), noise [B, L, E] given."""
  w, router = params["mixture"]["experts"]["w"], params["mixture"]["router"]
  bias, experts = params["bias"], len(w)
  out = np.zeros((*start.shape, len(bias) // 4))
  sums = np.zeros((2, experts))
  logits, stds = np.zeros((2, *start.shape, experts))
  for b in range(len(x)):
    y, c = np.zeros((2, len(bias) // 4))
    for t in range(x.shape[1]):
      if start[b, t]:
        y, c = np.zeros((2, len(c)))
      v, z = np.concatenate([x[b, t], y]), bias.copy()
      if mask[b, t]:
        logits[b, t] = v @ router["gate"]["kernel"]
        stds[b, t] = np.logaddexp(0, v @ router["noise"]["kernel"]) + 1e-2
        given = logits[b, t, None], noise[b, t, None], stds[b, t, None]
        decided = reference.noisy_top_k(*given, k)
        z += sum(g * (v @ w[e]) for e, g in enumerate(decided.gates[0]))
        sums += decided.gates.sum(0), decided.load
      y, c = cell(z, c)
      out[b, t] = y
  return Mixed(out, *sums, logits, stds)


def score(form, x, y, u, w, v):
  """Eq. 21 and 22."""
  total = 0
  for d in range(len(v)):
    a, b = x @ u[:, d], y @ w[:, d]
    if form == "sum":
      total += v[d] * np.tanh(a + b)
    else:
      total += v[d] * np.tanh(a) * np.tanh(b)
  return total


def look(form, y, segment, states, source, u, w, v):
  """The context of one place, and the weights of the source's places."""
  own = [i for i in range(len(states)) if segment and source[i] == segment]
  weights = np.zeros(len(states))
  if own:
    powers = [np.exp(score(form, states[i], y, u, w, v)) for i in own]
    weights[own] = powers / sum(powers)
  return weights @ states, weights


def layer(weights, x, start):
  """Of either direction, or of both: each sentence of a row by itself."""
  if "forward" not in weights:
    names = ("w_in", "w_rec", "bias", "w_out")
    return lstm(x, start, *(weights.get(name) for name in names))
  there, back = (weights[name] for name in ("forward", "backward"))
  out = []
  for row, starts in zip(x, start, strict=True):
    ends = [*np.flatnonzero(starts)[1:], len(row)]
    for begin, end in zip(np.flatnonzero(starts), ends, strict=True):
      only, first = row[None, begin:end], np.arange(end - begin)[None] == 0
      turned = layer(back, only[:, ::-1], first)[:, ::-1]
      out.append(np.concatenate([layer(there, only, first), turned], -1)[0])
  return np.concatenate(out).reshape(*start.shape, -1)


def first_layer(params, form, wiring, x, batch, states):
  """The decoder's first LSTM and its attention, one place after the other.

  Returns its outputs, and the contexts.
  """
  weights = [params["attention"][name] for name in "uw"]
  weights.append(params["attention"]["v"][:, 0])
  source, start = batch["source_segment"], batch["start"]

  def context(b, t, y):
    segment = batch["segment"][b, t]
    return look(form, y, segment, states[b], source[b], *weights)[0]

  out, contexts = np.zeros_like(x), np.zeros_like(x)
  if wiring == "parallel":
    out = layer(params["decoder_0"], x, start)
  for b, t in np.ndindex(start.shape):
    if wiring == "parallel":
      contexts[b, t] = context(b, t, out[b, t])
    else:
      y = np.zeros_like(x[b, t]) if start[b, t] else out[b, t - 1]
      contexts[b, t] = context(b, t, y)
      both = np.concatenate([x[b], contexts[b]], -1)[None, : t + 1]
      out[b, t] = layer(params["decoder_0"], both, start[b : b + 1])[0, t]
  return out, contexts


def mix(weights, k, x, mask):
  """sigmoid(MoE(x)) of top-k gating, all rows being one group."""
  tokens, mask = x.reshape(-1, x.shape[-1]), mask.reshape(-1)
  logits = tokens @ weights["router"]["gate"]["kernel"]
  gates = reference.top_k(logits, k, mask).gates
  expert = reference.feed_forward(weights["experts"])
  return sigmoid(reference.mixture(tokens, gates, expert)).reshape(x.shape)


def stack(params, names, k, x, start, mask, plain=0, beside=None):
  """LSTMs and mixtures, whichever has weights of these names.

  The first `plain` of them have no residual; LSTMs read `beside` too.
  """
  for number, name in enumerate(names):
    if "router" in params[name]:
      y = mix(params[name], k, x, mask)
    else:
      both = x if beside is None else np.concatenate([x, beside], -1)
      y = layer(params[name], both, start)
    x = y if number < plain else x + y
  return x


def gnmt_loss(params, k, form, wiring, batch, plain=0):
  """The loss of every place, in float64.

  The first `plain` layers of encoder and decoder have no residual.
  """
  encoder, decoder = (
    sorted(name for name in params if name.startswith(side))
    for side in ("encoder", "decoder")
  )
  x = params["embed_source"]["table"][batch["source"]]
  real = batch["source_segment"] > 0
  states = stack(params, encoder, k, x, batch["source_start"], real, plain)
  x = params["embed_target"]["table"][batch["inputs"]]
  y, contexts = first_layer(params, form, wiring, x, batch, states)
  x = (y if plain else x + y) + (contexts if wiring == "parallel" else 0)
  h = stack(
    params,
    decoder[1:],
    k,
    x,
    batch["start"],
    batch["mask"],
    plain - 1,
    contexts if wiring == "every_layer" else None,
  )
  out = np.zeros(batch["mask"].shape)
  for b, t in zip(*np.nonzero(batch["mask"]), strict=True):
    p = reference.softmax(params["head"]["table"] @ h[b, t])
    out[b, t] = -np.log(p[batch["targets"][b, t]])
  return out


def random_weights(init, seed, *args):
  """Weights far from the start, so that all of them matter."""
  tree = nn.unbox(jax.eval_shape(init, *args))["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda a: kinds.to_device(rng.normal(size=a.shape) * 0.7, a.dtype), tree
  )


def assert_near(got, want, rtol):
  """Whether the entries of two trees agree but for rounding of operands."""

  def check(path, got, want):
    far = np.abs(np.float64(got) - want).max() / np.abs(want).max()
    assert far < rtol, jax.tree_util.keystr(path)

  jax.tree.map_with_path(check, got, want)


def assert_sums_after_loops(compiled):
  """Devices only sum gradients of weights, and none within a loop."""
  loops, entry = compiled.as_text().split("\nENTRY")
  assert "while(" in entry
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in loops + entry
  assert "all-reduce(" in entry
  assert "all-reduce(" not in loops
