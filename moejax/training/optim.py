"""The paper's optimizers, Adam and one with little memory for experts; Muon.

All follow a schedule that rises, holds, and falls as 1/sqrt, but for moving
averages, which no schedule concerns. Experts, routers and the rest are groups
of parameters, each with its own rate and decay.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Int

from moejax import sharding
from moejax.config_fields import Range
from moejax.router import AVERAGES

Schedule = optax.Schedule
Update = optax.GradientTransformation


class Group(NamedTuple):
  """How a group of parameters is trained.

  Attributes:
    rate: what its learning rate is multiplied by. An expert sees a share k / E
      of the tokens; a rate of its own is how to answer that (1, as in the
      paper, answers nothing).
    weight_decay: of its matrices, decoupled (1711.05101): a step takes away
      learning rate * rate * weight_decay of each.
  """

  rate: Annotated[float, Range(0)] = 1.0
  weight_decay: Annotated[float, Range(0)] = 0.0


# The groups by name, and the scopes below which their parameters lie. A dense
# layer that is a mixture's only expert is of the experts, too.
GROUPS: Mapping[str, tuple[str, ...]] = {
  "experts": ("experts",),
  "router": ("router", "primary"),
  "rest": (),
}


def group_of(path: Sequence[Any]) -> str:
  """Names the group of a parameter, by its path in a tree of them.

  Not by its logical axes: a single expert has no axis "expert", the routers
  within groups of experts do, and a user's own module may have none at all.
  """
  fields = {*_names(path)}
  return next((n for n, scopes in GROUPS.items() if {*scopes} & fields), "rest")


def warmup_rsqrt(
  peak: float, warmup_steps: int, hold_steps: int = 0
) -> Schedule:
  r"""Linear for w steps, constant for h, then 1/sqrt; continuous (app. C, E).

  .. math:: lr(t) = peak \cdot \min(t / w,\; 1,\; \sqrt{(w + h) / t})

  with t = count + 1, so that the first update (count 0) is not wasted. See
  docs/decisions.md, 14.

  Args:
    peak: the largest learning rate.
    warmup_steps: w, at least 1; 1000 for the paper's language models.
    hold_steps: h; 0 for the language models, 8000 for translation.

  Raises:
    ValueError: no positive peak, no warm-up step, or a negative hold.
  """
  if not 0 < peak < math.inf:
    raise ValueError(f"peak = {peak}; choose a learning rate above 0.")
  if warmup_steps < 1 or hold_steps < 0:
    raise ValueError(
      f"warmup_steps = {warmup_steps} and hold_steps = {hold_steps}; choose"
      " at least 1 and at least 0."
    )

  def schedule(count):
    t = jnp.asarray(count, jnp.float32) + 1
    decay = math.sqrt(warmup_steps + hold_steps) / jnp.sqrt(t)
    return peak * jnp.minimum(jnp.minimum(t / warmup_steps, 1), decay)

  return schedule


def adam(
  schedule: Schedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float | None = None,
  groups: Mapping[str, Group] = {},
) -> Update:
  """Adam, after clipping the whole gradient's norm if `clip_norm` is given.

  Without a first moment where b1 is 0: it would be the gradient (app. D).

  The norm is over the logical arrays, wherever their parts lie: experts and
  dense layers are clipped alike on every mesh. The groups are those of `GROUPS`
  that have a rate or a decay of their own.
  """
  scale = optax.scale_by_adam(b1, b2, eps) if b1 else _scale_by_rms(b2, eps)
  return _finish(scale, schedule, b1, b2, eps, clip_norm, groups)


def factored_adam(
  schedule: Schedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float | None = None,
  groups: Mapping[str, Group] = {},
) -> Update:
  r"""Adam that keeps next to nothing of experts (app. D).

  Experts have no first moment (their b1 is 0), and of the second moment of a
  matrix only the means over each row, R, and over each column, C, are kept:

  .. math:: V_{ij} = R_i C_j / mean(R)

  which has the means that it was made of. Each expert's matrices are factored
  by themselves; its biases keep a second moment of their own. All are corrected
  for their start at zero, as in Adam, which updates everything else.

  See docs/decisions.md, 38, 39.

  Args:
    schedule: the learning rate.
    b1: decay of the first moment outside the experts.
    b2: decay of the second moment, or of R and C.
    eps: added to its root.
    clip_norm: as for `adam`.
    groups: as for `adam`.
  """

  def rule(path, w):
    if group_of(path) != "experts":
      return "adam"
    return "factored" if _is_matrix(path, w) else "unfactored"

  scale = _by_rule(
    rule,
    adam=optax.scale_by_adam(b1, b2, eps),
    factored=_scale_by_factors(b2, eps),
    unfactored=_scale_by_rms(b2, eps),
  )
  return _finish(scale, schedule, b1, b2, eps, clip_norm, groups)


def muon(
  schedule: Schedule,
  momentum: float = 0.95,
  scale: float = 0.2,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float | None = None,
  groups: Mapping[str, Group] = {},
) -> Update:
  r"""Muon for the matrices of layers, Adam for everything else.

  The step of a matrix [I, O] is its momentum, made orthogonal by five steps of
  Newton and Schulz (`optax.contrib.scale_by_muon`), times

  .. math:: scale \sqrt{\max(I, O)}

  so that its entries have the root mean square `scale`, with 0.2 about that of
  Adam's, and both follow one schedule (2502.16982, eq. 4). Each expert's matrix
  is one by itself: whatever part of the text an expert sees, its step is as
  large as the others'. One that no token visits has no gradient and stays as it
  is: of its fading momentum would come a step as large as any. Tables of words,
  routers, and what is no matrix have Adam.

  Args:
    schedule: the learning rate.
    momentum: decay of the gradients' average, of which the next is a part.
    scale: root mean square of a matrix's step, over the learning rate.
    b1: as for `adam`.
    b2: as for `adam`.
    eps: as for `adam`.
    clip_norm: as for `adam`.
    groups: as for `adam`.
  """
  if not (momentum >= 0 and np.float32(momentum) < 1 and scale > 0):
    raise ValueError(
      f"config.optimizer.momentum is {momentum} and config.optimizer.scale"
      f" {scale}; give at least 0 and less than 1, and more than 0."
    )

  def rule(path, w):
    *scopes, name = _names(path)
    # Also the routers of mixtures that are experts themselves.
    of_router = not {*GROUPS["router"]}.isdisjoint(scopes)
    of_layers = name == "kernel" or name.startswith("w")
    is_one = of_layers and not of_router and _is_matrix(path, w)
    return "muon" if is_one else "adam"

  def last_two(updates):
    return jax.tree.map(
      lambda w: optax.contrib.MuonDimensionNumbers(w.ndim - 2, w.ndim - 1),
      updates,
    )

  orthogonal = optax.contrib.scale_by_muon(
    beta=momentum, weight_dimension_numbers=last_two
  )

  def update(gradients, state, params=None):
    updates, state = orthogonal.update(gradients, state, params)

    def as_large_as_adams(u, g):
      is_visited = jnp.any(g != 0, (-2, -1), keepdims=True).astype(u.dtype)
      return scale * math.sqrt(max(u.shape[-2:])) * is_visited * u

    return jax.tree.map(as_large_as_adams, updates, gradients), state

  both = _by_rule(
    rule,
    muon=optax.GradientTransformation(orthogonal.init, update),
    adam=optax.scale_by_adam(b1, b2, eps),
  )
  return _finish(both, schedule, b1, b2, eps, clip_norm, groups)


def _by_rule(
  rule: Callable[[Sequence[Any], Any], str], **rules: Update
) -> Update:
  """Updates each parameter as the rule that `rule(path, parameter)` names."""
  return optax.partition(
    rules, lambda params: jax.tree.map_with_path(rule, sharding.unbox(params))
  )


def with_averages(tx: Update) -> optax.GradientTransformationExtraArgs:
  """Lets moving averages of routers be such, whatever the optimizer.

  Parameters named as `router.AVERAGES` descend at rate 1, so that the weight of
  `losses.quantile` is the rate of the average. `tx` updates all others, as if
  the gradients of these were zero: no schedule, moment or weight decay acts on
  them, and they count in no norm that is clipped. The optimizers of this
  module are wrapped so. The state is that of `tx`.

  Put it around all else, clipping too, which would shorten the averages' steps;
  but `optax.MultiSteps` around it, or averages move every time.
  """
  tx = optax.with_extra_args_support(tx)

  def is_average(path):
    return not AVERAGES.isdisjoint(_names(path))

  def update(gradients, state, params=None, **extra):
    others = jax.tree.map_with_path(
      lambda path, g: jnp.zeros_like(g) if is_average(path) else g, gradients
    )
    updates, state = tx.update(others, state, params, **extra)
    updates = jax.tree.map_with_path(
      lambda path, u, g: -g if is_average(path) else u, updates, gradients
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _scale_by_rms(b2: float, eps: float) -> Update:
  """Adam's with b1 = 0."""
  return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)


def _is_matrix(path: Sequence[Any], w: Any) -> bool:
  """Tells matrices: what is stacked has an axis in front for each stack.

  Experts are, groups of them, and the layers of `nn.scan`.
  """
  stacks = ("experts", "secondary", "layers")
  return w.ndim - sum(name in stacks for name in _names(path)) >= 2


def _names(path: Sequence[Any]) -> list[str]:
  return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


_TINY = float(jnp.finfo(jnp.float32).tiny)


def _finish(scale, schedule, b1, b2, eps, clip_norm, groups):
  """Checks the numbers; puts clipping before, the learning rate behind."""
  # A decay is less than 1 as a float32, too. Without eps, what has had no
  # gradient yet would be 0 / 0.
  decay = "0 or more, and less than 1"
  norm = "more than 0, or None to clip nothing"
  for name, value, is_good, advice in (
    ("b1", b1, b1 >= 0 and np.float32(b1) < 1, decay),
    ("b2", b2, b2 >= 0 and np.float32(b2) < 1, decay),
    ("eps", eps, _TINY <= eps < math.inf, "more than 0, such as 1e-8"),
    ("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, norm),
  ):
    if not is_good:
      raise ValueError(f"config.optimizer.{name} is {value}; give {advice}.")
  for name, group in groups.items():
    if name not in GROUPS or min(group) < 0 or not max(group) < math.inf:
      raise ValueError(
        f"config.optimizer.groups has {name} = {group}; give groups of"
        f" {', '.join(GROUPS)} rates and decays of 0 or more."
      )
  # Where no group differs its state has no part in the optimizer's.
  if any(group != Group() for group in groups.values()):
    scale = optax.chain(scale, _scale_groups(groups))
  rule = optax.chain(scale, optax.scale_by_learning_rate(schedule))
  if clip_norm is not None:
    rule = optax.chain(optax.clip_by_global_norm(clip_norm), rule)
  return with_averages(rule)


def _scale_groups(groups: Mapping[str, Group]) -> Update:
  """Gives groups of parameters their rates and decays."""

  def init(params):
    paths = [
      path for path, _ in jax.tree.leaves_with_path(sharding.unbox(params))
    ]
    there = {group_of(path) for path in paths}
    for name in groups:
      if name not in there:
        raise ValueError(
          f"config.optimizer.groups names {name}, but no parameter of the model"
          f" is one; there are {', '.join(sorted(there))}."
        )
    return optax.EmptyState()

  def update(updates, state, params):
    def one(path, u, w):
      group = groups.get(group_of(path), Group())
      decay = group.weight_decay * _is_matrix(path, w)
      return group.rate * (u + decay * w)

    return jax.tree.map_with_path(one, updates, params), state

  return optax.GradientTransformation(init, update)


class FactoredState(NamedTuple):
  """Second moments of matrices [..., I, O], by their means."""

  count: Int[Array, ""]  # Updates so far.
  rows: Any  # R [..., I] of each matrix.
  columns: Any  # C [..., O] of each.


def _scale_by_factors(b2: float, eps: float) -> Update:
  """Divides by the root of a second moment that is factored.

  optax's `scale_by_factored_rms` would factor the two largest axes, of which
  the experts may be one, knows no constant decay with a correction for the
  start, and gives its state no names of axes.
  """

  def means(tree, axis):
    """Means over an axis from behind; the others keep their logical names."""

    def is_boxed(leaf):
      return isinstance(leaf, nn.LogicallyPartitioned)

    def mean(leaf):
      if not is_boxed(leaf):
        return leaf.mean(axis)
      names = leaf.names[:axis] + leaf.names[axis:][1:]
      return leaf.replace(value=leaf.value.mean(axis), names=names)

    return jax.tree.map(mean, tree, is_leaf=is_boxed)

  def init(params):
    zeros = optax.tree.zeros_like((means(params, -1), means(params, -2)))
    return FactoredState(jnp.zeros((), jnp.int32), *zeros)

  def update(gradients, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    squares = jax.tree.map(jnp.square, gradients)
    now = means(squares, -1), means(squares, -2)
    kept = optax.tree.update_moment(now, (state.rows, state.columns), b2, 1)

    def scale(gradient, row, column):
      # Zero for an expert that no token has visited yet.
      mean = jnp.maximum(row.mean(-1, keepdims=True), _TINY)
      second = (row / mean)[..., None] * column[..., None, :]
      return gradient / (jnp.sqrt(second) + eps)

    corrected = optax.tree.bias_correction(kept, b2, count)
    scaled = jax.tree.map(scale, gradients, *corrected)
    return scaled, FactoredState(count, *kept)

  return optax.GradientTransformation(init, update)
