"""From dense to sparse, and between sparse ones: new runs out of trained ones.

A new expert is a share of old ones (a copy of one, a mean of several), or a
part of its hidden units. Parameters are found by their paths and logical axes,
in a tree where every block of a Transformer lies by itself. What the model
makes of held-out text before and after is measured, never assumed.

All of it is done by one process, in the memory of one device.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from moejax import config as config_lib
from moejax import config_fields, terminal
from moejax import files as files_lib
from moejax import workdir as workdir_lib
from moejax.data import batches as batches_lib
from moejax.data import corpora
from moejax.models.transformer import apart, unscanned
from moejax.moe import MoE
from moejax.training import (
  checkpoint,
  evaluators,
  metrics,
  processes,
  session,
  state,
)
from moejax.training import run as run_lib

MADE_FROM_FILE = "made_from.json"
OPTIMIZERS = ("reset", "carry")
SCORES = ("load", "reap")
# Of log p, over the largest of the text, in float32.
TOLERANCE = 1e-6
# Batches of the validation that before and after are compared on.
_BATCHES = 4
# An array of every parameter, by its path.
Arrays = dict[tuple[str, ...], np.ndarray]


class Made(NamedTuple):
  """What a new expert is made of.

  Attributes:
    of: the old experts.
    shares: of each; they sum to 1.
    part: which of `parts` equal parts of the hidden units it has.
    parts: in how many the old experts are cut; what leaves the hidden layer is
      as many times as large.
  """

  of: tuple[int, ...]
  shares: tuple[float, ...] = (1.0,)
  part: int = 0
  parts: int = 1


class Visits(NamedTuple):
  """What the tokens of a text were to the experts of one mixture.

  Attributes:
    load: tokens that each expert read.
    gates: their gates, summed.
    reap: their gates times the norm of what the expert gave, summed.
    tokens: how many there were.
  """

  load: np.ndarray
  gates: np.ndarray
  reap: np.ndarray
  tokens: np.ndarray


# By the scope of each mixture.
Plan = dict[tuple[str, ...], list[Made]]
Views = dict[tuple[str, ...], Visits]


def upcycle(
  source: files_lib.Path,
  experiment: config_lib.Experiment,
  workdir: files_lib.Path,
  noise: float = 0.0,
  drop: float = 0.0,
  optimizer: str = "reset",
) -> dict[str, Any]:
  """Makes a run with mixtures out of a trained dense one (2212.05055).

  Where the config has E experts of F hidden units for a dense layer of S F,
  there are E / S copies of the S parts of that layer, the parts of a copy next
  to each other. Their columns of the new router are equal, so that a token
  visits all parts of a copy (2410.07524), and W_out is S times as large. With
  gates that sum to 1, k a multiple of S, no noise and no drop the function is
  that of the dense layer.

  Args:
    source: workdir of the dense run, whose best checkpoint is taken.
    experiment: what the new run trains.
    workdir: of the new run.
    noise: standard deviation of what is added to an expert's matrix, over that
      of its entries.
    drop: share of an expert's hidden units that are drawn anew, with mean and
      deviation of what they replace (2502.19261).
    optimizer: "reset" begins at step 0 with moments of zero; "carry" goes on at
      the step of the checkpoint, and copies have the moments of what they are
      copies of. The moments of routers, and of what is drawn anew, are zero.

  Returns:
    What `made_from.json` in the new workdir holds.

  Raises:
    FileNotFoundError: there is no run in the source.
    ValueError: shapes that do not fit, a workdir that is not empty, a source
      without a checkpoint, or another kind of tokens.
  """
  if not 0 <= noise < math.inf or not 0 <= drop <= 1:
    raise ValueError(
      f"noise is {noise} and drop {drop}; give 0 or more, and a share from 0 to"
      " 1."
    )
  config_fields.one_of(optimizer, OPTIMIZERS, "optimizer")
  before = _Opened(source, workdir)
  after = before.to(experiment)
  plan = _plan_of_dense(before, after)
  drawn = np.random.default_rng(experiment.seed)
  why = ["noise"] * (noise > 0) + ["hidden units drawn anew"] * (drop > 0)
  values, fresh = _converted(before.arrays, after, plan), after.arrays
  moments = _Moments(before, after, plan) if optimizer == "carry" else None
  for path in values:
    at = _router_at(path)
    if at and path[:at] in plan:
      # Parts of one copy are to be chosen together.
      made = plan[path[:at]]
      first = [number - each.part for number, each in enumerate(made)]
      values[path] = fresh[path][..., first]
  for scope in plan:
    for path in [path for path in values if _scope(path) == scope]:
      values[path] = array = values[path].copy()
      spread = array.std(tuple(range(1, array.ndim)), keepdims=True)
      if noise:
        array += noise * spread * drawn.standard_normal(array.shape, np.float32)
    if not drop:
      continue
    if not (axes := after.hidden(scope)):
      raise ValueError(
        f"the experts of {_named(scope)} have no hidden layer, or several; drop"
        " draws units of a single one anew: leave it 0."
      )
    # The same units in every matrix of an expert.
    units: list[np.ndarray] = []
    for path, axis in axes.items():
      rows = np.moveaxis(values[path], axis, 1)
      E, F, _ = rows.shape
      units = units or [
        drawn.permutation(F)[: round(drop * F)] for _ in range(E)
      ]
      for row, own in zip(rows, units, strict=True):
        if own.size:
          old = row[own]
          row[own] = drawn.normal(old.mean(), old.std(), old.shape)
      if moments:
        moments.forget(path, axis, units)
  how = {"how": "upcycle", "noise": noise, "drop": drop, "optimizer": optimizer}
  return _finish(before, after, values, plan, workdir, how, why, moments)


def split(
  source: files_lib.Path,
  workdir: files_lib.Path,
  parts: int,
) -> dict[str, Any]:
  """Makes a run whose experts are each cut in parts, of which k times as many.

  Parts of one expert have its column of the router: they are chosen together,
  each with its share of the gate, and W_out is as many times as large. So the
  function stays, but where equal logits of different experts are at the k-th
  place. In training the noise of parts differs.

  Errors as of `upcycle`; ValueError also where the hidden units do not divide,
  or a router has no k that could grow.
  """
  before = _Opened(source, workdir)

  def change(section):
    kind = section["router"]["kind"]
    hidden = section.get("experts", {}).get("hidden")
    if not isinstance(hidden, int) or parts < 2 or hidden % parts:
      raise ValueError(
        f"experts of hidden {hidden} cannot be cut in {parts} parts; give a"
        " number of 2 or more that divides it, of experts with one hidden"
        " layer."
      )
    if "k" not in section["router"] and kind != "softmax" or kind == "hash":
      raise ValueError(
        f"the router {kind!r} cannot send a token to all {parts} parts of an"
        " expert; split one that has a k of its logits, as noisy_top_k."
      )
    if section["router"].get("num_groups", 1) > 1 and kind == "sigmoid":
      raise ValueError(
        "the router 'sigmoid' scores a group of experts by its two best, which"
        " after a split would be parts of one; split experts in one group."
      )
    section["num_experts"] *= parts
    section["experts"]["hidden"] //= parts
    for name in ("k", "max_k"):
      if section["router"].get(name):
        section["router"][name] *= parts

  after = before.to(before.changed(change))
  plan = {
    scope: [
      Made((e,), (1.0,), p, parts) for e in range(E) for p in range(parts)
    ]
    for scope, E in before.mixtures.items()
  }
  values = _converted(before.arrays, after, plan)
  how = {"how": "split", "parts": parts}
  return _finish(before, after, values, plan, workdir, how, [])


def merge(
  source: files_lib.Path,
  workdir: files_lib.Path,
  experts: int,
) -> dict[str, Any]:
  """Makes a run with fewer experts: means of those whose routers are alike.

  The two groups whose columns of the router have the largest cosine become one,
  again and again. Experts, and columns, are weighted by their load on held-out
  text; k stays.

  Errors as of `upcycle`; ValueError also where there are no more experts.
  """
  before = _Opened(source, workdir)
  after = before.to(before.changed(_fewer(experts)))
  views = before.read(after.batches).views
  plan = {}
  for scope, E in before.mixtures.items():
    path = (*scope, "router", "gate", "kernel")
    if path not in before.arrays:
      raise ValueError(
        f"{_named(scope)} has no columns of a router that could be alike; merge"
        " experts of another router, or prune them."
      )
    load = _view(views, scope).load + 1e-9  # Those of no load count alike.
    groups = [[expert] for expert in range(E)]
    columns = list((before.arrays[path] * load).T)
    while len(groups) > experts:
      matrix = np.stack(columns)
      matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
      alike = np.where(np.tri(len(matrix), dtype=bool), -2, matrix @ matrix.T)
      one, other = divmod(int(alike.argmax()), len(matrix))
      groups[one] += groups.pop(other)
      columns[one] = columns[one] + columns.pop(other)
    plan[scope] = [
      Made(tuple(of), tuple((load[of] / load[of].sum()).tolist()))
      for of in map(sorted, sorted(groups, key=min))
    ]
  values = _converted(before.arrays, after, plan)
  how, why = {"how": "merge"}, ["fewer experts, each a mean of several"]
  return _finish(before, after, values, plan, workdir, how, why)


def prune(
  source: files_lib.Path,
  workdir: files_lib.Path,
  experts: int,
  by: str = "load",
) -> dict[str, Any]:
  """Makes a run with the best experts of another, as held-out text shows.

  Args:
    source: workdir of a run with mixtures.
    workdir: of the new run.
    experts: how many each mixture keeps; k stays.
    by: "load", the tokens that visit an expert; or "reap" (2510.13999), over
      these the mean of the gate times the norm of what the expert gives.

  Errors as of `merge`.
  """
  config_fields.one_of(by, SCORES, "by")
  before = _Opened(source, workdir)
  after = before.to(before.changed(_fewer(experts)))
  views = before.read(after.batches, by == "reap").views
  plan, scores = {}, {}
  for scope in before.mixtures:
    seen = _view(views, scope)
    score = seen.load
    if by == "reap":
      score = seen.reap / np.maximum(seen.load, 1)
    scores[_named(scope)] = score.tolist()
    best = np.argsort(-score, kind="stable")[:experts]
    plan[scope] = [Made((expert,)) for expert in sorted(best.tolist())]
  values = _converted(before.arrays, after, plan)
  how, why = {"how": "prune", "by": by, "scores": scores}, ["fewer experts"]
  return _finish(before, after, values, plan, workdir, how, why)


# -- a model, and where its parameters lie ------------------------------------


class _Read(NamedTuple):
  log_p: np.ndarray  # Nats, of every word.
  views: Views

  @property
  def perplexity(self) -> float:
    return evaluators.exp(-float(self.log_p.mean(dtype=np.float64)))


class _Model:
  """A model of an experiment, and its parameters on the host.

  Attributes:
    built: the experiment on devices.
    arrays: parameters by paths, every block by itself.
    axes: logical axes of each.
  """

  def __init__(self, built: session.Session, current: state.TrainState):
    self.built, self.opt_state = built, current.opt_state
    self.step = int(current.step)
    self._alone, self._there, self._here = unscanned(built.model)
    self.arrays = self.apart(flatten_dict(jax.device_get(current.params)))
    boxed = jax.eval_shape(
      lambda batch: self._alone.init(jax.random.key(0), batch, method="loss"),
      built.shapes,
    )
    self.axes = {
      path: getattr(leaf, "names", ())
      for path, leaf in flatten_dict(boxed["params"]).items()
    }
    # How many experts there are in each scope, one in those of dense layers.
    self.experts = {
      scope: len(array)
      for path, array in self.arrays.items()
      if (scope := _scope(path)) is not None
    }
    # Those that choose among them.
    self.mixtures = {s: E for s, E in self.experts.items() if E > 1}
    if two := next((path for path in self.arrays if "secondary" in path), None):
      raise ValueError(
        f"{_named(two[: two.index('secondary')])} is a mixture of two levels,"
        " whose experts cannot be made of others; choose kind 'moe'."
      )

  def hidden(self, scope: tuple[str, ...]) -> dict[tuple[str, ...], int]:
    """Returns the axis of the hidden units in each matrix of an expert.

    Empty where there is no hidden layer, or more than one.
    """
    axes = {p: names for p, names in self.axes.items() if _scope(p) == scope}
    if not all({"mlp", "embed"} <= {*names} for names in axes.values()):
      return {}
    return {path: names.index("mlp") for path, names in axes.items()}

  def apart(self, arrays: Arrays) -> Arrays:
    """Takes stacks of blocks apart; in each path the block's own place."""
    return apart(arrays, self._there, self._here)

  def together(self, arrays: Arrays) -> Arrays:
    """Undoes `apart`."""
    found: dict[tuple[str, ...], Any] = dict(arrays)
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    for (there, at), (here, _) in zip(self._there, self._here, strict=True):
      for path in [p for p in arrays if p[: len(here)] == here]:
        own = (*there, *path[len(here) :])
        array = found.pop(path) if own != path else arrays[path]
        if at is None:
          found[own] = array
        else:
          stacks.setdefault(own, []).append(array)
    return found | {path: np.stack(each) for path, each in stacks.items()}

  def read(
    self,
    batches: Sequence[Mapping[str, np.ndarray]],
    outputs: bool = False,
    arrays: Arrays | None = None,
  ) -> _Read:
    """Reads batches in evaluation, in float32, where experts have room for all.

    Of `outputs` alone is made what `Visits.reap` needs: every expert of every
    token.
    """
    model = self._alone
    # Experts that choose among the tokens of a batch cannot do without.
    with contextlib.suppress(ValueError):
      model = model.for_decoding()
    model = model.clone(dtype="float32")

    @jax.jit
    def run(params, batch):
      layers = {}

      def note(call, args, kwargs, context):
        result, module = call(*args, **kwargs), context.module
        # A recurrent mixture, which has no path, runs step by step.
        is_whole = isinstance(module, MoE) and module.path in self.mixtures
        if is_whole and context.method_name == "__call__":
          about = {name: kwargs.get(name) for name in ("mask", "ids")}
          layers[module.path] = module, args[0], about
        return result

      with nn.intercept_methods(note):
        loss = model.apply({"params": params}, batch, method="loss")
      return -loss, {
        path: _visits(params, path, *layer, outputs)
        for path, layer in layers.items()
      }

    params = jax.tree.map(
      jnp.asarray, unflatten_dict(self.arrays if arrays is None else arrays)
    )
    log_p, views = [], {}
    for batch in batches:
      found, seen = jax.device_get(run(params, batch))
      log_p.append(found[batch["mask"]])
      views = jax.tree.map(np.add, views, seen) if views else seen
    return _Read(np.concatenate(log_p), views)


def _visits(params, path, layer, x, about, outputs):
  """Returns the `Visits` of one batch."""
  for name in path:
    params = params[name]
  router, experts = (
    m.clone(parent=None) for m in (layer.router, layer.experts)
  )
  D, E = x.shape[-1], router.num_experts
  # Experts that choose see the groups that the layer makes.
  size = layer.group_size or x.size // D
  x = x.reshape(-1, size, D)
  mask, ids = (a if a is None else a.reshape(-1, size) for a in about.values())
  decision = router.apply(
    {"params": params.get("router", {})}, x, train=False, mask=mask, ids=ids
  )
  edges = decision.assignment
  token = edges.tokens(size)

  def by_token(token, expert, gate):
    """Gates of one group, [S, E]; unused edges have expert E."""
    return jnp.zeros((size, E)).at[token, expert].add(gate, mode="drop")

  gate = jax.vmap(by_token)(token, edges.expert, edges.gate).reshape(-1, E)
  read = jax.vmap(by_token)(token, edges.expert, jnp.ones_like(edges.gate))
  norms = jnp.zeros_like(gate)
  if outputs:
    rows = jnp.broadcast_to(x.reshape(1, -1, D), (E, len(gate), D))
    y = experts.run(params["experts"], rows)
    norms = jnp.linalg.norm(y, axis=-1).T
  tokens = jnp.asarray(len(gate) if mask is None else mask.sum())
  sums = (a.reshape(-1, E).sum(axis=0) for a in (read, gate, gate * norms))
  return Visits(*sums, tokens)


class _Opened(_Model):
  """The best checkpoint of a run, out of which another is to be made.

  Attributes:
    experiment: what it trains.
    source: its workdir.
  """

  def __init__(self, source: files_lib.Path, workdir: files_lib.Path):
    if processes.several():
      raise ValueError(
        "a run is made out of another by one process; start a single one."
      )
    if files_lib.exists(workdir) and any(workdir.iterdir()):
      raise ValueError(
        f"{workdir} is there already, and not empty; give a new --workdir."
      )
    self.source = source
    self.experiment = run_lib.recall(source)
    data = self.experiment.values["data"]
    if data["kind"] == "text" and not data.get("train"):
      raise ValueError(
        f"the run in {source} was imported without a text, by which both models"
        " are compared; import it again with --config.data.train=FILE."
      )
    vocabulary = self.experiment.own_tokenizer(source)
    built = session.build(self.experiment, len(vocabulary))
    super().__init__(built, run_lib.best(source, built))

  def changed(
    self, change: Callable[[dict[str, Any]], None]
  ) -> config_lib.Experiment:
    """Returns the experiment with changed sections of mixtures.

    It has no annealing: what its experts are made of is trained already.
    """
    values = copy.deepcopy(self.experiment.values)
    values["train"].pop("annealing", None)
    mixtures = config_lib.mixtures(values)
    sections = [section for _, section in mixtures if "router" in section]
    if not sections or not self.mixtures:
      raise ValueError(
        f"the run in {self.source} has no mixtures; make some by moejax"
        " upcycle."
      )
    for section in sections:
      if not hasattr(section.get("experts", {}), "keys"):
        raise ValueError(
          "experts of several kinds cannot be made of others; give a run whose"
          " experts are of one."
        )
      change(section)
    return config_lib.parse(values)

  def to(self, experiment: config_lib.Experiment) -> "_Target":
    """Returns a fresh model for the vocabulary of this run."""
    old, new = self.experiment.tokenizer, experiment.tokenizer
    if old is not new or self.experiment.translates != experiment.translates:
      kinds = [e.values["data"]["kind"] for e in (self.experiment, experiment)]
      raise ValueError(
        f"the run in {self.source} reads {kinds[0]!r}, the config {kinds[1]!r},"
        " whose tokens are of another kind; give a config with data of the"
        " same."
      )
    return _Target(experiment, config_lib.open_corpus(experiment, self.source))


class _Target(_Model):
  """A model that nothing has trained yet, and its corpus."""

  def __init__(self, experiment: config_lib.Experiment, data: corpora.Corpus):
    self.data = data
    built = session.build(experiment, len(data.vocabulary))
    session.check_fits(built)
    about = built.model, built.tx, built.shapes, experiment.seed
    super().__init__(built, state.create(*about, built.layout, built.mesh))
    rows = batches_lib.eval_batches(
      data.rows("validation"), experiment.rows_at_once
    )
    self.batches = list(itertools.islice(rows, _BATCHES))


# -- from one model to another ------------------------------------------------


def _scope(path: Sequence[str]) -> tuple[str, ...] | None:
  """Returns where the layer lies that an expert's parameter is part of."""
  return tuple(path[: path.index("experts")]) if "experts" in path else None


def _router_at(path: Sequence[str]) -> int | None:
  return path.index("router") if "router" in path else None


def _named(path: Sequence[str]) -> str:
  return "/".join(path)


def _fewer(experts: int) -> Callable[[dict[str, Any]], None]:
  def change(section):
    old, k = section["num_experts"], section["router"].get("k", 1)
    if not k <= experts < old:
      raise ValueError(
        f"of {old} experts, {k} a token, {experts} cannot be left; give from"
        f" {k} to {old - 1}."
      )
    section["num_experts"] = experts
    if section["router"].get("max_k"):
      section["router"]["max_k"] = min(section["router"]["max_k"], experts)

  return change


def _view(views: Views, scope: tuple[str, ...]) -> Visits:
  if scope not in views:
    raise ValueError(
      f"{_named(scope)} is a mixture within a recurrent layer, of whose experts"
      " nothing is measured; give a run whose mixtures stand between layers."
    )
  return views[scope]


def _plan_of_dense(before: _Model, after: _Model) -> Plan:
  """Says which experts become copies, or copies of parts, of dense layers."""
  plan: Plan = {}
  for scope, E in after.experts.items():
    old = before.experts.get(scope)
    if old is None:
      layers = [len(model.experts) for model in (before, after)]
      raise ValueError(
        f"the config has experts in {_named(scope)}, where the run has none;"
        f" it has {layers[0]} feed-forward layers, the config {layers[1]}: give"
        " the config layers of the same kinds and number."
      )
    own, theirs = (
      {path for path in model.arrays if _scope(path) == scope}
      for model in (after, before)
    )
    if own != theirs:
      raise ValueError(
        f"the experts of {_named(scope)} have"
        f" {_leaves(own)} in the config, {_leaves(theirs)} in the run; let both"
        " be of one kind, and gated or not."
      )
    if old == E:
      continue
    if old != 1:
      raise ValueError(
        f"{_named(scope)} has {old} experts in the run, {E} in the config: only"
        " a dense layer is upcycled; see moejax split, merge and prune."
      )
    axes = after.hidden(scope)
    wide, narrow = (
      next((m.arrays[p].shape[at] for p, at in axes.items()), 1)
      for m in (before, after)
    )
    if wide % narrow or E % (wide // narrow):
      fit = [wide // n for n in range(1, E + 1) if wide % n == 0 and E % n == 0]
      near = min(fit, key=lambda hidden: abs(hidden - narrow))
      raise ValueError(
        f"{_named(scope)} has {wide} hidden units in the run, and {E} experts"
        f" of {narrow} in the config: experts are copies of the dense layer, or"
        " of its equal parts, all as often; the nearest hidden that fits is"
        f" {near}."
      )
    parts = wide // narrow
    plan[scope] = [Made((0,), (1.0,), e % parts, parts) for e in range(E)]
  if not plan:
    raise ValueError(
      "the config has no mixture where the run has a dense layer; give one"
      " that has."
    )
  if lost := before.experts.keys() - after.experts.keys():
    raise ValueError(
      f"the run has a feed-forward layer in {_named(min(lost))}, where the"
      " config has none; give the config layers of the same kinds and number."
    )
  return plan


def _leaves(paths) -> str:
  return ", ".join(sorted({path[-1] for path in paths}))


def _converted(
  arrays: Arrays, after: _Model, plan: Plan, scaled=True
) -> Arrays:
  """Makes the parameters of a model out of those of another.

  What has no counterpart there, which only routers may lack, stays as it is in
  the model; moments of it (`scaled` is False) are zero.
  """
  values = {}
  for path, new in after.arrays.items():
    scope, at = _scope(path), _router_at(path)
    if path not in arrays:
      if at is None or path[:at] not in plan:
        raise ValueError(
          f"the config has {_named(path)}, {new.shape}, which the run lacks;"
          " give a config that differs in its mixtures alone."
        )
      values[path] = new if scaled else np.zeros_like(new)
      continue
    array = arrays[path]
    if scope in plan:
      made = plan[scope]
      array = _mean(array, made, 0)
      if made[0].parts > 1:
        axis = after.hidden(scope)[path]
        array = np.stack(
          [
            np.split(row, each.parts, axis - 1)[each.part]
            for row, each in zip(array, made, strict=True)
          ]
        )
        if scaled and axis == 1:
          array = array * np.float32(made[0].parts)
    elif at is not None and path[:at] in plan:
      made = plan[path[:at]]
      array = _mean(array, made, -1)
      # The softmax over more experts is that many times as small.
      if scaled and path[-1] == "log_thresholds":
        array = array - np.float32(math.log(made[0].parts))
      if scaled and path[-1] == "average_thresholds":
        array = array / np.float32(made[0].parts)
    if array.shape != new.shape:
      raise ValueError(
        f"{_named(path)} is {array.shape} in the run, {new.shape} in the"
        " config; give a config that differs in its mixtures alone."
      )
    values[path] = array
  return values


def _mean(array: np.ndarray, made: Sequence[Made], axis: int) -> np.ndarray:
  """Puts new experts together out of old ones along an axis."""
  parts = [
    sum(
      np.float32(share) * array.take(expert, axis)
      for expert, share in zip(each.of, each.shares, strict=True)
    )
    for each in made
  ]
  return np.stack(parts, axis)


class _Moments:
  """What the optimizer has gathered of one model, for another."""

  def __init__(self, before: _Opened, after: _Target, plan: Plan):
    self._after = after
    old, new = _by_kind(before.opt_state), _by_kind(after.opt_state)
    sizes = {path: array.shape for path, array in before.arrays.items()}
    self._arrays: dict[str, Any] = {}
    for name in new:
      there = old.get(name)
      if isinstance(there, dict):
        there = before.apart(there)
        if {p: a.shape for p, a in there.items()} != sizes:
          there = None
      if there is None:
        raise ValueError(
          "the optimizers of the run and of the config are not both adam with"
          " the same moments and clipping, whose state could be carried; take"
          " --optimizer=reset, or the run's config.optimizer."
        )
      if isinstance(there, dict):
        there = _converted(there, after, plan, scaled=False)
      self._arrays[name] = there

  def forget(
    self, path: tuple[str, ...], axis: int, units: Sequence[np.ndarray]
  ) -> None:
    """Sets the moments of units that are drawn anew to zero."""
    for arrays in self._arrays.values():
      if isinstance(arrays, dict):
        arrays[path] = arrays[path].copy()
        rows = np.moveaxis(arrays[path], axis, 1)
        for row, own in zip(rows, units, strict=True):
          row[own] = 0

  def state(self) -> Any:
    """Returns the state of the new model's optimizer."""
    found = {
      name: self._after.together(arrays) if isinstance(arrays, dict) else arrays
      for name, arrays in self._arrays.items()
    }

    def of(path, leaf):
      name, own = _kind(path)
      return np.asarray(found[name][own] if own else found[name], leaf.dtype)

    return jax.tree.map_with_path(of, self._after.opt_state)


def _kind(path) -> tuple[str, tuple[str, ...]]:
  """Parts the path of an optimizer's number: what it is, of which parameter."""
  at = len(path)
  while at and isinstance(path[at - 1], jax.tree_util.DictKey):
    at -= 1
  own = tuple(key.key for key in path[at:])
  return jax.tree_util.keystr(path[:at]), own


def _by_kind(opt_state: Any) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for path, leaf in jax.tree.leaves_with_path(jax.device_get(opt_state)):
    name, own = _kind(path)
    if own:
      found.setdefault(name, {})[own] = leaf
    else:
      found[name] = leaf
  return found


# -- what came of it ----------------------------------------------------------


def _finish(
  before: _Opened,
  after: _Target,
  values: Arrays,
  plan: Plan,
  workdir: files_lib.Path,
  how: dict[str, Any],
  why: Sequence[str],
  moments: _Moments | None = None,
) -> dict[str, Any]:
  """Compares both models on held-out text; has the new run written."""
  old, new = (
    before.read(after.batches),
    after.read(after.batches, arrays=values),
  )
  difference = np.abs(new.log_p - old.log_p)
  # Not word by word: a small log p is the difference of large sums.
  relative = float(difference.max() / np.abs(old.log_p).max())
  why = list(why)
  if how["how"] == "upcycle":
    for scope in plan.keys() & new.views.keys():
      seen, parts = new.views[scope], plan[scope][0].parts
      visits = float(seen.load.sum() / seen.tokens)
      gates = float(seen.gates.sum() / seen.tokens)
      if abs(visits / parts - round(visits / parts)) > 1e-6:
        why.append(
          f"{_named(scope)}: a token visits {visits:.3g} experts, no multiple"
          f" of the {parts} parts of the dense layer"
        )
      if abs(gates - 1) > 1e-4:
        why.append(
          f"{_named(scope)}: the gates of a token sum to {gates:.3g} in the"
          " mean, not to 1"
        )
  report = how | {
    "from": str(before.source),
    "step": before.step,
    "words": len(old.log_p),
    "perplexity_before": old.perplexity,
    "perplexity_after": new.perplexity,
    "max_difference_log_p": float(difference.max()),
    "max_relative_difference_log_p": relative,
    "tolerance": TOLERANCE,
    "function_kept": relative <= TOLERANCE,
    "why_not": why if relative > TOLERANCE else [],
    "experts": {
      _named(scope): [
        made._asdict() | {"of": [*made.of], "shares": [*made.shares]}
        for made in experts
      ]
      for scope, experts in plan.items()
    },
  }
  step = _write(before, after, values, workdir, report, moments)
  terminal.say(
    f"perplexity of {len(old.log_p):,} held-out words, with room for all:"
    f" {old.perplexity:.6g} before, {new.perplexity:.6g} after; log p of a word"
    f" differs by {difference.max():.2g} at most, {relative:.2g} of the largest"
  )
  if report["function_kept"]:
    terminal.say("the function is the same")
  else:
    said = why or ["float32 rounds in many layers, or logits are equal"]
    terminal.say("\n  ".join(["the function is another:", *said]))
  terminal.say(
    f"the run lies in {workdir}, at step {step}; moejax train goes on"
  )
  return report


def _write(
  before: _Opened,
  after: _Target,
  values: Arrays,
  workdir: files_lib.Path,
  report: Mapping[str, Any],
  moments: _Moments | None,
) -> int:
  """Writes the new run; returns the step at which it goes on."""
  step = before.step if moments else 0
  layout = after.built.abstract_state
  params = unflatten_dict(after.together(values))
  opt_state = moments.state() if moments else after.opt_state
  placed = jax.tree.map(
    lambda array, leaf: jax.device_put(array, leaf.sharding),
    state.TrainState(np.int32(step), params, opt_state),
    layout,
  )
  experiment, data = after.built.experiment, after.data
  context = evaluators.Context(after.built, data, workdir)
  order = batches_lib.train_batches(
    context.rows("train"), data.batch_size, experiment.seed
  )
  progress = {
    "data": order.get_state() | {"next_index": step},
    "seconds": 0.0,
    "text": context.identity,
  }
  with processes.alone_in(workdir):
    # The config comes last: before, no run is there that could go on.
    checkpoints = checkpoint.Checkpoints(workdir / run_lib.CHECKPOINTS)
    with contextlib.closing(checkpoints):
      checkpoints.save(placed, step, progress)
    files_lib.write_whole(
      workdir / MADE_FROM_FILE, metrics.as_json(report, indent=2) + "\n"
    )
    about = experiment.values, data.vocabulary, context.identity
    # Of an imported model: what its export needs.
    foreign = before.source / workdir_lib.FOREIGN
    if files_lib.exists(foreign):
      kept = workdir / workdir_lib.FOREIGN
      kept.mkdir(exist_ok=True)
      for path in foreign.iterdir():
        files_lib.write_whole(kept / path.name, files_lib.read(path))
    workdir_lib.remember(*about, workdir, made=True)
  return step
