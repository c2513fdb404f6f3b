"""Routing traces: what every mixture decides about a text, kept and replayed.

A trace is a folder. Its parts, `part-00000.parquet` and so on, have a row for
each token that a mixture reads, padding left out: batch after batch, in each
the mixtures by name, in each of these the tokens as they follow each other.

layer     string: path of the mixture in the model.
token     int64: number of the token in the text, from 0; those of a source and
          of a target are counted apart.
id        int32: of the token in the vocabulary.
position  int32: of the token in its sentence, from 0.
experts   list of int32: who is to read it, the best choice first; of two levels
          expert j of group i is i * Q + j.
gates     list of float32: their gates.
edges     list of int32: where in its group's order each of these choices is, by
          which experts take what they have slots for.
dropped   list of bool: whether the expert was full.
margin    float32: the least logit of a chosen expert less the largest of any
          other, below 0 where logits alone do not decide; missing where
          there is no other, and of two levels.

`trace.json` is written last: the checkpoint's step, the digest of the text, its
share of unknown tokens, its loss in nats a token, the number of rows, of each
layer how its decisions are laid out, and of each layer of two levels how many
groups of experts there are, the edges to these and how many of them found their
group full.
"""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from moejax import config as config_lib
from moejax import files as files_lib
from moejax import losses, sharding, terminal
from moejax import routing as routing_lib
from moejax import workdir as workdir_lib
from moejax.analysis.measures import Decisions
from moejax.data import batches as batches_lib
from moejax.models.transformer import apart, unscanned
from moejax.moe import ROUTING
from moejax.router import Router
from moejax.routing import Assignment
from moejax.training import run as run_lib
from moejax.training import session, step

ABOUT = "trace.json"
SCHEMA = pa.schema(
  [
    ("layer", pa.string()),
    ("token", pa.int64()),
    ("id", pa.int32()),
    ("position", pa.int32()),
    ("experts", pa.list_(pa.int32())),
    ("gates", pa.list_(pa.float32())),
    ("edges", pa.list_(pa.int32())),
    ("dropped", pa.list_(pa.bool_())),
    ("margin", pa.float32()),
  ]
)
# Rows of a part, about.
_PART = 2**21


class Layout(NamedTuple):
  """How the decisions of a layer about a batch are laid out.

  Attributes:
    groups, tokens, edges, experts: G, S, A and E of its `Assignment`.
    by_token: whether tokens choose.
    levels: 2 where they choose groups of experts first.
  """

  groups: int
  tokens: int
  edges: int
  experts: int
  by_token: bool
  levels: int


def record(
  workdir: files_lib.Path,
  to: pathlib.Path,
  split: str = "test",
  files: Sequence[str] = (),
  layout: str = "",
) -> dict[str, Any]:
  """Writes what a run's mixtures decide about a text.

  Args:
    workdir: of the run.
    to: a folder, new or empty.
    split: of the run's own corpus.
    files: to read in place of it.
    layout: name of one to take in place of the run's own.

  Returns what is in `trace.json`. Errors as of `run.evaluate_run`; ValueError
  also where the folder has something in it, the model no mixture of which a
  trace can tell, or where several processes read. An interrupted call leaves a
  folder without `trace.json`.
  """
  if to.exists() and any(to.iterdir()):
    raise ValueError(f"{to} is not empty; give a new folder.")
  return Reader(workdir, split, files, layout).record(to)


def about(trace: pathlib.Path) -> dict[str, Any]:
  """Returns what is in a trace's `trace.json`.

  ValueError where it is none of this version, or parts are missing or damaged.
  """
  path = trace / ABOUT
  if not path.exists():
    raise ValueError(
      f"{trace} is no whole trace, it has no {ABOUT}; record it."
    )
  told, found = files_lib.read_json(path), 0
  try:
    for layer in told["layers"].values():
      Layout(**layer)
    rows, _ = told["rows"], told["text"]
  except (AttributeError, KeyError, TypeError):
    raise ValueError(
      f"{path} is not of a trace of this version; record it anew."
    ) from None
  for part in _parts(trace):
    with _opened(part) as file:
      found += file.metadata.num_rows
  if found != rows:
    raise ValueError(
      f"{trace} has {found:,} rows of {rows:,}, parts are missing or were"
      " added; record it anew."
    )
  return told


def decisions(trace: pathlib.Path, layer: str) -> Decisions:
  """Reads what one layer decided, as arrays; errors as of `about`."""
  layout = Layout(**about(trace)["layers"][layer])
  with _undamaged(trace):
    whole = pyarrow.dataset.dataset(_parts(trace), SCHEMA, format="parquet")
    table = whole.to_table(filter=pc.field("layer") == layer).combine_chunks()
  lists = {
    name: table[name].combine_chunks()
    for name in ("experts", "gates", "edges", "dropped")
  }
  flat = {
    name: values.flatten().to_numpy(zero_copy_only=False)
    for name, values in lists.items()
  }
  length = lists["experts"].value_lengths().to_numpy()
  # The first choices of all tokens come before the second ones; where experts
  # choose, those of a token are in their order.
  choice = flat["edges"] // layout.tokens
  if not layout.by_token:
    ends = np.cumsum(length)
    choice = np.arange(choice.size) - np.repeat(ends - length, length)
  return Decisions(
    layout.experts,
    table["id"].to_numpy(),
    table["position"].to_numpy(),
    table["margin"].to_numpy(),
    np.repeat(np.arange(length.size), length),
    flat["experts"],
    flat["gates"],
    flat["dropped"],
    choice,
  )


def replay(
  workdir: files_lib.Path,
  trace: pathlib.Path,
  split: str = "test",
  files: Sequence[str] = (),
  layout: str = "",
) -> float:
  """Returns the loss, in nats, with a trace's decisions in place of the run's.

  Errors as of `record` and `about`; ValueError also where the trace is of
  another text, of layers that the model has not, or decides what these cannot.
  """
  told = about(trace)
  reader = Reader(workdir, split, files, layout)
  for _ in reader.read(_decided(trace, told, reader)):
    pass
  return reader.loss


def counterfactual(
  workdir: files_lib.Path,
  choices: Sequence[str],
  split: str = "test",
  files: Sequence[str] = (),
  layout: str = "",
) -> dict[str, float]:
  """Returns the loss, in nats, of a run's own decisions ("own") and of others.

  Args:
    workdir: of the run.
    choices: "k=2", each token visits so many experts; "training", decisions as
      in training, with noise if there is any; "uniform", any experts, with the
      same gates; else the folder of a trace, of another run for instance.
    split: as of `record`.
    files: as of `record`.
    layout: as of `record`.

  Errors as of `record`, and of `replay` for a trace; ValueError also for an
  unknown choice, or a k that no router takes.
  """
  traces = {}
  for choice in choices:
    if choice in ("training", "uniform") or re.fullmatch(r"k=[1-9]\d*", choice):
      continue
    trace = files_lib.local(choice)
    if not trace.is_dir():
      raise ValueError(
        f"unknown choice {choice!r}; give training, uniform, k=N, or a trace."
      )
    traces[choice] = trace, about(trace)
  found, reader = {}, Reader(workdir, split, files, layout)
  # What is refused is refused before the text is read.
  given = {name: _decided(*each, reader) for name, each in traces.items()}
  for choice in dict.fromkeys(("own", *choices)):
    k = int(choice[2:]) if choice.startswith("k=") else None
    reader.choose(k, choice == "training")
    if choice == "uniform":
      random = np.random.default_rng(0)
      given[choice] = functools.partial(_uniform, random, reader.layers)
    for _ in reader.read(given.get(choice)):
      pass
    found[choice] = reader.loss
  return found


# -- batches ------------------------------------------------------------------

# Of a target's tokens and a source's: the arrays of ids and of starts.
_SIDES = {"target": ("inputs", "start"), "source": ("source", "source_start")}


def side(layer: str) -> str:
  """Returns which tokens a layer reads: of the source, or of the target."""
  return "source" if layer.startswith("encoder") else "target"


def _real(batch: Mapping[str, np.ndarray], side: str) -> np.ndarray:
  """Returns which places of a side, flat, hold no padding."""
  if side == "target":
    return batch["mask"].reshape(-1)
  return batch.get("source_segment", np.zeros(0)).reshape(-1) > 0


def _parts(trace: pathlib.Path) -> list[pathlib.Path]:
  return sorted(trace.glob("part-*.parquet"))


@contextlib.contextmanager
def _undamaged(path: pathlib.Path) -> Iterator[None]:
  """ValueError names what Arrow finds damage in; its own names no file."""
  try:
    yield
  except (OSError, ValueError) as error:
    said = str(error).rstrip(".")
    raise ValueError(
      f"{path} is damaged, or not of a trace ({said}); record it anew."
    ) from error


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[pq.ParquetFile]:
  """Opens a part; ValueError where it is none, or is damaged."""
  with (
    _undamaged(path),
    files_lib.open_regular(path) as file,
    pq.ParquetFile(file) as part,
  ):
    if not part.schema_arrow.equals(SCHEMA):
      columns = ", ".join(f"{each.name} {each.type}" for each in SCHEMA)
      raise ValueError(f"its columns are not {columns}")
    yield part


def _rows(trace: pathlib.Path) -> Generator[pa.Table | None, int, None]:
  """Yields as many rows of a trace as are sent for, in order, or those left."""
  table = SCHEMA.empty_table()
  number = yield None
  for path in _parts(trace):
    with _opened(path) as part:
      for rows in part.iter_batches():
        table = pa.concat_tables([table, pa.Table.from_batches([rows], SCHEMA)])
        while len(table) >= number:
          rest = table.slice(number)
          number = yield table.slice(0, number)
          table = rest
  while True:
    number = yield table


def _table(name, layer, E, batch, seen) -> pa.Table:
  """Returns a layer's rows of a batch."""
  own_side = side(name)
  ids, start = (batch[key] for key in _SIDES[own_side])
  place = np.arange(ids.shape[1])[None]
  first = np.maximum.accumulate(np.where(start, place, 0), axis=1)
  real = np.flatnonzero(_real(batch, own_side))
  G, S = layer["margin"].shape
  group, edge = np.nonzero(layer["expert"] < E)
  expert = layer["expert"][group, edge]
  token = group * S + layer["token"][group, edge]
  # An expert's last edges are those that it has no slot for.
  order = np.lexsort((edge, expert, group))
  own = group * E + expert
  count = np.bincount(own, minlength=G * E)
  rank = np.arange(order.size) - np.repeat(np.cumsum(count) - count, count)
  dropped = np.empty(order.size, bool)
  dropped[order] = rank >= (count - layer["dropped"].reshape(-1))[own[order]]
  # Token after token, each one's best choice first.
  order = np.lexsort((edge, token))
  length = np.bincount(token, minlength=G * S)[real]
  offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
  margin = layer["margin"].reshape(-1)[real]

  def lists(values, kind):
    return pa.ListArray.from_arrays(offsets, pa.array(values[order], kind))

  columns = [
    pa.array([name] * real.size, pa.string()),
    pa.array(seen[own_side] + np.arange(real.size), pa.int64()),
    pa.array(ids.reshape(-1)[real], pa.int32()),
    pa.array((place - first).reshape(-1)[real], pa.int32()),
    lists(expert, pa.int32()),
    lists(layer["gate"][group, edge], pa.float32()),
    lists(edge, pa.int32()),
    lists(dropped, pa.bool_()),
    pa.array(margin, pa.float32(), mask=~np.isfinite(margin)),
  ]
  return pa.Table.from_arrays(columns, schema=SCHEMA)


def _decisions(rows, layers, batch) -> dict[str, Assignment]:
  """Returns what a trace's next rows say of a batch."""
  real = {name: np.flatnonzero(_real(batch, side(name))) for name in layers}
  table = rows.send(sum(each.size for each in real.values()))
  found, first = {}, 0
  for name, (G, S, A, E, by_token, _) in layers.items():
    tokens = real[name]
    own = table.slice(first, tokens.size)
    first += len(own)
    ids = batch[_SIDES[side(name)][0]].reshape(-1)[tokens]
    other = pc.any(pc.not_equal(own["layer"], name)).as_py()
    if other or not np.array_equal(own["id"].to_numpy(), ids):
      raise ValueError(
        "the trace's rows do not follow each other as the text and the layers"
        f" {', '.join(layers)} do; record it anew."
      )
    lists = [
      own[each].combine_chunks() for each in ("experts", "gates", "edges")
    ]
    lengths = lists[0].value_lengths()
    experts, gates, edges = (
      each.flatten().to_numpy(zero_copy_only=False) for each in lists
    )
    expert = np.full((G, A), E, np.int32)
    gate, token = np.zeros((G, A), np.float32), np.zeros((G, A), np.int32)
    sound = all(each.value_lengths().equals(lengths) for each in lists)
    sound = sound and np.isin(experts, np.arange(E)).all()
    sound = sound and np.isin(edges, np.arange(A)).all()
    if sound:
      place = np.repeat(tokens, lengths.to_numpy())
      at = place // S, edges
      expert[at], gate[at], token[at] = experts, gates, place % S
      # Two may not be one edge, nor where tokens choose that of another token.
      sound = (expert < E).sum() == edges.size
      sound = sound and not (by_token and (edges % S != place % S).any())
    if not sound:
      raise ValueError(
        f"the trace has decisions that {name}, of {E} experts and groups of {A}"
        f" edges for {S} tokens, cannot make; record it anew."
      )
    found[name] = Assignment(expert, gate, None if by_token else token)
  return found


def _decided(trace, told, reader):
  """Returns a trace's decisions about one batch after another, for `read`."""
  if told["text"] != reader.rows.digest:
    raise ValueError(f"{trace} is of another text; record this one.")
  reader.follow(told["layers"])
  rows = _rows(trace)
  # To the first demand for rows.
  next(rows)
  return functools.partial(_decisions, rows, reader.layers)


def _uniform(random, layers, batch) -> dict[str, Assignment]:
  """Returns decisions without a reason, of as many edges as the model's own."""
  del batch
  found = {}
  for name, (G, S, A, E, *_) in layers.items():
    k = max(1, A // S)
    expert = random.random((G, S, E)).argsort(axis=2)[..., :k].astype(np.int32)
    gate = np.full(expert.shape, 1 / k, np.float32)
    found[name] = routing_lib.from_token_choice(
      *map(jnp.asarray, (expert, gate))
    )
  return found


class Reader:
  """Reads a text by a run's best checkpoint, and looks at its mixtures.

  Attributes:
    context: the run and its corpus.
    rows: of the text.
    step: of the checkpoint.
    params: its parameters.
    built: the session of what is read with.
    places: where blocks lie, in the model and taken apart, of `unscanned`.
    layers: how the decisions of each mixture are laid out.
    mixtures: the modules, by the same names.
    loss: nats a token, once all has been read.
  """

  def __init__(
    self,
    workdir: files_lib.Path,
    split: str = "test",
    files: Sequence[str] = (),
    layout: str = "",
  ):
    if (several := jax.process_count()) > 1:
      raise ValueError(
        f"{several} processes read the text, but a trace is of one; start a"
        " single process, which can read the run of several."
      )
    self.context = run_lib.open_run(workdir, layout, files)
    self.rows = self.context.rows("data" if files else split)
    if not files:
      workdir_lib.check_text({split: self.rows.digest}, workdir)
    state = run_lib.best(workdir, self.context.session)
    self.step, self.loss, self.params = int(state.step), 0.0, state.params
    self.choose()
    if not self.layers:
      raise ValueError(
        f"the run in {workdir} is dense: it has no mixture to tell of."
      )

  def choose(self, k: int | None = None, as_in_training: bool = False) -> None:
    """Gives every router another k, or lets it decide as in training."""
    built = self.context.session
    if k is not None:
      changes = _with_k(built.experiment.values, k)
      experiment = config_lib.changed(built.experiment, changes)
      built = session.build(experiment, len(self.context.data.vocabulary))
    self.built, self._as_in_training = built, as_in_training
    self._model, *self.places = unscanned(built.model)
    self.layers: dict[str, Layout] = {}
    self.mixtures: dict[str, nn.Module] = {}
    rows = built.experiment.rows_at_once
    self._where = sharding.batch_sharding(built.layout, built.mesh, rows)
    self._fn = jax.jit(sharding.zero3(self._run))
    shapes = {
      name: jax.ShapeDtypeStruct((rows, *each.shape[1:]), each.dtype)
      for name, each in built.shapes.items()
    }
    jax.eval_shape(self._run, self.params, shapes, {}, False)
    # Decisions of no meaning, of the layers that can be told what to decide.
    self._none = {}
    for name, layout in self.layers.items():
      if layout.levels == 1:
        shape = layout.groups, layout.edges
        expert, gate = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        token = None if layout.by_token else expert
        self._none[name] = Assignment(expert, gate, token)

  def follow(self, layers: Mapping[str, Any]) -> None:
    """Refuses layers that are not the model's, or are laid out otherwise."""
    traced = {name: Layout(**each) for name, each in layers.items()}
    for name in sorted({*traced, *self.layers}):
      if traced.get(name) != self.layers.get(name):
        raise ValueError(
          f"of {name} the trace has {traced.get(name)}, but the model has"
          f" {self.layers.get(name)}; record one of this run."
        )

  def record(self, to: pathlib.Path) -> dict[str, Any]:
    """Writes a trace, see `record`; returns what is in its `trace.json`."""
    to.mkdir(parents=True, exist_ok=True)
    seen = dict.fromkeys(_SIDES, 0)
    writer, parts, held, rows = None, 0, 0, 0
    groups: dict[str, dict[str, int]] = {}
    try:
      for batch, found in self.read():
        for name, layer in found.items():
          if "sent" in layer:
            sums = groups.setdefault(name, dict.fromkeys(("sent", "full"), 0))
            sums["groups"] = layer["sent"].size
            for key in ("sent", "full"):
              sums[key] += int(layer[key].sum())
        tables = [
          _table(name, layer, self.layers[name].experts, batch, seen)
          for name, layer in found.items()
        ]
        for each in _SIDES:
          seen[each] += int(_real(batch, each).sum())
        if writer is None or held >= _PART:
          if writer is not None:
            writer.close()
          writer = pq.ParquetWriter(to / f"part-{parts:05d}.parquet", SCHEMA)
          parts, held = parts + 1, 0
        whole = pa.concat_tables(tables)
        writer.write_table(whole)
        held, rows = held + len(whole), rows + len(whole)
    finally:
      if writer is not None:
        writer.close()
    told = {
      "step": self.step,
      "text": self.rows.digest,
      "unknown": self.rows.unknown,
      "loss": self.loss,
      "rows": rows,
      "layers": {name: each._asdict() for name, each in self.layers.items()},
      "two_levels": groups,
    }
    files_lib.write_whole(to / ABOUT, json.dumps(told, indent=2) + "\n")
    return told

  def read(
    self,
    decide: Callable[[Any], Mapping[str, Assignment]] | None = None,
    limit: int | None = None,
    quiet: bool = False,
  ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Yields batches, and what is known of each layer, in NumPy.

    Args:
      decide: returns the decisions of layers about a batch, in place of their
        own.
      limit: of batches; none by default.
      quiet: whether not to show how far it is.
    """
    for name, layout in self.layers.items():
      if decide and layout.levels > 1:
        raise ValueError(
          f"{name} decides at two levels, and what it decides can be recorded,"
          " not given; choose k=N or training."
        )
    total, tokens = 0.0, 0
    number = -(-len(self.rows) // self.built.experiment.rows_at_once)
    number = number if limit is None else min(limit, number)
    bar = terminal.bar(0 if quiet else number, "batch", "reading")
    with bar, sharding.use(self.built.layout, self.built.mesh):
      for batch in itertools.islice(self._batches(), number):
        given = decide(batch) if decide else self._none
        placed = step.place(batch, self._where)
        told = self._fn(self.params, placed, given, bool(decide))
        loss, found = jax.device_get(told)
        total, tokens = total + float(loss), tokens + int(batch["mask"].sum())
        yield batch, found
        bar.update()
    self.loss = total / tokens
    if not math.isfinite(self.loss):
      raise FloatingPointError(f"the loss of the text is {self.loss}")

  def look(self, fn: Callable[..., Any]) -> dict[str, Any]:
    """Returns what a function makes of each mixture's call, of one batch.

    It is called with the module, its name, the activations [B, L, D], and which
    of the B * L are no padding; what it returns comes in NumPy.
    """
    batch = next(self._batches())

    def run(params, placed):
      found = {}

      def after(call, args, kwargs, context):
        y, module = call(*args, **kwargs), context.module
        name = "/".join(module.path)
        if name in self.layers and context.method_name == "__call__":
          real = _real(batch, side(name))
          found[name] = fn(module, name, args[0], real)
        return y

      with nn.intercept_methods(after):
        self._apply(params, placed)
      return found

    with sharding.use(self.built.layout, self.built.mesh):
      placed = step.place(batch, self._where)
      return jax.device_get(jax.jit(sharding.zero3(run))(self.params, placed))

  def _batches(self):
    return batches_lib.eval_batches(
      self.rows, self.built.experiment.rows_at_once
    )

  def _apply(self, params, batch):
    """Returns losses, and what was sown, of blocks that are taken apart."""
    flat = apart(flax.traverse_util.flatten_dict(params), *self.places)
    return self._model.apply(
      {"params": flax.traverse_util.unflatten_dict(flat)},
      batch,
      train=False,
      mutable=[ROUTING],
      method="loss",
      rngs={"router": jax.random.key(0)},
    )

  def _run(self, params, batch, given, follow):
    """Returns the loss of a batch, and what is to be known of each layer.

    It is one program whoever decides, so that the same decisions give the same
    loss to the bit: where `follow` is set it drops what routers have decided.
    """

    def decide(call, args, kwargs, context):
      module = context.module
      name = "/".join(module.path[:-1])
      # The router's own call, not those of its parts.
      if not isinstance(module, Router) or context.method_name != "__call__":
        return call(*args, **kwargs)
      if self._as_in_training:
        kwargs = kwargs | {"train": True}
      own = call(*args, **kwargs)
      self.mixtures[name] = module.parent
      if name not in given:
        return own
      other = routing_lib.make_routing(given[name], own.logits, own.mask)
      fields = ("assignment", "importance", "load", "count")
      chosen = {
        field: jax.tree.map(
          lambda a, b: jnp.where(follow, a.astype(b.dtype), b),
          getattr(other, field),
          getattr(own, field),
        )
        for field in fields
      }
      if own.dropped is not None:
        chosen["dropped"] = jnp.where(follow, 0, own.dropped)
      return own._replace(**chosen)

    with nn.intercept_methods(decide):
      loss, sown = self._apply(params, batch)
    found = {}
    reports = flax.traverse_util.flatten_dict(sown.get(ROUTING, {}))
    for path in sorted(reports):
      name = "/".join(path[:-1])
      found[name], self.layers[name] = _look(name, reports[path])
    return loss.sum(), found


def _with_k(values: Mapping[str, Any], k: int) -> dict[str, int]:
  """Returns the changes of a config that give every router another k."""
  found = {}

  def look(section, path):
    for name, value in section.items():
      if isinstance(value, Mapping):
        own = (*path, name)
        if name in ("router", "primary") and "k" in value:
          found[".".join((*own, "k"))] = k
        look(value, own)

  look(values, ("config",))
  if not found:
    raise ValueError("no router of the model has a k; leave the choice out.")
  return found


def _look(name: str, reports: Any) -> tuple[dict[str, jax.Array], Layout]:
  """Returns what a trace has of a layer's decision, on the device."""
  each = reports.unbox() if isinstance(reports, nn.Partitioned) else reports
  if len(each) != 1 or each[0].count.ndim > 2:
    raise ValueError(
      f"{name} decides about a token more than once, which a trace cannot"
      " tell; record a model without recurrent mixtures, and without mixtures"
      " that are experts."
    )
  (routing,) = each
  found = routing_lib.edges(routing)
  tokens = routing.primary or routing
  (G, S), E = tokens.logits.shape[:2], routing.count.shape[1]
  token = found.tokens(S)
  if routing.primary is None:
    levels, sums = 1, {}
    logits = routing.logits.astype(jnp.float32)
    chosen = jnp.zeros((G, S, E + 1), bool)
    chosen = jax.vmap(lambda c, t, e: c.at[t, e].set(True))(
      chosen, token, found.expert
    )[..., :E]
    least = jnp.where(chosen, logits, jnp.inf).min(axis=-1)
    margin = least - jnp.where(chosen, -jnp.inf, logits).max(axis=-1)
  else:
    levels, margin = 2, jnp.full((G, S), jnp.nan)
    # Of every group of experts.
    sent, full = routing.primary.count, routing.primary.dropped
    sums = {"sent": sent.sum(axis=0), "full": full.sum(axis=0)}
  looked = sums | {
    "load": losses.load_per_expert(routing)[0],
    "expert": found.expert,
    "gate": found.gate.astype(jnp.float32),
    "token": token,
    "dropped": routing.dropped,
    "margin": margin,
  }
  A, by_token = found.expert.shape[1], found.token is None
  return looked, Layout(G, S, A, E, by_token, levels)
