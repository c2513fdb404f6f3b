"""What the paper and its successors say of balance, in loops, as reference.py.

Of whole batches where not said otherwise: the losses add up all groups.
"""

import math

import numpy as np
from reference import largest, softmax


def cv_squared(v):
  """The square of the coefficient of variation (eq. 7, 11), of a population."""
  mean = sum(v) / len(v)
  variance = sum((a - mean) ** 2 for a in v) / len(v)
  return variance / mean**2 if mean else 0.0


def cv_loss(vectors, scope):
  """Eq. 7 and 11: of the groups' sum, or the mean of each group's own."""
  if scope == "batch":
    return cv_squared(sum(vectors))
  return sum(cv_squared(v) for v in vectors) / len(vectors)


def hierarchical_load(primary, secondary, reached):
  """Eq. 14 of Load_primary [P], Load_i [P, Q] and |X^(i)| [P], flat."""
  return np.array(
    [
      primary[i] * secondary[i][j] / reached[i] if reached[i] else 0.0
      for i in range(len(primary))
      for j in range(len(secondary[i]))
    ]
  )


def two_level_importance(groups):
  """Eq. 13: sum_x G_primary(x)_i G_i(x)_j over all groups of tokens, flat."""
  return sum(levels.gates.sum(axis=0) for levels in groups).reshape(-1)


def two_level_load(groups):
  """Eq. 14 over all groups of tokens, flat."""
  P = len(groups[0].sent)
  return hierarchical_load(
    sum(levels.primary.load for levels in groups),
    [sum(levels.secondary[i].load for levels in groups) for i in range(P)],
    [sum(len(levels.sent[i]) for levels in groups) for i in range(P)],
  )


def switch_balance(mixtures):
  """2101.03961, eq. 4, of the logits [tokens, E] of each mixture of a level.

  Every token has the same say: mixtures weigh as many as their tokens.
  """
  total, tokens = 0.0, 0
  for logits in mixtures:
    n, experts = logits.shape
    f, p = np.zeros(experts), np.zeros(experts)
    for v in logits:
      f[largest(v, 1)[0]] += 1 / n
      p += softmax(v) / n
    total += n * experts * sum(f[e] * p[e] for e in range(experts))
    tokens += n
  return total / tokens if tokens else 0.0


def z_loss(logits):
  """2202.08906, eq. 5, of the logits [tokens, E]."""
  squares = [math.log(sum(math.exp(a) for a in v)) ** 2 for v in logits]
  return sum(squares) / len(squares) if squares else 0.0


def threshold_loss(logits, thresholds, edges, mask=None):
  """Eq. 20, M_batchwise being 1 on the edges."""
  tokens, experts = logits.shape
  chosen = [(s, e) for s, e, _ in edges]
  total = 0.0
  for s in range(tokens):
    if mask is None or mask[s]:
      x = softmax(logits[s])
      for i in range(experts):
        passes = 1 if x[i] > thresholds[i] else 0
        picked = 1 if (s, i) in chosen else 0
        total += (passes - picked) * (x[i] - thresholds[i])
  return total


def bias_rule(count, rate):
  """2408.15664: what to add to each bias: up if it has too little load."""
  mean = sum(count) / len(count)
  return [rate * (int(c < mean) - int(c > mean)) for c in count]


def share_of(n, experts, k):
  """Eq. 18: m of n tokens, at least one."""
  return min(n, max(1, math.floor(k * n / experts + 0.5)))


def exceeded(values, m):
  """What m of these exceed: midway to the next largest, if there is one."""
  in_order = sorted(values, reverse=True)
  return (in_order[m - 1] + in_order[min(m, len(values) - 1)]) / 2


def threshold_targets(logits, k):
  """2603.11535, of all tokens [n, E]: each expert's least X of its m tokens."""
  n, experts = logits.shape
  x = [softmax(v) for v in logits]
  m = share_of(n, experts, k)
  found = np.array([exceeded([v[e] for v in x], m) for e in range(experts)])
  return found / 2 if k == experts else found


def bias_targets(logits, bias, k):
  """Quantile balancing: m of the biases that let a token in are below.

  A token lets an expert in whose score + bias is above its cutoff, the next
  best after the k that it chooses. Centered over experts.
  """
  n, experts = logits.shape
  m, lets_in = share_of(n, experts, k), np.zeros((n, experts))
  for s, v in enumerate(logits):
    scores = [1 / (1 + math.exp(-a)) for a in v]
    steered = [a + b for a, b in zip(scores, bias, strict=True)]
    cutoff = sorted(steered, reverse=True)[min(k, experts - 1)]
    lets_in[s] = [cutoff - a for a in scores]
  targets = [-exceeded([-a for a in lets_in[:, e]], m) for e in range(experts)]
  return np.array([t - sum(targets) / experts for t in targets])


def entropy(v):
  """Of the softmax of the logits of one token, in nats."""
  return -sum(p * math.log(p) for p in softmax(v) if p > 0)
