"""Experts: modules that declare weights, and functions of them.

A module's `__call__(width)` returns its weights, with axis E in front on every
leaf; `run(weights, rows, real)` maps each expert's rows. The two are apart so
that a dispatcher can carry the rows, and a mesh the weights, wherever they
need be. Rows come in one of two forms:

  rows [E, N, D] in slots       real [E, N]: which slots are taken
  rows [N, D] sorted by expert  real [E]: how many rows each expert has
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax import named, sharding
from moejax.grouped import grouped, grouped_dot

Weights = Mapping[str, Any]
Rows = Float[Array, "*E N D"]
# One of each kind of experts, whose numbers and slots may differ.
RowsOfKinds = tuple[Float[Array, "_ _ D"], ...]
Real = Bool[Array, "E N"] | Int[Array, "E"] | None

# Fan-in scaling of each expert's own matrix: the expert axis is no fan.
_INIT = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)


def _partitioned(
  num_experts: int, *axes: str | None
) -> nn.initializers.Initializer:
  expert = sharding.expert_axis(num_experts)
  return sharding.with_axes(_INIT, expert, *axes)


def check(experts: Any, name: str) -> None:
  """Lets nothing pass that does not run experts.

  Raises:
    ValueError: says what is wanted.
  """
  if not isinstance(experts, nn.Module) or not hasattr(experts, "run"):
    raise ValueError(
      f"{name} is {named.shown(experts)}; give a module of moejax.experts, as"
      " FeedForward(num_experts=8, hidden=64), or Each(num_experts=8, expert=M)"
      " of any linen module M."
    )


def expert_dot(
  rows: Float[Array, "*E N I"],
  matrices: Float[Array, "experts I O"],
  real: Real = None,
) -> Float[Array, "*E N O"]:
  """Multiplies each expert's rows by that expert's matrix."""
  if rows.ndim == 2:
    return grouped_dot(rows, matrices, real)
  return jnp.einsum("ENI,EIO->ENO", rows, matrices.astype(rows.dtype))


class FeedForward(nn.Module):
  """relu(x W_in) W_out, without biases: the paper's experts (sec. 4.1).

  With more hidden layers, relu(relu(x W_in) W_1) ... W_out (MoE-1-Deep); gated,
  the first is act(x W_in) * (x W_gate) (2002.05202).

  Attributes:
    num_experts: E.
    hidden: width F of the hidden layer, or of each in turn.
    activation: after every product but the last; a function.
    gated: whether the first hidden layer is multiplied by a second product.
  """

  num_experts: int
  hidden: int | Sequence[int]
  activation: Callable[[Array], Array] = nn.relu
  gated: bool = False

  @property
  def widths(self) -> tuple[int, ...]:
    """Of the hidden layers in turn."""
    hidden = self.hidden
    return (hidden,) if isinstance(hidden, int) else tuple(hidden)

  @nn.compact
  def __call__(self, width: int) -> Weights:
    E = self.num_experts
    inner = self.widths

    def matrix(name, shape, *axes):
      init = _partitioned(E, *axes)
      return self.param(name, init, (E, *shape), jnp.float32)

    weights = {"w_in": matrix("w_in", (width, inner[0]), "embed", "mlp")}
    if self.gated:
      weights["w_gate"] = matrix("w_gate", (width, inner[0]), "embed", "mlp")
    for i in range(1, len(inner)):
      # Only one side of a square can lie over the model axis.
      shape = (inner[i - 1], inner[i])
      weights[f"w_{i}"] = matrix(f"w_{i}", shape, None, "mlp")
    weights["w_out"] = matrix("w_out", (inner[-1], width), "mlp", "embed")
    return weights

  @nn.nowrap
  def run(
    self, weights: Weights, rows: Rows, real: Real = None, train: bool = False
  ) -> Rows:
    del train
    depth = len(self.widths)

    def layers(weights, rows, dot):
      h = self.activation(dot(rows, weights["w_in"]))
      if self.gated:
        h = h * dot(rows, weights["w_gate"])
      for i in range(1, depth):
        h = self.activation(dot(h, weights[f"w_{i}"]))
      return dot(h, weights["w_out"])

    if rows.ndim == 2:
      return grouped(layers, weights, rows, real)
    return layers(weights, rows, expert_dot)


class Linear(nn.Module):
  """x W: the experts of the paper's earlier draft (512 x 512 maps)."""

  num_experts: int

  @nn.compact
  def __call__(self, width: int) -> Weights:
    init = _partitioned(self.num_experts, "embed", None)
    shape = (self.num_experts, width, width)
    return {"w": self.param("w", init, shape, jnp.float32)}

  @nn.nowrap
  def run(
    self, weights: Weights, rows: Rows, real: Real = None, train: bool = False
  ) -> Rows:
    del train
    return expert_dot(rows, weights["w"], real)


class Identity(nn.Module):
  """x: a way round the layer, weighed by the gate. Costs nothing."""

  num_experts: int

  @nn.compact
  def __call__(self, width: int) -> Weights:
    del width
    return {}

  @nn.nowrap
  def run(
    self, weights: Weights, rows: Rows, real: Real = None, train: bool = False
  ) -> Rows:
    del weights, real, train
    return rows


class Each(nn.Module):
  """E copies of any linen module [N, D] -> [N, D], each with its own weights.

  The module is called as module(rows), with `train` and `mask` (the taken
  slots, [N]) where its `__call__` has arguments of these names; so a whole MoE
  can be an expert. It needs slots: `ragged` cannot run it.

  Attributes:
    num_experts: E.
    expert: the module; its rng streams are split over the experts.
  """

  num_experts: int
  expert: nn.Module

  def __post_init__(self) -> None:
    if not isinstance(self.expert, nn.Module):
      raise ValueError(
        f"expert is {named.shown(self.expert)}; give a linen module, such as"
        " nn.Dense(64)."
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, width: int) -> Weights:
    del width
    return {}

  def run(
    self, weights: Weights, rows: Rows, real: Real = None, train: bool = False
  ) -> Rows:
    """Runs within the layer's scope: it is there that the weights live."""
    del weights
    if rows.ndim == 2:
      raise ValueError(
        f"the {self.num_experts} experts of {type(self.expert).__name__} need"
        " slots, which ragged dispatch does not have; choose gather or einsum."
      )
    accepts = inspect.signature(type(self.expert).__call__).parameters
    options = {"train": train} if "train" in accepts else {}
    masked = "mask" in accepts and real is not None

    def one(expert, rows, taken):
      mask = {"mask": taken} if masked else {}
      return expert(rows, **options, **mask)

    taken = jnp.ones(rows.shape[:2], bool) if real is None else real
    over = sharding.over_experts(one, self.num_experts)
    return over(self.expert, rows, taken)


class Mixed(nn.Module):
  """Experts of different architecture in one layer, numbered kind by kind.

  Attributes:
    kinds: modules of this file, each with its own num_experts.
    capacities: slots of each kind's experts, relative to what the layer gives;
      1 for all by default. A wide expert may so be let see less, or more. Of
      kinds that are mixed themselves only the outermost capacities count.
  """

  kinds: Sequence[nn.Module]
  capacities: Sequence[float] | None = None

  def __post_init__(self) -> None:
    for i, kind in enumerate(self.kinds):
      check(kind, f"kinds[{i}]")
    super().__post_init__()

  @property
  def num_experts(self) -> int:
    """E of all kinds together."""
    return sum(kind.num_experts for kind in self.kinds)

  @nn.compact
  def __call__(self, width: int) -> Weights:
    return {str(i): kind(width) for i, kind in enumerate(self.kinds)}

  def run(
    self,
    weights: Weights,
    rows: Rows | RowsOfKinds,
    real: Any = None,
    train: bool = False,
  ) -> Rows | RowsOfKinds:
    """Runs each kind on its rows; slots may be a tuple, those of each kind."""
    if not isinstance(rows, tuple) and rows.ndim == 3:
      ends = np.cumsum([kind.num_experts for kind in self.kinds])[:-1]
      parts = tuple(jnp.split(rows, ends))
      real = None if real is None else tuple(jnp.split(real, ends))
      return jnp.concatenate(self.run(weights, parts, real, train))
    if isinstance(rows, tuple):
      real = (None,) * len(rows) if real is None else real
      return tuple(
        kind.run(weights[str(i)], rows[i], real[i], train)
        for i, kind in enumerate(self.kinds)
      )
    out, first = jnp.zeros_like(rows), 0
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    start = jnp.int32(0)
    for i, kind in enumerate(self.kinds):
      sizes = real[first : first + kind.num_experts]
      end = start + sizes.sum()
      mine = ((index >= start) & (index < end))[:, None]
      # A kind's rows must come first and all others be zero.
      ahead = jnp.roll(jnp.where(mine, rows, 0), -start, axis=0)
      back = jnp.roll(kind.run(weights[str(i)], ahead, sizes, train), start, 0)
      out = jnp.where(mine, back, out)
      first, start = first + kind.num_experts, end
    return out


EXPERTS = {
  "feed_forward": FeedForward,
  "linear": Linear,
  "identity": Identity,
  "each": Each,
  "mixed": Mixed,
}
