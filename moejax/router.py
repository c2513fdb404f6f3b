"""Routers: linen modules that own the gating weights and draw the noise.

Logits are float32 and multiplied at the highest precision whatever the
activations are: a bfloat16 logit moves tokens between experts.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax import gating, sharding
from moejax.routing import Routing

_ZEROS = nn.initializers.zeros
# From zeros, without noise, all experts tie for every token: at first k of them
# would take all tokens or, where experts choose, all experts the same few.
_RANDOM = nn.initializers.lecun_normal()


class _Logits(nn.Module):
  """x W, without bias, in float32."""

  num_experts: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E"]:
    init = sharding.with_axes(self.kernel_init, "embed", None)
    kernel = self.param(
      "kernel", init, (x.shape[-1], self.num_experts), jnp.float32
    )
    # Over two axes G and S XLA would sum, for the kernel's gradient, along the
    # columns of a transposed copy, and compute all that led there once more.
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = jnp.dot(flat, kernel, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:-1], self.num_experts)


class Router(nn.Module):
  """What all routers share; `decide` is each one's own.

  Attributes:
    num_experts: E.
  """

  num_experts: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "G S D"],
    *,
    train: bool,
    mask: Bool[Array, "G S"] | None = None,
    ids: Int[Array, "G S"] | None = None,
  ) -> Routing:
    """Routes each group by itself; only `Hash` asks for the ids of tokens.

    Raises:
      ValueError: sizes that do not go together, or `train` is no bool.
    """
    if not isinstance(train, bool | np.bool_):
      raise ValueError(
        f"train is of type {type(train).__name__}, but it decides what is"
        " compiled; give True or False itself: with"
        " static_argnames='train' under jax.jit, and as"
        " nn.remat(MoE, static_argnums=(2,))(...)(x, True) under nn.remat."
      )
    return self.decide(x, train, mask, ids)

  def decide(self, x, train: bool, mask, ids) -> Routing:
    """Makes the decision; parameters must not depend on `train`."""
    raise NotImplementedError

  def logits(
    self,
    x: Float[Array, "G S D"],
    init: nn.initializers.Initializer = _RANDOM,
    name: str = "gate",
  ) -> Float[Array, "G S E"]:
    """H(x) without noise."""
    return _Logits(self.num_experts, init, name=name)(x)

  def vector(self, name: str, start: float) -> Float[Array, "E"]:
    """A parameter with one entry per expert."""
    init = sharding.with_axes(nn.initializers.constant(start), None)
    return self.param(name, init, (self.num_experts,), jnp.float32)


class Softmax(Router):
  """Dense gating (eq. 2).

  Its weights may start at zero: every expert gets gradient from there.
  """

  def decide(self, x, train, mask, ids):
    return gating.softmax(self.logits(x, _ZEROS), mask)


class TopK(Router):
  """Top-k gating without noise (eq. 3 and 5).

  Attributes:
    k: experts per token.
  """

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
    k: experts per token.
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
      self.make_rng("router"),
      mask,
    )


class Balanced(Router):
  """Strictly balanced gating (app. F): experts choose; thresholds at inference.

  What the paper does not say of it is in docs/decisions.md, 25, 29, 52.

  The thresholds are exp of the parameter "log_thresholds". They are as small as
  a softmax over E experts is, and so a step of the optimizer moves them by a
  fraction, and never below zero. They start at 1/E, the mean of that softmax,
  and learn by `losses.threshold` alone, eq. 20, over the same.

  Attributes:
    k: experts per token, on average.
    max_k: the most that a token may visit at inference; 2k by default, or all.
    over: what every expert takes its share of in training, the "batch" as in
      the paper, or every "group" by itself; of microbatches it is each.
    group_factor: room in a group's edges for an expert's share of the batch,
      over the mean share; what exceeds it is dropped, and counted so.
  """

  k: int
  max_k: int | None = None
  over: str = "group"
  group_factor: float = 2.0

  def decide(self, x, train, mask, ids):
    # In evaluation too, where only max_k is read: training comes after init.
    gating.check_k(self.k, self.num_experts)
    logits = self.logits(x)
    start = -math.log(self.num_experts)
    thresholds = jnp.exp(self.vector("log_thresholds", start))
    if train:
      routing = gating.balanced(
        logits, self.k, mask, self.over, self.group_factor
      )
      return routing._replace(thresholds=thresholds)
    max_k = self.max_k
    if max_k is None:
      max_k = min(2 * self.k, self.num_experts)
    return gating.threshold(logits, thresholds, max_k, mask)


class Switch(Router):
  """Switch Transformer's (2101.03961): one expert, weighed by its softmax."""

  def decide(self, x, train, mask, ids):
    return gating.switch(self.logits(x), mask)


class GShardTop2(Router):
  """GShard's (2006.16668): two experts, the second by chance in training.

  The chance is drawn from the rng stream "router".
  """

  def decide(self, x, train, mask, ids):
    rng = self.make_rng("router") if train else None
    return gating.gshard_top_2(self.logits(x), rng, mask)


class ExpertChoice(Router):
  """Expert choice (2202.09368); not causal, in evaluation neither.

  Attributes:
    k: experts per token, on average.
  """

  k: int

  def decide(self, x, train, mask, ids):
    return gating.expert_choice(self.logits(x), self.k, mask)


class Hash(Router):
  """Hash layer (2106.04426): by token id, without parameters.

  Attributes:
    k: experts per token.
  """

  k: int

  def decide(self, x, train, mask, ids):
    if ids is None:
      raise ValueError(
        f"the hash router spreads token ids over {self.num_experts} experts,"
        " but got no ids; pass ids=, one per token, or choose another router"
        " (a mixture within a group or an expert is given none)."
      )
    return gating.hash_ids(ids, self.num_experts, self.k, mask)


class Sigmoid(Router):
  """Balance without a loss (2408.15664), as in DeepSeek-V3 (2412.19437).

  The parameter "bias" starts at zero and learns by `losses.bias` alone.

  Attributes:
    k: experts per token.
  """

  k: int

  def decide(self, x, train, mask, ids):
    return gating.sigmoid(
      self.logits(x), self.vector("bias", 0.0), self.k, mask
    )


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


ROUTERS = {
  "softmax": Softmax,
  "top_k": TopK,
  "noisy_top_k": NoisyTopK,
  "balanced": Balanced,
  "switch": Switch,
  "gshard_top_2": GShardTop2,
  "expert_choice": ExpertChoice,
  "hash": Hash,
  "sigmoid": Sigmoid,
}
