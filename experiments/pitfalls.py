"""Question: what does each departure from the 2017 gate cost in a run?

Method: a small model, configs/tiny.py with 32 experts of which 4 are active,
and beside it the same with one thing done as popular code does it; where it is
done so, docs/pitfalls.md says. 400 steps on the same batches, three seeds, each
with the same first parameters and noise. `test` is the mean test perplexity per
word, `test_least` and `test_most` its span. The busiest expert's tokens over
the mean, and the edges dropped, are means over the last tenth of training; they
are counted, whatever a variant calls load. `test_dropped` is that of the test.
Where the loss ends to be finite, `nan_at_step` says when. "a sentence a row"
has rows of padding for the last variant to count.

Result: perplexity hardly tells. Seven of nine gates and losses are within 0.4
of the paper's 187.0, whose seeds span 4.6: the importance loss balances by
itself. Softmax before top-k is at 190.2, constant noise at 184.9, less noise
being better in so short a run. A load without gradient leaves the busiest
expert at 1.26 times the mean, not 1.20. Padding that is counted has 14 % of
edges dropped in the test in place of 0.1 %. Std over mean is NaN at step 1
(results/pitfalls.csv).
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax import files, gating, losses, sharding
from moejax.data import batches, corpora, packing
from moejax.routing import Assignment, Routing, make_routing
from moejax.training import evaluators, session, state, step

FIELDS = {
  "data.min_count": 20,
  "model.moe.num_experts": 32,
  "model.moe.router.k": 4,
  "model.moe.experts.hidden": 32,
  "train.steps": 400,
}

# -- gates, which take what `gating.noisy_top_k` does -------------------------

_paper, _paper_top_k = gating.noisy_top_k, gating.top_k


def softmax_first(logits, noise_std, k, rng, mask=None) -> Routing:
  """Gates are shares of the softmax over all experts: their sum is below 1."""
  found = _paper(logits, noise_std, k, rng, mask)
  shares = gating.softmax_top_k(found.logits, k, mask)
  return shares._replace(load=found.load)


def load_of_shares(logits, noise_std, k, rng, mask=None) -> Routing:
  """Thresholds come from the softmax, and logits are compared with them."""
  found = _paper(logits, noise_std, k, rng, mask)
  values, _ = jax.lax.top_k(jax.nn.softmax(found.logits), k + 1)
  kth, next_best = values[..., k - 1, None], values[..., k, None]
  limit = jnp.where(found.logits > next_best, next_best, kth)
  return found._replace(load=_load(logits, limit, noise_std, mask))


def one_threshold(logits, noise_std, k, rng, mask=None) -> Routing:
  """Every expert is to beat the k-th value, the k-th expert its own."""
  found = _paper(logits, noise_std, k, rng, mask)
  limit = jax.lax.top_k(found.logits, k)[0][..., -1:]
  return found._replace(load=_load(logits, limit, noise_std, mask))


def _load(logits, limit, noise_std, mask):
  chance = jax.scipy.stats.norm.cdf((logits - limit) / noise_std)
  real = True if mask is None else mask[..., None]
  return jnp.where(real, chance, 0).sum(axis=1)


def noise_of_gate(logits, noise_std, k, rng, mask=None) -> Routing:
  """The noise is scaled by x W_g in place of x W_noise."""
  del noise_std
  return _paper(logits, jax.nn.softplus(logits) + 1e-2, k, rng, mask)


def constant_noise(logits, noise_std, k, rng, mask=None) -> Routing:
  """The noise has a standard deviation of 1/E."""
  std = jnp.full_like(noise_std, 1 / logits.shape[-1])
  return _paper(logits, std, k, rng, mask)


def clean_gates(logits, noise_std, k, rng, mask=None) -> Routing:
  """Noise chooses experts, whose gates are those without noise."""
  found = _paper(logits, noise_std, k, rng, mask)
  (G, S, E), expert = logits.shape, found.assignment.expert
  by_token = expert.reshape(G, k, S).swapaxes(1, 2)
  clean = jnp.take_along_axis(logits, by_token, axis=-1, mode="clip")
  gate = jax.nn.softmax(clean).swapaxes(1, 2).reshape(expert.shape)
  edges = Assignment(expert, jnp.where(expert < E, gate, 0))
  return make_routing(edges, found.logits, mask)._replace(load=found.load)


def counted_load(logits, noise_std, k, rng, mask=None) -> Routing:
  """Load is the count, which has no gradient."""
  found = _paper(logits, noise_std, k, rng, mask)
  return found._replace(load=found.count)


def softmax_importance(logits, noise_std, k, rng, mask=None) -> Routing:
  """Importance sums the softmax over all clean logits, not the gates."""
  found = _paper(logits, noise_std, k, rng, mask)
  real = True if mask is None else mask[..., None]
  shares = jnp.where(real, jax.nn.softmax(logits), 0)
  return found._replace(importance=shares.sum(axis=1))


def padding_counted(logits, noise_std, k, rng, mask=None) -> Routing:
  """Padding is routed, weighed and counted."""
  return _paper(logits, noise_std, k, rng)


def choices_by_token(routing: Routing) -> Routing:
  """All choices of a token come before the first of the next token."""
  (G, S, _), edges = routing.logits.shape, routing.assignment
  expert, gate, token = (
    a.reshape(G, -1, S).swapaxes(1, 2).reshape(G, -1)
    for a in (edges.expert, edges.gate, edges.tokens(S))
  )
  return routing._replace(assignment=Assignment(expert, gate, token))


# -- what else is replaced ----------------------------------------------------


def std_over_mean(x):
  """The square of std over mean, whose gradient is 0/0 where all are equal."""
  return (jnp.std(x) / jnp.mean(x)) ** 2


_pack = packing.pack


def sentence_a_row(tokens, *lengths):
  """Gives every sentence a row, to be filled up with padding."""

  def assign(sources, targets, *lengths):
    return np.arange(len(targets))

  with mock.patch.object(packing, "_assign", assign):
    # Not among what other runs keep of the text.
    return _pack(tokens._replace(folder=None), *lengths)


class Variant(NamedTuple):
  """What is done otherwise.

  Attributes:
    gate: in place of `gating.noisy_top_k`.
    top_k: in place of `gating.top_k`, in evaluation.
    more: (module, name) -> what stands in its place.
    fields: changes of the config.
  """

  gate: Callable = _paper
  top_k: Callable = _paper_top_k
  more: Mapping[tuple[Any, str], Callable] = {}
  fields: Mapping[str, Any] = {}

  @contextlib.contextmanager
  def replaced(self):
    """Does it so."""
    gates = {(gating, "noisy_top_k"): self.gate, (gating, "top_k"): self.top_k}
    with contextlib.ExitStack() as stack:
      for (where, name), fn in (gates | self.more).items():
        stack.enter_context(mock.patch.object(where, name, fn))
      yield


_PADDED = {(packing, "pack"): sentence_a_row}
VARIANTS = {
  "as in the paper": Variant(),
  "softmax before top-k": Variant(softmax_first, gating.softmax_top_k),
  "load of shares": Variant(load_of_shares),
  "one threshold": Variant(one_threshold),
  "noise of the gate": Variant(noise_of_gate),
  "constant noise": Variant(constant_noise),
  "clean gates": Variant(clean_gates),
  "counted load": Variant(counted_load),
  "balance of each group": Variant(fields={"aux.scope": "group"}),
  "choices by token": Variant(
    lambda *given: choices_by_token(_paper(*given)),
    lambda *given: choices_by_token(_paper_top_k(*given)),
  ),
  "std over mean": Variant(
    softmax_importance, more={(losses, "cv_squared"): std_over_mean}
  ),
  "a sentence a row": Variant(more=_PADDED),
  "padding counted": Variant(
    padding_counted,
    lambda logits, k, mask=None: _paper_top_k(logits, k),
    more=_PADDED,
  ),
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per variant; a full run goes on from the last one it knew."""
  with training.folder("pitfalls", quick) as runs:
    runs.mkdir(parents=True, exist_ok=True)
    data = None
    for name in ("one threshold", "std over mean") if quick else VARIANTS:
      kept = runs / f"{name.replace(' ', '_')}.json"
      if not kept.exists():
        config = training.load("tiny", {**FIELDS, **VARIANTS[name].fields})
        if quick:
          training.shrink(config, runs)
        experiment = config_lib.parse(config)
        data = data or config_lib.open_corpus(experiment)
        with VARIANTS[name].replaced():
          row = _train(experiment, data, 1 if quick else training.SEEDS)
        files.write_whole(kept, json.dumps({"variant": name, **row}))
      yield json.loads(kept.read_text())


def _train(
  experiment: config_lib.Experiment, data: corpora.Corpus, seeds: int
) -> figures.Row:
  """Trains with each seed by one program, and returns what is in a row."""
  begin = time.process_time()
  built = session.build(experiment, len(data.vocabulary), jax.devices()[:1])
  of_step = functools.partial(
    step.train_step,
    model=built.model,
    tx=built.tx,
    aux_weights=experiment.aux_weights,
    aux_scope=experiment.aux_scope,
  )
  step_fn = jax.jit(of_step, donate_argnums=0)
  where = built.layout, built.mesh
  rows, size = data.rows("train"), experiment.batch_size
  evaluate = evaluators.losses_of(built.model, size, *where)
  steps, tests, last = experiment.train.steps, [], []
  for seed in range(seeds):
    current = state.create(built.model, built.tx, built.shapes, seed, *where)
    given = batches.train_batches(rows, size, seed)
    for at in range(1, steps + 1):
      batch = step.place(next(given), built.batch_sharding)
      with sharding.use(*where):
        current, measured = step_fn(current, batch, seed=jnp.int32(seed))
      if not np.isfinite(measured["grad_norm"]):
        return {"seeds": seed + 1, "nan_at_step": at}
      if at > 0.9 * steps:
        last.append(jax.device_get(measured))
    tests.append(evaluate(current.params, data.rows("test")))
  perplexity = [test["perplexity"] for test in tests]
  return {
    "seeds": seeds,
    "nan_at_step": None,
    **harness.rounded(
      2,
      test=np.mean(perplexity),
      test_least=min(perplexity),
      test_most=max(perplexity),
    ),
    **harness.rounded(
      max_over_mean=np.mean([each["max_over_mean_count"] for each in last]),
      dropped=np.mean([each["dropped_fraction"] for each in last]),
      test_dropped=np.mean([test["dropped_fraction"] for test in tests]),
      cv_importance=np.mean([each["cv_importance"] for each in last]),
    ),
    "minutes": round((time.process_time() - begin) / 60, 1),
  }


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  ended = [row for row in table if row.get("test")]
  meanings = {
    "test": "test perplexity",
    "max_over_mean": "busiest expert / mean",
    "test_dropped": "edges dropped in the test",
  }
  names = [row["variant"] for row in ended]
  for axes, column in figures.panels(figure, 4.6, meanings, sharey=True):
    for place, row in enumerate(ended):
      color = figures.SPARSE if place else figures.DENSE
      if column == "test":
        span = [row["test_least"], row["test_most"]]
        axes.plot(span, [place] * 2, color=color)
      axes.plot(row[column], place, "o", color=color)
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.1)
  axes.set_ylim(len(names) - 0.5, -0.5)
  broken = [row for row in table if row["nan_at_step"]]
  said = "".join(
    f"; {row['variant']} is NaN at step {row['nan_at_step']}" for row in broken
  )
  span = figures.span([row["test"] for row in ended], "{:.0f}")
  most = max(ended, key=lambda row: row["test_dropped"])
  percent = 100 * most["test_dropped"]
  return (
    f"Test perplexity is {span} whatever departs from the paper;"
    f" {most['variant']} drops {percent:.0f} % of edges{said}"
  )


if __name__ == "__main__":
  harness.main("pitfalls", rows, draw)
