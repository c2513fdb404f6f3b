"""Routers: linen modules that own the gating weights and draw the noise.

Logits are float32 and multiplied at the highest precision whatever the
activations are: a bfloat16 logit moves tokens between experts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax import gating
from moejax.routing import Routing


class _Logits(nn.Module):
  """x W, without bias, in float32."""

  num_experts: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E"]:
    init = nn.with_logical_partitioning(self.kernel_init, ("embed", None))
    kernel = self.param(
      "kernel", init, (x.shape[-1], self.num_experts), jnp.float32
    )
    return jnp.einsum(
      "GSD,DE->GSE",
      x.astype(jnp.float32),
      kernel,
      precision=jax.lax.Precision.HIGHEST,
    )


class Softmax(nn.Module):
  """Dense gating (eq. 2)."""

  num_experts: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "G S D"],
    *,
    train: bool,
    mask: Bool[Array, "G S"] | None = None,
  ) -> Routing:
    del train
    # Every expert gets gradient from zero weights here, so none need break
    # the tie.
    logits = _Logits(self.num_experts, nn.initializers.zeros, name="gate")(x)
    return gating.softmax(logits, mask)


class TopK(nn.Module):
  """Top-k gating without noise (eq. 3 and 5)."""

  num_experts: int
  k: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "G S D"],
    *,
    train: bool,
    mask: Bool[Array, "G S"] | None = None,
  ) -> Routing:
    del train
    # From zeros, without noise, the first k experts would take every token
    # and the rest would never learn.
    init = nn.initializers.lecun_normal()
    logits = _Logits(self.num_experts, init, name="gate")(x)
    return gating.top_k(logits, self.k, mask)


class NoisyTopK(nn.Module):
  """The paper's router (sec. 2.1): noisy top-k in training, top-k otherwise.

  W_g and W_noise start at zero (app. A), so that at first the noise alone
  chooses and load is balanced. It is drawn from the rng stream "router".

  Attributes:
    num_experts: E.
    k: experts per token.
    noise_epsilon: least noise_std, as in the authors' code; 0 is eq. 4 to the
      letter.
  """

  num_experts: int
  k: int
  noise_epsilon: float = 1e-2

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "G S D"],
    *,
    train: bool,
    mask: Bool[Array, "G S"] | None = None,
  ) -> Routing:
    zeros = nn.initializers.zeros
    logits = _Logits(self.num_experts, zeros, name="gate")(x)
    # Read in evaluation too: the parameters must not depend on `train`.
    noise_logits = _Logits(self.num_experts, zeros, name="noise")(x)
    if not train:
      return gating.top_k(logits, self.k, mask)
    return gating.noisy_top_k(
      logits,
      nn.softplus(noise_logits) + self.noise_epsilon,
      self.k,
      self.make_rng("router"),
      mask,
    )


ROUTERS = {"softmax": Softmax, "top_k": TopK, "noisy_top_k": NoisyTopK}
