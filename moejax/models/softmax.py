"""The output layer: full and sampled softmax over the vocabulary."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax import sharding
from moejax.models.layers import declare, look_up, product, table_rows

# Logits of the full softmax at once, 256 MB of float32 on each device; those of
# a time step, if these are more.
_LOGITS = 2**26


def log_uniform(
  rng: PRNGKeyArray, num_samples: int, vocab_size: int
) -> tuple[Int[Array, "U"], Bool[Array, "U"]]:
  """Draws class ids with p(id) = log(1 + 1/(id+1)) / log(V+1).

  Zipf's law for ids sorted by falling frequency. An id that is drawn again
  counts once (docs/decisions.md, 46).

  Returns:
    The distinct ids of all draws, sorted, in an array of `most_distinct`
    entries, and which entries hold one. The rarest ids are left out where there
    are more.
  """
  uniform, within = jax.random.uniform(rng, (2, num_samples))
  logarithm = math.log(vocab_size + 1)
  above = jnp.exp(uniform * logarithm)
  # Of a large vocabulary the 2**23 values of a float32 would skip words, always
  # the same; the second draw fills the step from one value to the next.
  above += above * within * (logarithm * 2**-23)
  ids = jnp.clip(above.astype(jnp.int32) - 1, 0, vocab_size - 1)
  size = most_distinct(num_samples, vocab_size)
  ids = jnp.unique(ids, size=size, fill_value=vocab_size)
  used = ids < vocab_size
  return jnp.where(used, ids, 0), used


def most_distinct(num_samples: int, vocab_size: int) -> int:
  """Returns the mean number of classes that draws are of, and a margin.

  Four standard deviations of a count of independent classes; those of a sample
  exclude each other, so theirs varies less: fewer than one in 30,000 has more.
  8192 draws from 793,471 words are of 4831 classes at most.
  """
  seen = _chance_of_any(np, np.arange(vocab_size), num_samples, vocab_size)
  margin = 4 * math.sqrt((seen * (1 - seen)).sum())
  return min(math.ceil(seen.sum() + margin), num_samples, vocab_size)


def mean_distinct(num_samples: int, vocab_size: int) -> float:
  """Returns the mean number of classes that draws are of."""
  seen = _chance_of_any(np, np.arange(vocab_size), num_samples, vocab_size)
  return float(seen.sum())


def log_expected_count(
  ids: Int[Array, "..."], num_samples: int, vocab_size: int
) -> Float[Array, "..."]:
  """Log of the chance that a class is among the draws: 1 - (1 - p)^P.

  Not log(P p), which exceeds 0 for frequent classes: as targets these would
  weigh less than in the full softmax.
  """
  ids = ids.astype(jnp.float32)
  return jnp.log(_chance_of_any(jnp, ids, num_samples, vocab_size))


def _chance_of_any(numpy, ids, num_samples, vocab_size):
  """1 - (1 - p)^P, by NumPy where it says how large an array is."""
  chance = numpy.log1p(1 / (ids + 1)) / math.log(vocab_size + 1)
  return -numpy.expm1(num_samples * numpy.log1p(-chance))


@jax.custom_vjp
def _scores(
  h: Float[Array, "B L D"], rows: Float[Array, "V D"]
) -> Float[Array, "B L V"]:
  """h W^T: operands in the dtype of h, sums and scores in float32.

  So are its gradients. JAX's own would multiply in float32: scores, and what
  flows back to them, are.
  """
  return product("BLD,VD->BLV", h, rows, h.dtype)


def _scores_backward(saved, slope):
  h, rows = saved
  to_h = product("BLV,VD->BLD", slope, rows, h.dtype)
  # Over two axes, B and L, XLA would sum along the columns of a transposed
  # copy of the slope, and compute all that led there once more.
  flat = slope.reshape(-1, slope.shape[-1]), h.reshape(-1, h.shape[-1])
  to_rows = product("NV,ND->VD", *flat, h.dtype)
  return to_h.astype(h.dtype), to_rows.astype(rows.dtype)


_scores.defvjp(lambda h, rows: (_scores(h, rows), (h, rows)), _scores_backward)


class Softmax(nn.Module):
  """p(word | h) = softmax(h W^T), without bias (app. C.1).

  Attributes:
    vocab_size: V; ids must be sorted by falling frequency for the sampler.
    width: D.
    num_samples: draws of classes to compare with in training instead of all V
      (sampled softmax as in Jozefowicz et al. 2016: one set a batch, logits
      less log expected count, for target and samples alike; docs/decisions.md,
      23). 0 trains with the full softmax. The rng stream is "softmax".
      Evaluation is always full.
    multiple: the number of the table's rows is a multiple of it.
  """

  vocab_size: int
  width: int
  num_samples: int = 0
  multiple: int = 1

  def setup(self) -> None:
    init = nn.initializers.variance_scaling(
      1.0, "fan_in", "normal", in_axis=1, out_axis=0
    )
    shape = (table_rows(self.vocab_size, self.multiple), self.width)
    self.table = declare(self, "table", ("vocab", "embed"), shape, init)

  def logits(self, h: Float[Array, "B L D"]) -> Float[Array, "B L rows"]:
    """Returns the score of every row; -inf for those that are no word."""
    split = sharding.splits("vocab")
    if split:
      # The states meet the parts of the table, which is much larger.
      h = sharding.constrain(h, "batch_at_vocab", None, None)
    scores = _scores(h, self.table)
    if split:
      scores = sharding.constrain(scores, "batch_at_vocab", None, "vocab")
    if scores.shape[-1] == self.vocab_size:
      return scores
    is_word = jnp.arange(scores.shape[-1]) < self.vocab_size
    return jnp.where(is_word[None, None], scores, -jnp.inf)

  def log_p(self, h: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Returns log p of every word."""
    return jax.nn.log_softmax(self.logits(h)[..., : self.vocab_size])

  def loss(
    self, h: Float[Array, "B L D"], targets: Int[Array, "B L"], *, train: bool
  ) -> Float[Array, "B L"]:
    """Returns -log p(target) in nats, or its sampled stand-in in training."""
    if train and self.num_samples:
      return self._sampled(h, targets)

    # Where all B*L*V logits at once would outgrow the rest of the model: some
    # time steps at a time, recomputed in the backward pass.
    B, L = targets.shape
    devices = math.prod(map(sharding.num_devices, ("batch_at_vocab", "vocab")))
    most = max(1, _LOGITS * devices // (B * len(self.table)))
    steps = next(n for n in range(min(most, L), 0, -1) if L % n == 0)

    def of_steps(part):
      h, targets = part
      logits = self.logits(h)
      # Not by index: over devices that would gather the scores of all.
      rows = jnp.arange(logits.shape[-1])[None, None]
      is_target = rows == targets[..., None]
      chosen = jnp.where(is_target, logits, 0).sum(axis=-1)
      return jax.nn.logsumexp(logits, axis=-1) - chosen

    if steps == L:
      return of_steps((h, targets))
    parts = jax.tree.map(
      lambda x: x.reshape(B, L // steps, steps, *x.shape[2:]).swapaxes(0, 1),
      (h, targets),
    )
    loss = jax.lax.map(jax.checkpoint(of_steps), parts)
    return loss.swapaxes(0, 1).reshape(B, L)

  def _sampled(
    self, h: Float[Array, "B L D"], targets: Int[Array, "B L"]
  ) -> Float[Array, "B L"]:
    size = self.num_samples, self.vocab_size
    sampled, used = log_uniform(self.make_rng("softmax"), *size)
    others = _scores(h, self.table[sampled])
    others = others - log_expected_count(sampled, *size)[None, None]
    # A sample that is the target would count it twice.
    other = used[None, None] & (sampled[None, None] != targets[..., None])
    others = jnp.where(other, others, -jnp.inf)
    rows = look_up(self.table, targets).astype(h.dtype)
    # The products of two bfloat16 numbers are exact in float32.
    own = (h.astype(jnp.float32) * rows.astype(jnp.float32)).sum(axis=-1)
    own = own - log_expected_count(targets, *size)
    return jnp.logaddexp(jax.nn.logsumexp(others, axis=-1), own) - own


class Predictor(nn.Module):
  """A model that gives a state h of every token, and has a Softmax, `head`."""

  def loss(
    self, batch: Mapping[str, Array], *, train: bool = False
  ) -> Float[Array, "B L"]:
    """Returns nats per target, 0 at padding."""
    h = self(batch, train=train)
    loss = self.head.loss(h, batch["targets"], train=train)
    return jnp.where(batch["mask"], loss, 0)
