"""The layer: group, route, dispatch, and report what was decided."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax import dispatch as dispatch_lib
from moejax import sharding

# The collection in which every MoE layer leaves its Routing.
ROUTING = "routing"


class MoE(nn.Module):
  """Sparsely-gated mixture of experts, y = sum_e G(x)_e E_e(x) (eq. 1).

  All B*L tokens are routed at once (the layer is convolutional over time, sec.
  3.1), in groups of `group_size` consecutive tokens whose capacity is their
  own. The layer leaves its `Routing` in the collection "routing"; what it
  should cost is the trainer's affair (`losses.auxiliary`).

  Attributes:
    router: x [G S D] -> Routing.
    experts: declares the experts' weights and runs them.
    group_size: S; None takes all tokens as one group. It must not depend on
      the mesh, or results would; the number of groups must divide over the
      devices that share the batch.
    capacity_factor: slots over the mean load in training; None drops nothing.
    eval_capacity_factor: the same in evaluation.
    dispatch: how rows travel, a name in `dispatch.DISPATCH`.
  """

  router: nn.Module
  experts: nn.Module
  group_size: int | None = None
  capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  dispatch: str = "gather"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    train: bool = False,
    mask: Bool[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Mixes; a token whose every edge was dropped, or padding, gives zero.

    Args:
      x: activations.
      train: whether to draw noise and use the training capacity.
      mask: real tokens; all of them by default.

    Raises:
      ValueError: sizes that do not divide, or experts that do not match.
    """
    num_experts = self._check(x, mask)
    group_size = self.group_size or x.shape[0] * x.shape[1]
    if mask is not None:
      # Whatever stands in padding, NaN included, must not reach a product.
      x = jnp.where(mask[..., None], x, 0)
    grouped = x.reshape(-1, group_size, x.shape[-1])
    grouped = sharding.constrain(grouped, "group", None, None)
    if mask is not None:
      mask = mask.reshape(-1, group_size)
    routing = self.router(grouped, train=train, mask=mask)
    slots = dispatch_lib.capacity(
      routing.assignment.expert.shape[1],
      group_size,
      num_experts,
      self.capacity_factor if train else self.eval_capacity_factor,
    )
    dropped = jnp.maximum(routing.count - slots, 0)
    # What init leaves behind would be counted a second time by apply.
    if not self.is_initializing():
      self.sow(ROUTING, "routing", routing._replace(dropped=dropped))
    y = dispatch_lib.DISPATCH[self.dispatch](
      self.experts.run,
      self.experts(x.shape[-1]),
      grouped,
      routing.assignment,
      num_experts,
      slots,
    )
    return y.reshape(*x.shape[:2], -1)

  def _check(
    self, x: Float[Array, "B L D"], mask: Bool[Array, "..."] | None
  ) -> int:
    tokens = x.shape[0] * x.shape[1]
    num_experts = self.router.num_experts
    if self.experts.num_experts != num_experts:
      raise ValueError(
        f"the router chooses among {num_experts} experts, but there are"
        f" {self.experts.num_experts}; give both the same num_experts."
      )
    size = self.group_size
    if size is not None and (size < 1 or tokens % size):
      raise ValueError(
        f"group size {size} does not divide the {tokens} tokens of a batch"
        " (rows times row length); choose one that does."
      )
    if mask is not None and mask.shape != x.shape[:2]:
      raise ValueError(
        f"the mask is {mask.shape}, but the tokens are {x.shape[:2]}; give one"
        " entry per token."
      )
    if self.dispatch not in dispatch_lib.DISPATCH:
      raise ValueError(
        f"unknown dispatch {self.dispatch!r}; choose one of"
        f" {', '.join(dispatch_lib.DISPATCH)}."
      )
    return num_experts


class OneExpert(nn.Module):
  """A mixture of one: the paper's MoE-1-Wide (app. C.1).

  The gate of a lone expert is 1, so there is none, and no balance to lose.
  """

  experts: nn.Module

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    train: bool = False,
    mask: Bool[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Applies the expert to every token; padding gives zero, as in MoE."""
    del train
    rows = x.reshape(1, -1, x.shape[-1])
    y = self.experts.run(self.experts(x.shape[-1]), rows).reshape(x.shape)
    return y if mask is None else jnp.where(mask[..., None], y, 0)
