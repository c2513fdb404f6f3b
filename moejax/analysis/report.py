"""The routing report: what the experts of runs do, as JSON and as a page."""

import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from moejax import files as files_lib
from moejax import sharding, terminal
from moejax.analysis import measures, page
from moejax.analysis import trace as trace_lib
from moejax.analysis.measures import Decisions
from moejax.analysis.trace import Layout, Reader
from moejax.experts import Mixed
from moejax.models.transformer import apart
from moejax.moe import MoE
from moejax.routing import Assignment
from moejax.training import evaluators, metrics

# Tokens that the bits of knowledge are counted over, and their shuffles.
_INFORMED, _SHUFFLES = 300_000, 5
# Up to so many experts every pair of them is told, else so many pairs.
_FEW, _PAIRS = 64, 500
# Tokens and contexts of an expert, of few experts and of many.
_TOLD = {True: (12, 10), False: (5, 3)}
# Tokens of the sample that experts are taken away for.
_SAMPLE = 2048
# Numbers of all experts' outputs at once, and experts that are compared.
_OUTPUTS, _COMPARED = 2**26, 8192
# The most that a browser reads soon, in bytes.
_LARGEST = 64 * 2**20


def write(
  workdirs: Sequence[files_lib.Path],
  to: pathlib.Path,
  split: str = "test",
  files: Sequence[str] = (),
  layout: str = "",
  layers: Sequence[str] = (),
  sentences: int = 200,
  without: int = 64,
) -> dict[str, Any]:
  """Writes the report of runs, side by side: a page, and beside it a .json.

  Args:
    workdirs: of the runs.
    to: the page, an .html.
    split: of each run's own corpus.
    files: to read in place of it.
    layout: name of one to take in place of the runs' own.
    layers: names of the mixtures to tell of; all by default.
    sentences: how many of the text to show, spread evenly.
    without: how many experts of a run to take away in turn, the busiest of
      each layer, to tell what the loss is without them.

  Returns what is in the JSON. Errors as of `trace.record`; ValueError also
  where there is no such layer, or the page is larger than a browser holds.
  """
  if to.suffix != ".html":
    raise ValueError(f"the report is a page, but {to} is no .html; name it so.")
  if not to.parent.is_dir():
    raise ValueError(f"{to.parent} is no folder; make it, or name another.")
  told = {
    "split": "data" if files else split,
    "files": list(files),
    "runs": [
      _of_run(workdir, split, files, layout, layers, sentences, without)
      for workdir in workdirs
    ],
  }
  content = page.render(told)
  if len(content) > _LARGEST:
    names = ",".join(layer["name"] for layer in told["runs"][0]["layers"][:1])
    raise ValueError(
      f"the report has {len(content) / 2**20:,.0f} MiB, where a browser holds"
      f" {_LARGEST / 2**20:,.0f} well; narrow it by --layers={names}, or by a"
      " smaller --sentences."
    )
  files_lib.write_whole(to, content)
  as_json = metrics.as_json(told) + "\n"
  files_lib.write_whole(to.with_suffix(".json"), as_json)
  return told


def _of_run(
  workdir, split, files, layout, layers, sentences, without
) -> dict[str, Any]:
  """Returns what there is to tell of a run."""
  reader = Reader(workdir, split, files, layout)
  unknown = [name for name in layers if name not in reader.layers]
  if unknown:
    there = ", ".join(reader.layers)
    raise ValueError(
      f"the run in {workdir} has no mixture {unknown[0]}; choose of {there}."
    )
  data = reader.context.data
  text = _Text(data, reader.rows, "data" if files else split, sentences)
  with tempfile.TemporaryDirectory() as folder:
    trace = pathlib.Path(folder) / "trace"
    about = reader.record(trace)
    names = list(layers or reader.layers)
    more = {name: {"kinds": _kinds(reader, name)} for name in names}
    for key, found in (
      ("cosines", _cosines(reader)),
      ("without", _without(reader, names, without)),
      # Last, as it is another program.
      ("smooth_load", _smooth_load(reader)),
      ("training", metrics.loads(workdir)),
    ):
      for name in names:
        more[name][key] = found.get(name)
    told = [_of_layer(name, trace, about, text, more[name]) for name in names]
  tokens = int(reader.rows.num_words)
  run = {
    "workdir": str(workdir),
    "step": reader.step,
    "tokens": tokens,
    "unit": reader.context.session.experiment.unit,
    "loss": _short(about["loss"]),
    "perplexity": _short(evaluators.exp(about["loss"])),
    "unknown": _short(reader.rows.unknown),
    "text": text.shown,
    "layers": told,
  }
  if not reader.context.translator:
    _, num_bytes = reader.context.size_of_text("data" if files else split)
    bits = about["loss"] * tokens / np.log(2) / num_bytes
    run["bits_per_byte"] = _short(bits)
  if run["unknown"] > 0.05:
    terminal.warn(
      f"{run['unknown']:.1%} of the text's {run['unit']}s are unknown to the"
      f" vocabulary of the run in {workdir}; what its experts do about these"
      " says little."
    )
  return run


# -- the text -----------------------------------------------------------------


class _Text:
  """Tokens as a reader sees them, and what is known of their sentences.

  Attributes:
    vocabulary: of the run.
    shown: of each side, the sentences that the page shows, token by token.
  """

  def __init__(self, data, rows, split, sentences):
    self.vocabulary, self._rows = data.vocabulary, rows
    self._number, self.shown = sentences, {}
    origins = [
      (str(pairs.direction or ""), file, count)
      for pairs in data.pairs[split]
      for file, count in (pairs.files or {"": len(pairs.targets)}).items()
    ]
    directions, names, counts = zip(*origins, strict=True)
    self._origin = np.repeat(np.arange(len(counts)), counts)
    self._names = {"language": directions, "file": names}

  def decode(self, ids: list[int]) -> str:
    """Returns tokens as text."""
    found = self.vocabulary.decode(ids)
    return found if isinstance(found, str) else " ".join(found)

  def labels(self, side: str) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Yields what tokens may have in common: its kind, numbers, names."""
    origin = self._origin[self._rows.sentences(side)]
    for kind, names in self._names.items():
      known, number = np.unique(names, return_inverse=True)
      if known.size > 1:
        yield kind, number[origin], known.tolist()

  def show(self, side: str, decisions: Decisions) -> list[np.ndarray]:
    """Returns the tokens of the sentences that are shown of a side."""
    starts = np.flatnonzero(decisions.position == 0)
    ends = np.append(starts[1:], decisions.ids.size)
    some = np.linspace(0, starts.size - 1, min(self._number, starts.size))
    some = np.unique(some.astype(int))
    tokens = [np.arange(starts[i], ends[i]) for i in some]
    self.shown[side] = [
      [self.vocabulary.spelt(token) for token in decisions.ids[own].tolist()]
      for own in tokens
    ]
    return tokens


# -- a layer ------------------------------------------------------------------


def _of_layer(name, trace, about, text, more) -> dict[str, Any]:
  """Returns what there is to tell of a layer, out of its trace and `more`."""
  layout, side = Layout(**about["layers"][name]), trace_lib.side(name)
  decisions = trace_lib.decisions(trace, name)
  E, N = layout.experts, decisions.ids.size
  kept = ~decisions.dropped
  count, left = decisions.per_expert(), decisions.per_expert(kept)
  importance = decisions.per_expert(decisions.gate)
  few = E <= _FEW
  of_groups = []
  if groups := about["two_levels"].get(name):
    of_groups = count.reshape(groups["groups"], -1).sum(axis=1)
  facts, knowledge = _knowledge(decisions, text, side)
  loads = {"load": count, "after_capacity": left, "importance": importance}
  if more["smooth_load"] is not None:
    loads["smooth_load"] = more["smooth_load"]
  of_token = np.bincount(decisions.token, minlength=N)
  read = np.bincount(decisions.token, kept, N)
  best = np.zeros(N)
  np.maximum.at(best, decisions.token, decisions.gate)
  margins = decisions.margin[np.isfinite(decisions.margin)]
  shown = text.show(side, decisions)
  first = np.searchsorted(decisions.token, np.arange(N + 1))
  # Of few experts every pair.
  pairs = E * E if few else _PAIRS
  found = {
    "name": name,
    "side": side,
    "experts": E,
    "levels": layout.levels,
    "groups_of_experts": [_short(load) for load in of_groups],
    "tokens": N,
    "edges": int(decisions.expert.size),
    "choices": _short(decisions.expert.size / N),
    "balance": {
      key: {n: _short(v) for n, v in measures.balance(each).items()}
      for key, each in loads.items()
    },
    "drops": list(_drops(decisions, layout, groups)),
    "unchosen_tokens": int((of_token == 0).sum()),
    "lost_tokens": int(((of_token > 0) & (read == 0)).sum()),
    "largest_gate": _short(best.mean()),
    "margin": _short(np.median(margins)) if margins.size else None,
    "kinds": _of_kinds(more["kinds"], loads),
    "margins": [
      {n: _short(value) for n, value in row.items()}
      for row in measures.histogram(decisions.margin)
    ],
    "knowledge": facts,
    "positions": _lifts(
      decisions,
      np.log2(decisions.position + 1).astype(int),
      lambda power: {"from": 2**power - 1, "to": 2 ** (power + 1) - 2},
    ),
    "labels": {
      kind: _lifts(decisions, own, lambda n, names=names: {"label": names[n]})
      for kind, own, names in text.labels(side)
    },
    "together": [
      {"a": a, "b": b, "tokens": n, "lift": _short(lift)}
      for a, b, n, lift in itertools.islice(
        measures.together(decisions, N), pairs
      )
    ],
    "training": _training(more["training"], few),
    "by_expert": _experts(decisions, text, loads, knowledge, more),
    # Sentence by sentence, token by token: expert, gate, whether it was full.
    "read": [
      [
        [
          [int(decisions.expert[i]), _short(decisions.gate[i])]
          + [1] * bool(decisions.dropped[i])
          for i in range(first[token], first[token + 1])
        ]
        for token in sentence
      ]
      for sentence in shown
    ],
  }
  found |= {
    f"alike_{what}": [
      {"a": a, "b": b, "cosine": _short(cosine)}
      for a, b, cosine in measures.alike(cosines, pairs)
    ]
    for what, cosines in (more["cosines"] or {}).items()
  }
  return found


def _experts(decisions, text, loads, knowledge, more) -> list[dict[str, Any]]:
  """Returns what there is to tell of each expert."""
  tokens, places = _TOLD[decisions.num_experts <= _FEW]
  liked = measures.preferred(decisions, decisions.ids, tokens)
  seen = measures.contexts(decisions, places, text.decode)
  experts = []
  for e in range(decisions.num_experts):
    row = {"expert": e}
    if more["kinds"]:
      row["kind"] = more["kinds"][e]
    row |= {key: _short(each[e]) for key, each in loads.items()}
    row["bits"] = _short(knowledge.bits[e])
    row["shuffled"] = _short(knowledge.shuffled[e])
    if more["without"] and e in more["without"]:
      row["loss_without"] = _short(more["without"][e])
    row["tokens"] = [
      [text.vocabulary.spelt(token), edges, _short(lift)]
      for token, edges, lift in liked[e]
    ]
    row["contexts"] = [[_short(gate), *around] for gate, *around in seen[e]]
    experts.append(row)
  return experts


def _short(value: Any) -> Any:
  """Rounds to four digits, as all numbers of the report are but counts."""
  value = float(value)
  if not np.isfinite(value):
    return value
  rounded = value if value == round(value) else float(f"{value:.4g}")
  return int(rounded) if rounded == round(rounded) else rounded


def _of_kinds(kinds, loads):
  """Returns what experts of each kind get together."""
  return [
    {"kind": kind, "experts": kinds.count(kind)}
    | {
      name: _short(each[np.equal(kinds, kind)].sum())
      for name, each in loads.items()
    }
    for kind in dict.fromkeys(kinds)
  ]


def _drops(decisions, layout, groups):
  """Yields the edges that lead nowhere, by cause, and their part of all."""
  lost = groups["full"] if groups else 0
  every = max(decisions.expert.size, 1)

  def row(cause, edges, of):
    return {"cause": cause, "edges": int(edges), "part": _short(edges / of)}

  if groups:
    yield row("group of experts full", lost, max(groups["sent"], 1))
  if not layout.by_token or layout.levels > 1:
    yield row("expert full", decisions.dropped.sum(), every)
    return
  for choice in range(layout.edges // layout.tokens):
    own = decisions.dropped & (decisions.choice == choice)
    yield row(f"expert full, choice {choice + 1}", own.sum(), every)


def _knowledge(decisions, text, side):
  """Returns what experts tell of tokens, in all and by expert."""
  rng = np.random.default_rng(0)
  N = decisions.ids.size
  some = np.ones(N, bool)
  if N > _INFORMED:
    some[:] = False
    some[rng.choice(N, _INFORMED, replace=False)] = True
  # 0 at the first of a sentence, where nothing is before.
  before = np.where(decisions.position == 0, 0, np.roll(decisions.ids, 1) + 1)
  ids, before = decisions.ids[some], before[some]
  labels = [(kind, own[some]) for kind, own, _ in text.labels(side)]
  position = np.log2(decisions.position[some] + 1).astype(int)
  decisions = decisions.of(some)

  def known(labels, given=None):
    return measures.knowledge(decisions, labels, rng, given, _SHUFFLES)

  of_token = known(ids)
  every = [
    ("token", of_token),
    ("token before, beyond the token", known(before, ids)),
    ("position", known(position)),
    *((kind, known(own)) for kind, own in labels),
  ]
  return [
    {"about": about, **{n: _short(v) for n, v in each.total.items()}}
    for about, each in every
  ], of_token


def _lifts(decisions, labels, about):
  """Returns how much more often experts read some labels than all do.

  Of many experts the busiest; `about` says what to tell of each label.
  """
  label, expert, count = measures.occurrences(decisions, labels)
  own, of_label = decisions.per_expert(), np.bincount(label, count)
  best = set(np.argsort(-own, kind="stable")[:_FEW].tolist())
  names = np.unique(labels).tolist()
  return [
    {
      "expert": int(e),
      **about(names[n]),
      "edges": int(edges),
      "lift": _short(edges * count.sum() / (of_label[n] * own[e])),
    }
    for n, e, edges in zip(label, expert, count, strict=True)
    if e in best
  ]


def _training(loads, few):
  """Returns the part of all edges that experts got, over training.

  Of few experts each one's; of many, how they are spread.
  """
  if loads is None:
    return []
  steps, counts = loads
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  share *= counts.shape[1]
  # No more points than a picture has columns.
  some = np.unique(np.linspace(0, len(steps) - 1, 100).astype(int))
  if few:
    return [
      {"step": int(steps[t]), "expert": e, "load": _short(share[t, e])}
      for t in some
      for e in range(share.shape[1])
    ]
  spread = {"least": 0, "tenth": 0.1, "median": 0.5, "ninth": 0.9, "most": 1}
  return [
    {"step": int(steps[t])}
    | {n: _short(np.quantile(share[t], q)) for n, q in spread.items()}
    for t in some
  ]


# -- what the trace does not have ---------------------------------------------


def _kinds(reader: Reader, name: str) -> list[str]:
  """Returns the kind of every expert, where a layer has several; else none."""
  mixture = reader.mixtures[name]
  experts = getattr(mixture, "secondary", mixture).experts
  if not isinstance(experts, Mixed):
    return []
  of_one = [
    type(kind).__name__
    for kind in experts.kinds
    for _ in range(kind.num_experts)
  ]
  # Of two levels, every group of experts has the same.
  return of_one * (reader.layers[name].experts // len(of_one))


def _smooth_load(reader: Reader) -> dict[str, np.ndarray]:
  """Returns the load that the balance loss sees in training (eq. 10).

  Of a sample of the text, scaled to what all of it would have.
  """
  reader.choose(as_in_training=True)
  sums: dict[str, np.ndarray] = {}
  tokens = 0
  for batch, found in reader.read(limit=8):
    tokens += int(batch["mask"].sum())
    for name, layer in found.items():
      sums[name] = sums.get(name, 0) + layer["load"].astype(float)
  return {n: own * (reader.rows.num_words / tokens) for n, own in sums.items()}


def _without(
  reader: Reader, layers: Sequence[str], number: int
) -> dict[str, dict[int, float]]:
  """Returns what the loss of a sample gains without an expert, in nats.

  The edges to it lead nowhere, as if it were full; the other gates stay.
  """
  # Where a layer decides at two levels, no decisions can be given.
  two_levels = any(each.levels > 1 for each in reader.layers.values())
  if not number or two_levels:
    return {}
  decided, tokens = [], 0
  for batch, found in reader.read():
    decided.append(
      {
        name: Assignment(
          layer["expert"],
          layer["gate"],
          None if reader.layers[name].by_token else layer["token"],
        )
        for name, layer in found.items()
      }
    )
    tokens += int(batch["mask"].sum())
    if tokens >= _SAMPLE:
      break

  def loss(layer=None, expert=None):
    def changed(decisions):
      if layer is None:
        return decisions
      own = decisions[layer]
      out = own.expert == expert
      own = own._replace(
        expert=np.where(out, reader.layers[layer].experts, own.expert),
        gate=np.where(out, 0, own.gate),
      )
      return decisions | {layer: own}

    given = map(changed, decided)
    for _ in reader.read(lambda batch: next(given), len(decided), quiet=True):
      pass
    return reader.loss

  own = loss()
  found = {}
  bar = terminal.bar(number, "expert", "taking away")
  with bar:
    for i, name in enumerate(layers):
      E = reader.layers[name].experts
      edges = [d[name].expert.ravel() for d in decided]
      count = np.bincount(np.concatenate(edges), minlength=E + 1)[:E]
      # The first layers have one more where these do not divide.
      own_number = number // len(layers) + (i < number % len(layers))
      busiest = np.argsort(-count, kind="stable")[:own_number]
      for e in busiest.tolist():
        found.setdefault(name, {})[e] = loss(name, e) - own
        bar.update()
  return found


def _cosines(reader: Reader) -> dict[str, dict[str, np.ndarray]]:
  """Returns how alike experts are: the cosines of their weights and outputs.

  Weights are compared as they lie: experts that have the same hidden units in
  another order are not alike. Outputs are of the same tokens of the first
  batch, whoever would read them, in a row.
  """
  compared = [
    n for n, each in reader.layers.items() if each.experts <= _COMPARED
  ]
  flat = apart(
    flax.traverse_util.flatten_dict(nn.unbox(reader.params)), *reader.places
  )
  found: dict[str, dict[str, np.ndarray]] = {name: {} for name in compared}
  with sharding.use(reader.built.layout, reader.built.mesh):
    for name in compared:
      E, path = reader.layers[name].experts, tuple(name.split("/"))
      leaves = [
        leaf.reshape(E, -1)
        for where, leaf in flat.items()
        if where[: len(path)] == path
        and "experts" in where[len(path) :]
        and leaf.size % E == 0
      ]
      if leaves and not _kinds(reader, name):
        found[name]["weights"] = np.asarray(jax.jit(_cosine)(leaves))
    outputs = reader.look(_outputs(compared))
  for name, cosine in outputs.items():
    if cosine is not None:
      found[name]["outputs"] = cosine
  return found


def _cosine(leaves):
  """The cosines of experts whose numbers [E, W] lie in some arrays."""
  dots = sum(jnp.matmul(x, x.T, precision="highest") for x in leaves)
  norm = jnp.sqrt(jnp.maximum(jnp.diagonal(dots), 1e-30))
  return dots / (norm[:, None] * norm[None])


def _outputs(compared):
  """Returns what looks at a mixture's call: the cosines of its outputs."""

  def look(module: nn.Module, name: str, x: jax.Array, real: np.ndarray):
    if name not in compared or not isinstance(module, MoE):
      return None
    E, D = module.experts.num_experts, x.shape[-1]
    number = int(np.clip(_OUTPUTS // (E * D), 8, 256))
    some = np.flatnonzero(real)
    some = some[
      np.linspace(0, some.size - 1, min(number, some.size)).astype(int)
    ]
    rows = x.reshape(-1, D)[some]
    rows = jnp.broadcast_to(rows, (E, *rows.shape))
    weights = module.declare_experts(D, train=False)
    y = module.expert_fn(module.experts, False)(weights, rows)
    return _cosine([y.astype(jnp.float32).reshape(E, -1)])

  return look
