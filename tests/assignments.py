"""Assignments drawn by hand, which no router need have made."""

import jax.numpy as jnp
import numpy as np

from moejax import routing
from moejax.routing import Assignment

G, S, E, K = 2, 5, 4, 2


def choices(random, unused=0.15):
  """Every token chooses K distinct experts; a few tokens are padding."""
  order = np.argsort(random.random((G, S, E)), -1)
  # Skewed, so that experts overflow: most tokens want expert 0.
  order[random.random((G, S)) < 0.5] = np.arange(E)
  padding = random.random((G, S)) < unused
  expert = np.where(padding[..., None], E, order[..., :K]).astype("int32")
  gate = random.uniform(0.1, 1, (G, S, K)) * ~padding[..., None]
  return routing.from_token_choice(
    jnp.asarray(expert), jnp.asarray(gate, jnp.float32)
  )


def edge_list(random, num_edges=13):
  """Some pairs of a token and an expert; some edges are unused."""
  # Expert 0 is wanted by all, early or late.
  others = random.permuted(np.tile(np.arange(S, S * E), (G, 1)), axis=1)
  pair = np.concatenate(
    [np.tile(np.arange(S), (G, 1)), others[:, : num_edges - S]], axis=1
  )
  pair = random.permuted(pair, axis=1)
  unused = random.random(pair.shape) < 0.15
  expert = np.where(unused, E, pair // S).astype("int32")
  gate = random.uniform(0.1, 1, pair.shape) * ~unused
  return Assignment(
    jnp.asarray(expert),
    jnp.asarray(gate, jnp.float32),
    jnp.asarray(pair % S, jnp.int32),
  )


KINDS = {"choices": choices, "edge_list": edge_list}


def edges(assignment, g, gate=None):
  """All edges of group g for the reference: unused ones too, as gate 0."""
  gate = np.asarray(assignment.gate if gate is None else gate, np.float64)
  listed = zip(
    assignment.tokens(S)[g], assignment.expert[g], gate[g], strict=True
  )
  return [(int(t), int(e), float(w)) for t, e, w in listed]
