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
    edges: the gates of the chosen, all first choices before all second choices,
      whether of tokens or of experts.
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


def real_tokens(tokens, mask):
  return [s for s in range(tokens) if mask is None or mask[s]]


def decision(shape, edges):
  """Sums over the edges (eq. 6)."""
  gates, importance, count = np.zeros(shape), np.zeros(shape[1]), [0] * shape[1]
  for s, e, gate in edges:
    gates[s, e] = gate
    importance[e] += gate
    count[e] += 1
  return Decision(gates, edges, importance, np.array(count), np.array(count))


def tokens_choose(shape, chosen):
  """Orders each token's list of (expert, gate), which has the best first."""
  edges = []
  for choice in range(shape[1]):
    for s in chosen:
      if choice < len(chosen[s]):
        edges.append((s, *chosen[s][choice]))
  return decision(shape, edges)


def experts_choose(picks, gates):
  """Orders each expert's list of tokens, which has the best first."""
  edges = []
  for rank in range(max(map(len, picks))):
    for e, tokens in enumerate(picks):
      if rank < len(tokens):
        edges.append((tokens[rank], e, gates[tokens[rank], e]))
  return decision(gates.shape, edges)


def softmax_gating(logits, mask=None):
  """Eq. 2: every token visits every expert."""
  return top_k(logits, logits.shape[1], mask)


def top_k(logits, k, mask=None):
  """Eq. 3 and 5, without noise."""
  chosen = {}
  for s in real_tokens(len(logits), mask):
    gates = softmax(keep_top_k(logits[s], k))
    chosen[s] = [(e, gates[e]) for e in largest(logits[s], k)]
  return tokens_choose(logits.shape, chosen)


def noisy_top_k(logits, noise, noise_std, k, mask=None):
  """Eq. 3 to 5 with the noise given, and the load of eq. 8 to 10.

  Where all experts are chosen there is none to compare with: load is a count.
  """
  tokens, experts = logits.shape
  noisy = logits + noise * noise_std
  if k == experts:
    return top_k(noisy, k, mask)
  load = np.zeros(experts)
  for s in real_tokens(tokens, mask):
    for i in range(experts):
      load[i] += chance(logits[s], noisy[s], noise_std[s], k, i)
  return top_k(noisy, k, mask)._replace(load=load)


def batchwise(x, k, mask):
  """Eq. 18 as a list for each column: its m largest, best first.

  m = k |X| / n to the nearest integer, at least 1 and at most |X|.
  """
  real = real_tokens(len(x), mask)
  experts = x.shape[1]
  m = min(len(real), max(1, math.floor(k * len(real) / experts + 0.5)))
  return [
    [real[i] for i in largest([x[s, e] for s in real], m)]
    for e in range(experts)
  ]


def balanced(logits, k, mask=None):
  """Eq. 15, 16 and 18."""
  x = np.array([softmax(row) for row in logits])
  picks = batchwise(x, k, mask)
  return experts_choose(picks, renormalized(x, picks))


def renormalized(x, picks):
  """Eq. 16."""
  gates = np.zeros_like(x)
  for s in range(len(x)):
    mine = [e for e, tokens in enumerate(picks) if s in tokens]
    for e in mine:
      gates[s, e] = x[s, e] / sum(x[s, j] for j in mine)
  return gates


def balanced_batch(logits, k, mask=None):
  """The same of all groups [G, S, E]; what each has of it, in turn."""
  groups, tokens, experts = logits.shape
  x = np.array([softmax(row) for row in logits.reshape(-1, experts)])
  picks = batchwise(x, k, None if mask is None else np.ravel(mask))
  gates = renormalized(x, picks).reshape(logits.shape)
  found = []
  for g in range(groups):
    own = range(g * tokens, (g + 1) * tokens)
    mine = [[s - own.start for s in each if s in own] for each in picks]
    found.append(experts_choose(mine, gates[g]))
  return found


def threshold(logits, thresholds, max_k, mask=None):
  """Eq. 15, 16 and 19; of more than max_k experts the largest."""
  chosen = {}
  for s in real_tokens(len(logits), mask):
    x = softmax(logits[s])
    above = [e for e in largest(x, len(x)) if x[e] > thresholds[e]][:max_k]
    chosen[s] = [(e, x[e] / sum(x[j] for j in above)) for e in above]
  return tokens_choose(logits.shape, chosen)


def in_best_groups(scores, number, most, best):
  """2405.04434, sec. 2.2.2: the experts of the groups with the largest score.

  That is the sum of their `best` largest; of fewer experts, of all.
  """
  size = len(scores) // number
  groups = [range(i * size, (i + 1) * size) for i in range(number)]
  of_groups = [sum(sorted(scores[e] for e in g)[-best:]) for g in groups]
  kept = largest(of_groups, most)
  return sorted(e for i in kept for e in groups[i])


def softmax_top_k(
  logits, k, mask=None, normalized=False, groups=(1, 1), scale=1
):
  """2401.06066 eq. 3 to 5; 2405.04434, sec. 2.2.2; 2409.02060."""
  chosen = {}
  for s in real_tokens(len(logits), mask):
    p = softmax(logits[s])
    near = in_best_groups(p, *groups, best=1)
    best = [near[i] for i in largest([p[e] for e in near], k)]
    over = sum(p[e] for e in best) if normalized else 1
    chosen[s] = [(e, scale * p[e] / over) for e in best]
  return tokens_choose(logits.shape, chosen)


def switch(logits, mask=None):
  """2101.03961: y = p_i(x) E_i(x) for the largest p_i alone."""
  return softmax_top_k(logits, 1, mask)


def gshard_top_2(logits, draws=None, mask=None):
  """2006.16668, algorithm 1: the second expert if 2 g2 is above the draw."""
  chosen = {}
  for s in real_tokens(len(logits), mask):
    p = softmax(logits[s])
    first, second = largest(p, 2)
    g1 = p[first] / (p[first] + p[second])
    g2 = p[second] / (p[first] + p[second])
    chosen[s] = [(first, g1)]
    if draws is None or 2 * g2 > draws[s]:
      chosen[s].append((second, g2))
  return tokens_choose(logits.shape, chosen)


def expert_choice(logits, k, mask=None):
  """2202.09368: S = softmax(X W_g), G and I = TopK(S^T, k)."""
  x = np.array([softmax(row) for row in logits])
  return experts_choose(batchwise(x, k, mask), x)


def mixed(word):
  """The last steps of MurmurHash3, on words of 32 bits."""
  word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
  word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
  return word ^ (word >> 16)


def hash_ids(ids, experts, k, mask=None):
  """2106.04426: experts by a fixed function of the id, all gates alike."""
  chosen = {}
  for s in real_tokens(len(ids), mask):
    start = mixed(int(ids[s]) % 2**32)
    scores = [mixed((start + e * 0x9E3779B9) % 2**32) for e in range(experts)]
    chosen[s] = [(e, 1 / k) for e in largest(scores, k)]
  return tokens_choose((len(ids), experts), chosen)


def sigmoid(logits, bias, k, mask=None, groups=(1, 1), scale=1):
  """2412.19437, eq. 13 to 16."""
  chosen = {}
  for s in real_tokens(len(logits), mask):
    scores = [1 / (1 + math.exp(-a)) for a in logits[s]]
    steered = [a + b for a, b in zip(scores, bias, strict=True)]
    near = in_best_groups(steered, *groups, best=2)
    best = [near[i] for i in largest([steered[e] for e in near], k)]
    over = sum(scores[e] for e in best)
    chosen[s] = [(e, scale * scores[e] / over) for e in best]
  return tokens_choose(logits.shape, chosen)


def has_slot(edges, capacity=None):
  """Says for each edge whether its expert still has a slot: first come first.

  Unused edges, to the expert E, are the caller's to leave out.
  """
  taken, answers = {}, []
  for _, e, _ in edges:
    taken[e] = taken.get(e, 0) + 1
    answers.append(capacity is None or taken[e] <= capacity)
  return answers


def dispatch(x, edges, expert, capacity=None):
  """y[token] += gate * E_expert(x[token]) for each edge that has a slot."""
  y = np.zeros_like(x)
  for (s, e, gate), fits in zip(edges, has_slot(edges, capacity), strict=True):
    if fits:
      y[s] += gate * expert(e, x[s])
  return y


def mixture(x, gates, expert):
  """Eq. 1: y = sum_i G(x)_i E_i(x), every expert on every token."""
  y = np.zeros_like(x)
  for s in range(x.shape[0]):
    for i in range(gates.shape[1]):
      y[s] += gates[s, i] * expert(i, x[s])
  return y


# -- two-level mixtures (app. B) ----------------------------------------------


class TwoLevels(NamedTuple):
  """What P groups of Q experts decide for one group of tokens.

  Attributes:
    primary: G_primary, between the groups; its edges are those that have
      a slot (see `together`).
    sent: X^(i), the tokens of these edges.
    secondary: G_i, of group i about these tokens, in this order.
    gates: G_primary(x)_i G_i(x)_j, zero where x is not in X^(i) [S, P, Q].
    slots: 1 where E_ij has a slot for x too, else 0 [S, P, Q].
  """

  primary: Decision
  sent: list[list[int]]
  secondary: list[Decision]
  gates: np.ndarray
  slots: np.ndarray


def two_levels(primary, decide, capacity=None):
  """`decide(i, tokens)` is the decision of group i about those sent to it."""
  sent = [[] for _ in primary.gates[0]]
  for s, i, _ in primary.edges:
    sent[i].append(s)
  secondary = [decide(i, tokens) for i, tokens in enumerate(sent)]
  shape = (*primary.gates.shape, secondary[0].gates.shape[1])
  gates, slots = np.zeros(shape), np.zeros(shape)
  for i, inner in enumerate(secondary):
    fits = has_slot(inner.edges, capacity)
    for (row, j, gate), stays in zip(inner.edges, fits, strict=True):
      s = sent[i][row]
      gates[s, i, j] = primary.gates[s, i] * gate
      slots[s, i, j] = stays
  return TwoLevels(primary, sent, secondary, gates, slots)


def together(decisions, capacity=None):
  """Makes one of the decisions of groups of tokens, in turn.

  Its edges are those that have a slot in their group; its sums are of all.
  """
  edges = []
  for i, each in enumerate(decisions):
    first = i * len(each.gates)
    fits = has_slot(each.edges, capacity)
    for (s, e, gate), stays in zip(each.edges, fits, strict=True):
      if stays:
        edges.append((first + s, e, gate))
  gates = np.concatenate([each.gates for each in decisions])
  sums = [sum(each[i] for each in decisions) for i in (2, 3, 4)]
  return Decision(gates, edges, *sums)


def two_level_mixture(x, levels, expert):
  """Eq. 12: y = sum_i sum_j G_primary(x)_i G_i(x)_j E_ij(x)."""
  y = np.zeros_like(x)
  tokens, groups, experts = levels.gates.shape
  for s in range(tokens):
    for i in range(groups):
      for j in range(experts):
        if levels.slots[s, i, j]:
          y[s] += levels.gates[s, i, j] * expert(i * experts + j, x[s])
  return y


def relu(a):
  return max(a, 0.0)


def feed_forward(weights, activation=relu):
  """ReLU layers, then a linear one, no biases: E_e as (e, row) -> row.

  Where there is a w_gate the first layer is multiplied by x w_gate
  (2002.05202).
  """

  def expert(e, row):
    hidden = np.array([activation(a) for a in row @ weights["w_in"][e]])
    if "w_gate" in weights:
      hidden = hidden * (row @ weights["w_gate"][e])
    for name in sorted(weights):
      if name[2:].isdigit():
        hidden = np.array([activation(a) for a in hidden @ weights[name][e]])
    return hidden @ weights["w_out"][e]

  return expert


def linear(weights):
  """The expert of the draft."""
  return lambda e, row: row @ weights["w"][e]


def mixed_experts(kinds):
  """Experts numbered kind by kind, from the number and loops of each kind."""

  def expert(e, row):
    for number, loops in kinds:
      if e < number:
        return loops(e, row)
      e -= number

  return expert


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
