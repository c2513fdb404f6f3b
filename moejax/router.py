"""Routers: linen modules that own the gating weights and draw the noise.

Logits are float32 and multiplied at the highest precision whatever the
activations are: a bfloat16 logit moves tokens between experts.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from moejax import gating, sharding
from moejax.grouped import grouped_dot
from moejax.routing import Routing
from moejax.slots import num_below

_ZEROS = nn.initializers.zeros
# From zeros, without noise, all experts tie for every token: at first k of them
# would take all tokens or, where experts choose, all experts the same few.
_RANDOM = nn.initializers.lecun_normal()
# Parameters that follow quantiles of the batch, by `losses.quantile`.
AVERAGES = frozenset({"average_thresholds", "average_bias"})


def check_train(train: Any) -> None:
  """Raises ValueError where it is no bool, as it decides what is compiled."""
  if not isinstance(train, bool | np.bool_):
    raise ValueError(
      f"train is of type {type(train).__name__}, but it decides what is"
      " compiled; give True or False itself: with"
      " static_argnames='train' under jax.jit, and as"
      " nn.remat(MoE, static_argnums=(2,))(...)(x, True) under nn.remat."
    )


class SortedRows(NamedTuple):
  """Tokens of P routers of one kind, each a group by itself: G = N and S = 1.

  The routers' parameters have an axis P in front.

  Attributes:
    rows: sorted by their router; zero past the last of them.
    group_sizes: how many rows each router has.
    number: of each row, which its noise depends on.
  """

  rows: Float[Array, "N D"]
  group_sizes: Int[Array, "P"]
  number: Int[Array, "N"]

  @property
  def shape(self) -> tuple[int, int, int]:
    """As that of x [G, S, D]."""
    return self.rows.shape[0], 1, self.rows.shape[1]

  def of_rows(self, values: Float[Array, "P E"]) -> Float[Array, "N 1 E"]:
    """Returns the values of each row's router."""
    rank = jnp.arange(self.rows.shape[0], dtype=jnp.int32)
    router = num_below(jnp.cumsum(self.group_sizes), rank + 1)
    return values.at[router].get(mode="clip")[:, None]


class _Logits(nn.Module):
  """x W, without bias, in float32."""

  num_experts: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(
    self, x: Float[Array, "G S D"] | SortedRows
  ) -> Float[Array, "G S E"]:
    exact = jax.lax.Precision.HIGHEST
    init = sharding.with_axes(self.kernel_init, "embed", None)
    if isinstance(x, SortedRows):
      shape = (x.group_sizes.size, x.rows.shape[1], self.num_experts)
      kernels = self.param("kernel", init, shape, jnp.float32)
      rows = x.rows.astype(jnp.float32)
      return grouped_dot(rows, kernels, x.group_sizes, exact)[:, None]
    kernel = self.param(
      "kernel", init, (x.shape[-1], self.num_experts), jnp.float32
    )
    # Over two axes G and S XLA would sum, for the kernel's gradient, along the
    # columns of a transposed copy, and compute all that led there once more.
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = jnp.dot(flat, kernel, precision=exact)
    return y.reshape(*x.shape[:-1], self.num_experts)


class Router(nn.Module):
  """What all routers share; `decide` is each one's own.

  It reads x by `logits`, `vector` and `key` alone, and so serves tokens in
  groups, and sorted rows of several routers.

  Attributes:
    num_experts: E.
    k: of most routers, the experts that a token visits; on average, where it is
      the experts that choose.
  """

  num_experts: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "G S D"] | SortedRows,
    *,
    train: bool,
    mask: Bool[Array, "G S"] | None = None,
    ids: Int[Array, "G S"] | None = None,
  ) -> Routing:
    """Routes each group by itself; only `Hash` asks for the ids of tokens.

    Raises:
      ValueError: sizes that do not go together, or `train` is no bool.
    """
    check_train(train)
    return self.decide(x, train, mask, ids)

  def decide(self, x, train: bool, mask, ids) -> Routing:
    """Makes the decision; parameters must not depend on `train`."""
    raise NotImplementedError

  @nn.nowrap
  def is_by_token(self, train: bool) -> bool:
    """Says whether no token's experts depend on the others of its group."""
    return True

  def logits(
    self,
    x: Float[Array, "G S D"] | SortedRows,
    init: nn.initializers.Initializer = _RANDOM,
    name: str = "gate",
  ) -> Float[Array, "G S E"]:
    """H(x) without noise."""
    return _Logits(self.num_experts, init, name=name)(x)

  def vector(
    self, x: Float[Array, "G S D"] | SortedRows, name: str, start: float
  ) -> Float[Array, "*G E"]:
    """A parameter with one entry per expert; that of each sorted row."""
    init = sharding.with_axes(nn.initializers.constant(start), None)
    of_rows = isinstance(x, SortedRows)
    shape = (*(x.group_sizes.shape if of_rows else ()), self.num_experts)
    values = self.param(name, init, shape, jnp.float32)
    return x.of_rows(values) if of_rows else values

  def key(
    self, x: Float[Array, "G S D"] | SortedRows
  ) -> PRNGKeyArray | Key[Array, "G"]:
    """Draws from the rng stream "router": one key, or one for each row."""
    key = self.make_rng("router")
    if not isinstance(x, SortedRows):
      return key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      key = jax.random.wrap_key_data(key)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, x.number)


class Softmax(Router):
  """Dense gating (eq. 2).

  Its weights may start at zero: every expert gets gradient from there.
  """

  def decide(self, x, train, mask, ids):
    return gating.softmax(self.logits(x, _ZEROS), mask)


class TopK(Router):
  """Top-k gating without noise (eq. 3 and 5)."""

  k: int

  def decide(self, x, train, mask, ids):
    return gating.top_k(self.logits(x), self.k, mask)


class NoisyTopK(Router):
  """The paper's router (sec. 2.1): noisy top-k in training, top-k otherwise.

  What the paper does not say of it is in docs/decisions.md, 1.

  W_g and W_noise start at zero (app. A), so that at first the noise alone
  chooses and load is balanced. It is drawn from the rng stream "router".
  Evaluation has none: before any training all logits tie there, every token
  goes to the first k experts, and most find no slot.

  Attributes:
    noise_epsilon: least noise_std, as in the authors' code; 0 is eq. 4 to the
      letter.
  """

  k: int
  noise_epsilon: float = 1e-2

  def decide(self, x, train, mask, ids):
    if not self.noise_epsilon >= 0:
      raise ValueError(
        f"noise_epsilon is {self.noise_epsilon}, but it is a standard"
        " deviation; give 0 or more."
      )
    logits = self.logits(x, _ZEROS)
    # Read in evaluation too: the parameters must not depend on `train`.
    noise_logits = self.logits(x, _ZEROS, name="noise")
    if not train:
      return gating.top_k(logits, self.k, mask)
    return gating.noisy_top_k(
      logits,
      nn.softplus(noise_logits) + self.noise_epsilon,
      self.k,
      self.key(x),
      mask,
    )


class _Thresholds(Router):
  """A router whose tokens visit every expert above its threshold, or may so.

  Attributes:
    max_k: the most that a token may visit by thresholds; 2k by default, or all.
  """

  k: int
  max_k: int | None = None

  def by_thresholds(self, logits, thresholds, mask) -> Routing:
    """Decides about every token by itself (eq. 19)."""
    max_k = self.max_k
    if max_k is None:
      max_k = min(2 * self.k, self.num_experts)
    return gating.threshold(logits, thresholds, max_k, mask)


class Balanced(_Thresholds):
  """Strictly balanced gating (app. F): experts choose; thresholds at inference.

  What the paper does not say of it is in docs/decisions.md, 25, 29, 52.

  Thresholds start at 1/E, the mean of a softmax over E experts, and learn by
  one loss alone. By `losses.threshold`, eq. 20, they are exp of the parameter
  "log_thresholds": a step of the optimizer moves them by a fraction, and never
  below zero. By `losses.quantile` they are the parameter "average_thresholds",
  a moving average of the least X that an expert takes of the whole batch.

  Attributes:
    over: what every expert takes its share of in training, the "batch" as in
      the paper, or every "group" by itself; of microbatches it is each.
    group_factor: room in a group's edges for an expert's share of the batch,
      over the mean share; what exceeds it is dropped, and counted so.
    learned_by: the loss that teaches the thresholds, "threshold" or "quantile".
  """

  over: str = "group"
  group_factor: float = 2.0
  learned_by: str = "threshold"

  def decide(self, x, train, mask, ids):
    # In evaluation too, where only max_k is read: training comes after init.
    gating.check_k(self.k, self.num_experts)
    logits = self.logits(x)
    if _follows(self.learned_by, "threshold"):
      learned = _average_thresholds(self, x)
    else:
      start = -math.log(self.num_experts)
      log_thresholds = self.vector(x, "log_thresholds", start)
      learned = {"thresholds": jnp.exp(log_thresholds)}
    if not train:
      return self.by_thresholds(logits, learned["thresholds"], mask)
    routing = gating.balanced(
      logits, self.k, mask, self.over, self.group_factor
    )
    return routing._replace(**learned)

  @nn.nowrap
  def is_by_token(self, train):
    return not train


class ExpertThreshold(_Thresholds):
  """Expert threshold routing (2603.11535): all experts above their thresholds.

  In training as at inference a token visits every expert whose X is above its
  threshold, at most `max_k`, perhaps none: k on average, and causal always. X
  is the softmax of the logits and the gates are X, renormalized over these
  experts (eq. 16), as of `Balanced`.

  The thresholds are the parameter "average_thresholds", a moving average of the
  batch's quantiles that `losses.quantile` alone moves. They start at 1/E, the
  mean of X, so that every token whose logits differ visits some expert from the
  first step on; a warm-up by expert choice would look ahead. Until they have
  come to the quantiles, with a weight w after some 2/w steps, experts may have
  more tokens than their share, or less. What `max_k` keeps from an expert is
  also missing.
  """

  def decide(self, x, train, mask, ids):
    gating.check_k(self.k, self.num_experts)
    learned = _average_thresholds(self, x)
    routing = self.by_thresholds(self.logits(x), learned["thresholds"], mask)
    return routing._replace(**learned) if train else routing


class Switch(Router):
  """Switch Transformer's (2101.03961): one expert, weighed by its softmax."""

  def decide(self, x, train, mask, ids):
    return gating.switch(self.logits(x), mask)


class GShardTop2(Router):
  """GShard's (2006.16668): two experts, the second by chance in training.

  The chance is drawn from the rng stream "router".
  """

  def decide(self, x, train, mask, ids):
    rng = self.key(x) if train else None
    return gating.gshard_top_2(self.logits(x), rng, mask)


class ExpertChoice(Router):
  """Expert choice (2202.09368); not causal, in evaluation neither."""

  k: int

  def decide(self, x, train, mask, ids):
    return gating.expert_choice(self.logits(x), self.k, mask)

  @nn.nowrap
  def is_by_token(self, train):
    return False


class Hash(Router):
  """Hash layer (2106.04426): by token id, without parameters."""

  k: int

  def decide(self, x, train, mask, ids):
    if ids is None:
      raise ValueError(
        f"the hash router spreads token ids over {self.num_experts} experts,"
        " but got no ids; pass ids=, one per token, or choose another router"
        " (a mixture within a group or an expert is given none)."
      )
    return gating.hash_ids(ids, self.num_experts, self.k, mask)


class _GroupLimited(Router):
  """A router whose tokens may be kept to few groups of experts.

  Attributes:
    num_groups: equal groups of experts that follow each other; it divides
      num_experts.
    max_groups: the most groups that a token visits, its best; 1 is no limit
      where there is 1 group.
    scale: what gates are multiplied by (routed_scaling_factor).
  """

  k: int
  num_groups: int = 1
  max_groups: int = 1
  scale: float = 1.0


class SoftmaxTopK(_GroupLimited):
  """Top-k of a softmax over all experts, as in OLMoE (2409.02060).

  Kept to groups it is DeepSeek-V2's (2405.04434, sec. 2.2.2).

  Attributes:
    normalized: whether the gates of the chosen are divided by their sum.
  """

  normalized: bool = False

  def decide(self, x, train, mask, ids):
    return gating.softmax_top_k(
      self.logits(x),
      self.k,
      mask,
      self.normalized,
      self.num_groups,
      self.max_groups,
      self.scale,
    )


class Sigmoid(_GroupLimited):
  """Balance without a loss (2408.15664), as in DeepSeek-V3 (2412.19437).

  The bias starts at zero and learns by one loss alone: the parameter "bias" by
  signs, `losses.bias`, or "average_bias" by quantile balancing
  (kexue.fm/archives/11619), `losses.quantile`. A limit to groups leaves it
  without a quantile, and is a ValueError there.

  Attributes:
    learned_by: the loss that teaches the bias, "bias" or "quantile".
  """

  learned_by: str = "bias"

  def decide(self, x, train, mask, ids):
    follows = _follows(self.learned_by, "bias")
    if follows and self.max_groups < self.num_groups:
      raise ValueError(
        "the bias is learned by 'quantile', but tokens are kept to"
        f" {self.max_groups} of {self.num_groups} groups of experts, beyond"
        " which none lets an expert in; choose learned_by='bias', or as many"
        " max_groups."
      )
    bias = self.vector(x, "average_bias" if follows else "bias", 0.0)
    routing = gating.sigmoid(
      self.logits(x),
      bias,
      self.k,
      mask,
      self.num_groups,
      self.max_groups,
      self.scale,
    )
    return routing._replace(k=_each_k(self)) if follows else routing


class Single(Router):
  """One expert for every token (MoE-1-Wide and MoE-1-Deep, app. C.1).

  Its gate is 1: there are no parameters, and no balance to lose.
  """

  num_experts: int = 1

  def decide(self, x, train, mask, ids):
    if self.num_experts != 1:
      raise ValueError(
        f"there are {self.num_experts} experts, but the router Single chooses"
        " among 1; choose another router."
      )
    return gating.top_k(jnp.zeros((*x.shape[:2], 1), jnp.float32), 1, mask)


def _follows(learned_by: str, other: str) -> bool:
  """Says whether quantiles teach what a router learns, not its other loss."""
  if learned_by not in (other, "quantile"):
    raise ValueError(
      f"learned_by is {learned_by!r}; choose the loss {other!r} or 'quantile'."
    )
  return learned_by == "quantile"


def _average_thresholds(router: Router, x) -> dict[str, Array]:
  """What a routing says of thresholds that follow quantiles."""
  start = 1 / router.num_experts
  thresholds = router.vector(x, "average_thresholds", start)
  return {"thresholds": thresholds, "k": _each_k(router)}


def _each_k(router: Router) -> Int[Array, "E"]:
  return jnp.full(router.num_experts, router.k, jnp.int32)


ROUTERS = {
  "softmax": Softmax,
  "top_k": TopK,
  "noisy_top_k": NoisyTopK,
  "balanced": Balanced,
  "expert_threshold": ExpertThreshold,
  "softmax_top_k": SoftmaxTopK,
  "switch": Switch,
  "gshard_top_2": GShardTop2,
  "expert_choice": ExpertChoice,
  "hash": Hash,
  "sigmoid": Sigmoid,
}
