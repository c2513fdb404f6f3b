"""Experts: modules that declare weights, and functions of them.

A module's `__call__(width)` returns its weights, with axis E in front on every
leaf; `run(weights, rows, ...)` maps each expert's rows. The two are apart so
that a dispatcher can carry the rows, and a mesh the weights, wherever they
need be. Rows come in one of two forms:

  rows [E, N, D] in slots       mask [E, N]: which slots are taken
  rows [N, D] sorted by expert  group_sizes [E]: how many rows each expert has
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax import sharding
from moejax.grouped import grouped, grouped_dot

Weights = Mapping[str, Any]


def own(
  layer: nn.Module, module: Any, name: str, fits: bool, wanted: str
) -> Any:
  """Returns a module that a layer was given, as the layer's own.

  A module that is made within `nn.compact` or `setup` belongs to the module
  around; its weights are to lie in the scope of the layer. ValueError, with
  what is wanted in place of the attribute `name`, where it is no module or does
  not fit.
  """
  if not isinstance(module, nn.Module) or not fits:
    shown = f"of type {type(module).__name__}"
    if isinstance(module, type):
      shown = f"the class {module.__name__}"
    elif isinstance(module, bool | int | float | str | None):
      shown = repr(module)
    raise ValueError(f"{name} is {shown}; give {wanted}.")
  parent = module.parent
  # A layer that flax clones has it already, by itself or by a scope.
  cloned = isinstance(parent, type(layer)) or isinstance(layer, type(parent))
  if isinstance(parent, nn.Module) and not cloned:
    return module.copy(parent=None)
  return module


def own_experts(layer: nn.Module, module: Any, name: str) -> Any:
  """Returns experts that a layer was given, as `own`."""
  wanted = (
    "a module of moejax.experts, as FeedForward(num_experts=8, hidden=64), or"
    " Each(num_experts=8, expert=M) of any linen module M"
  )
  return own(layer, module, name, hasattr(module, "run"), wanted)


def own_shared(layer: nn.Module, module: Any) -> Any:
  """Returns experts that every token visits, as one that computes their sum.

  Of n feed-forward experts of one hidden layer of width F that is one of width
  n F, whose products are larger. ValueError where there is no such one.
  """
  module = own_experts(layer, module, "shared")
  number = module.num_experts
  if number > 1 and isinstance(module, FeedForward) and len(module.widths) == 1:
    return module.clone(num_experts=1, hidden=number * module.widths[0])
  if number != 1:
    raise ValueError(
      f"shared is {number} experts of {type(module).__name__}, but only"
      " FeedForward with one hidden layer becomes one of all their widths; give"
      " such, or num_experts=1."
    )
  return module


def expert_dot(
  rows: Float[Array, "E N I"], matrices: Float[Array, "E I O"]
) -> Float[Array, "E N O"]:
  """Multiplies each expert's rows by that expert's matrix."""
  return jnp.einsum("ENI,EIO->ENO", rows, matrices.astype(rows.dtype))


class Experts(nn.Module):
  """What all experts share: `__call__` and `run` are each one's own."""

  @nn.nowrap
  def matrix(
    self,
    name: str,
    shape: tuple[int, int],
    *axes: str | None,
    scale: float = 1.0,
  ) -> Float[Array, "E I O"]:
    """Declares a matrix of every expert, with the logical axes of its sides.

    Its entries have at first the variance scale / I, so that an output has that
    of the input times `scale`.
    """
    E = self.num_experts
    # The expert axis is no fan.
    init = nn.initializers.variance_scaling(
      scale, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
    )
    init = sharding.with_axes(init, sharding.expert_axis(E), *axes)
    return self.param(name, init, (E, *shape), jnp.float32)

  def __call__(self, width: int) -> Weights:
    """Declares the weights of E experts of rows [N, D = width]."""
    raise NotImplementedError

  def run(
    self,
    weights: Weights,
    rows: Float[Array, "*E N D"],
    mask: Bool[Array, "E N"] | None = None,
    train: bool = False,
    *,
    group_sizes: Int[Array, "E"] | None = None,
  ) -> Float[Array, "*E N O"]:
    """Maps each expert's rows, in slots or sorted."""
    raise NotImplementedError


def drops_out(experts: nn.Module) -> bool:
  """Whether a layer leaves out weights of these experts in training.

  A user's own may have a field `dropout` that it sees to itself.
  """
  return hasattr(experts, "drop_out") and bool(experts.dropout)


class FeedForward(Experts):
  """relu(x W_in) W_out, without biases: the paper's experts (sec. 4.1).

  With more hidden layers, relu(relu(x W_in) W_1) ... W_out (MoE-1-Deep); gated,
  the first is act(x W_in) * (x W_gate) (2002.05202).

  Attributes:
    num_experts: E.
    hidden: width F of the hidden layer, or of each in turn.
    activation: after every product but the last; a function.
    gated: whether the first hidden layer is multiplied by a second product.
    init_scale: variance of a product's output at first, over that of its
      input; 0.1 in 2101.03961 (sec. 2.4) keeps large models stable.
    dropout: chance, in training, of leaving a unit of an expert's last hidden
      layer out of a step; what is left counts 1 / (1 - dropout) times. All rows
      of a step share the draw, so that neither their order nor the devices
      change it (each row has its own in 2101.03961, sec. 2.4, with 0.4).
  """

  num_experts: int
  hidden: int | Sequence[int]
  activation: Callable[[Array], Array] = nn.relu
  gated: bool = False
  init_scale: float = 1.0
  dropout: float = 0.0

  @property
  def widths(self) -> tuple[int, ...]:
    """Of the hidden layers in turn."""
    hidden = self.hidden
    return tuple(np.atleast_1d(hidden).tolist())

  @nn.compact
  def __call__(self, width):
    F = self.widths
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"dropout of experts is {self.dropout}, but it is a chance; give at"
        " least 0 and less than 1."
      )
    if not self.init_scale > 0:
      raise ValueError(
        f"init_scale is {self.init_scale}, but it is the variance of an output;"
        " give more than 0."
      )
    matrix = functools.partial(self.matrix, scale=self.init_scale)
    first = ("w_in", "w_gate") if self.gated else ("w_in",)
    weights = {n: matrix(n, (width, F[0]), "embed", "mlp") for n in first}
    for i, shape in enumerate(itertools.pairwise(F), 1):
      # Only one side of a square can lie over the model axis.
      weights[f"w_{i}"] = matrix(f"w_{i}", shape, None, "mlp")
    weights["w_out"] = matrix("w_out", (F[-1], width), "mlp", "embed")
    return weights

  @nn.nowrap
  def drop_out(self, weights: Weights, rng: PRNGKeyArray) -> Weights:
    """Returns weights that use the hidden units which one draw leaves."""
    w_out, keep = weights["w_out"], 1 - self.dropout
    kept = jax.random.bernoulli(rng, keep, w_out.shape[:2])
    scale = sharding.constrain(
      jnp.where(kept, 1 / keep, 0.0),
      sharding.expert_axis(w_out.shape[0]),
      "mlp",
    )
    return {**weights, "w_out": w_out * scale[..., None]}

  @nn.nowrap
  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    def layers(weights, rows, dot):
      h = self.activation(dot(rows, weights["w_in"]))
      if self.gated:
        h = h * dot(rows, weights["w_gate"])
      for i in range(1, len(self.widths)):
        h = self.activation(dot(h, weights[f"w_{i}"]))
      return dot(h, weights["w_out"])

    if rows.ndim == 2:
      return grouped(layers, weights, rows, group_sizes)
    return layers(weights, rows, expert_dot)


class Linear(Experts):
  """x W: the experts of the paper's earlier draft (512 x 512 maps).

  Attributes:
    num_experts: E.
    out: entries of the output; None makes as many as there are of x.
  """

  num_experts: int
  out: int | None = None

  @nn.compact
  def __call__(self, width):
    shape = (width, self.out or width)
    return {"w": self.matrix("w", shape, "embed", None)}

  @nn.nowrap
  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    if rows.ndim == 2:
      return grouped_dot(rows, weights["w"], group_sizes)
    return expert_dot(rows, weights["w"])


class Identity(Experts):
  """x: a connection around the layer, weighed by the gate. Costs nothing."""

  num_experts: int

  @nn.compact
  def __call__(self, width):
    return {}

  @nn.nowrap
  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    return rows


class Each(Experts):
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
    wanted = "a linen module, such as nn.Dense(64)"
    self.expert = own(self, self.expert, "expert", True, wanted)
    super().__post_init__()

  @nn.compact
  def __call__(self, width):
    return {}

  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    """Runs within the layer's scope: it is there that the weights live."""
    if rows.ndim == 2:
      raise ValueError(
        f"the {self.num_experts} experts of {type(self.expert).__name__} need"
        " slots, which ragged dispatch does not have; choose gather or einsum."
      )
    accepts = inspect.signature(type(self.expert).__call__).parameters

    def one(expert, rows, taken):
      given = {"train": train}
      # What Flax calls it, unless the module has it as a field.
      if getattr(expert, "deterministic", None) is None:
        given["deterministic"] = not train
      if mask is not None:
        given["mask"] = taken
      given = {name: v for name, v in given.items() if name in accepts}
      # Behind self and the rows; `nn.remat` and `nn.jit` know it by its place.
      first = [given.pop(n) for n in [*accepts][2:3] if n in given]
      return expert(rows, *first, **given)

    taken = jnp.ones(rows.shape[:2], bool) if mask is None else mask
    over = sharding.over_experts(one, self.num_experts)
    return over(self.expert, rows, taken)


class Mixed(Experts):
  """Experts of different architecture in one layer, numbered kind by kind.

  All have the same number of slots.

  Attributes:
    kinds: modules of this file, each with its own num_experts.
  """

  kinds: Sequence[nn.Module]

  def __post_init__(self) -> None:
    self.kinds = tuple(
      own_experts(self, kind, f"kinds[{i}]")
      for i, kind in enumerate(self.kinds)
    )
    super().__post_init__()

  @property
  def num_experts(self) -> int:
    """E of all kinds together."""
    return sum(kind.num_experts for kind in self.kinds)

  @property
  def dropout(self) -> float:
    """The largest of any kind."""
    return max(kind.dropout if drops_out(kind) else 0.0 for kind in self.kinds)

  @nn.nowrap
  def drop_out(self, weights: Weights, rng: PRNGKeyArray) -> Weights:
    """Leaves out hidden units of the kinds that do."""
    return {
      str(i): kind.drop_out(weights[str(i)], jax.random.fold_in(rng, i))
      if drops_out(kind)
      else weights[str(i)]
      for i, kind in enumerate(self.kinds)
    }

  @nn.compact
  def __call__(self, width):
    return {str(i): kind(width) for i, kind in enumerate(self.kinds)}

  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    """Runs each kind on its rows; slots may be a tuple, those of each kind."""
    numbers = itertools.accumulate(kind.num_experts for kind in self.kinds)
    ends = list(numbers)[:-1]
    if isinstance(rows, tuple):
      mask = (None,) * len(rows) if mask is None else mask
      return tuple(
        kind.run(weights[str(i)], rows[i], mask[i], train)
        for i, kind in enumerate(self.kinds)
      )
    if rows.ndim == 3:
      parts = tuple(jnp.split(rows, ends))
      mask = None if mask is None else tuple(jnp.split(mask, ends))
      return jnp.concatenate(self.run(weights, parts, mask, train))
    out, start = jnp.zeros_like(rows), jnp.int32(0)
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    of_kinds = zip(self.kinds, jnp.split(group_sizes, ends), strict=True)
    for i, (kind, sizes) in enumerate(of_kinds):
      end = start + sizes.sum()
      mine = ((index >= start) & (index < end))[:, None]
      # A kind's rows must come first and all others be zero.
      ahead = jnp.roll(jnp.where(mine, rows, 0), -start, axis=0)
      y = kind.run(weights[str(i)], ahead, None, train, group_sizes=sizes)
      out = jnp.where(mine, jnp.roll(y, start, 0), out)
      start = end
    return out


EXPERTS = {
  "feed_forward": FeedForward,
  "linear": Linear,
  "identity": Identity,
  "each": Each,
  "mixed": Mixed,
}
