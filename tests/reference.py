"""The paper in loops: slow, obvious, NumPy in float64, written from its text.

Everything here sees one group of tokens: logits, noise and noise_std [S, E],
x [S, D], mask [S]. An edge is (token, expert, gate).
"""

import math
from typing import NamedTuple

import numpy as np


class Decision(NamedTuple):
  """What a gate decides for one group.

  Attributes:
    gates: G(x), zero where an expert is not chosen [S, E].
    edges: the non-zero gates, all first choices before all second choices.
    importance: eq. 6 [E].
    load: eq. 10, or the count where gating draws no noise [E].
    count: tokens that chose each expert [E].
  """

  gates: np.ndarray
  edges: list[tuple[int, int, float]]
  importance: np.ndarray
  load: np.ndarray
  count: np.ndarray


def softmax(v):
  """Eq. 2, for the logits of one token; exp(-inf) is 0."""
  powers = [math.exp(a - max(v)) for a in v]
  return np.array([power / sum(powers) for power in powers])


def largest(v, k):
  """Returns the indices of the k largest, best first; ties to the lowest."""
  chosen = []
  for _ in range(k):
    best = None
    for i in range(len(v)):
      if i not in chosen and (best is None or v[i] > v[best]):
        best = i
    chosen.append(best)
  return chosen


def keep_top_k(v, k):
  """Eq. 5."""
  kept = largest(v, k)
  return [v[i] if i in kept else -math.inf for i in range(len(v))]


def kth_excluding(v, k, i):
  """The k-th largest component of v when component i is left out."""
  others = [v[j] for j in range(len(v)) if j != i]
  return sorted(others, reverse=True)[k - 1]


def normal_cdf(z):
  return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def chance(logits, noisy, noise_std, k, i):
  """P(x, i) (eq. 8 and 9): noise anew on component i alone."""
  margin = logits[i] - kth_excluding(noisy, k, i)
  if noise_std[i] == 0:
    return 1.0 if margin > 0 else 0.0
  return normal_cdf(margin / noise_std[i])


def _decide(logits, k, mask):
  """Eq. 3 and 6, and who comes first."""
  tokens, experts = logits.shape
  real = [s for s in range(tokens) if mask is None or mask[s]]
  gates = np.zeros((tokens, experts))
  for s in real:
    gates[s] = softmax(keep_top_k(logits[s], k))
  edges = []
  for choice in range(k):
    for s in real:
      e = largest(logits[s], k)[choice]
      edges.append((s, e, gates[s, e]))
  count = np.zeros(experts)
  for _, e, _ in edges:
    count[e] += 1
  importance = np.zeros(experts)
  for s in real:
    importance += gates[s]
  return Decision(gates, edges, importance, count, count)


def softmax_gating(logits, mask=None):
  """Eq. 2: every token visits every expert."""
  return _decide(logits, logits.shape[1], mask)


def top_k(logits, k, mask=None):
  """Eq. 3 and 5, without noise."""
  return _decide(logits, k, mask)


def noisy_top_k(logits, noise, noise_std, k, mask=None):
  """Eq. 3 to 5 with the noise given, and the load of eq. 8 to 10."""
  noisy = logits + noise * noise_std
  tokens, experts = logits.shape
  load = np.zeros(experts)
  for s in range(tokens):
    if mask is None or mask[s]:
      for i in range(experts):
        load[i] += chance(logits[s], noisy[s], noise_std[s], k, i)
  return _decide(noisy, k, mask)._replace(load=load)


def cv_squared(v):
  """The square of the coefficient of variation (eq. 7, 11), of a population."""
  mean = sum(v) / len(v)
  variance = sum((a - mean) ** 2 for a in v) / len(v)
  return variance / mean**2 if mean else 0.0


def seated(edges, capacity=None):
  """Says for each edge whether its expert still has room: first come first."""
  taken = {}
  answers = []
  for _, e, _ in edges:
    taken[e] = taken.get(e, 0) + 1
    answers.append(capacity is None or taken[e] <= capacity)
  return answers


def dispatch(x, edges, expert, capacity=None):
  """y[token] += gate * E_expert(x[token]) for each edge that has a seat."""
  y = np.zeros_like(x)
  for (s, e, gate), has_seat in zip(
    edges, seated(edges, capacity), strict=True
  ):
    if has_seat:
      y[s] += gate * expert(e, x[s])
  return y


def mixture(x, gates, expert):
  """Eq. 1: y = sum_i G(x)_i E_i(x), every expert on every token."""
  y = np.zeros_like(x)
  for s in range(x.shape[0]):
    for i in range(gates.shape[1]):
      y[s] += gates[s, i] * expert(i, x[s])
  return y


def feed_forward(weights):
  """One ReLU layer, linear output, no biases: E_e as (e, row) -> row."""

  def expert(e, row):
    hidden = [max(a, 0.0) for a in row @ weights["w_in"][e]]
    return np.array(hidden) @ weights["w_out"][e]

  return expert


def linear(weights):
  """The expert of the draft."""
  return lambda e, row: row @ weights["w"][e]


def gradient(fn, arrays, step=1e-6):
  """Central finite differences of a scalar function of a dict of arrays."""
  arrays = {name: np.array(a, np.float64) for name, a in arrays.items()}
  slopes = {}
  for name, array in arrays.items():
    slopes[name] = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      value = array[index]
      array[index] = value + step
      above = fn(arrays)
      array[index] = value - step
      below = fn(arrays)
      array[index] = value
      slopes[name][index] = (above - below) / (2 * step)
  return slopes
