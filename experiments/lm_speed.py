"""Question: how fast does the paper's MoE-32 train, beside torch's twin?

Method: words a second of whole training steps (forward, backward, Adam) of
configs/lm1b/moe_32.py: embedding, LSTM, 32 experts, LSTM, all 512 wide, dropout
0.1, float32; 10,000 words, softmax over 8192 samples and the target. "torch" is
the same of `torch.nn.LSTM`, the package mixture-of-experts as in layer_speed (2
of 32 experts a token, a slot for 1.25 of all edges), the same dropout, the same
samples and fused Adam. Ours visits 4 experts a token, as in the paper, or 2, as
the peer does. "dense" is the twin without a choice, moe_1_wide, of a block of
hidden width 4096 in both. A class that was drawn again is scored once by ours,
2570 of 8192; by torch's twins as often as it was drawn, by those called
"distinct" once. All take turns in one process on random words; ms is the median
of the repeats, fastest_ms the least disturbed one, from which words a second
come, `speedup` over the first kind of twin and `of_distinct` over the second.

"part" rows say where a step of the mixture goes: parts compiled by themselves,
forward and backward, on the same shapes; "other" is what they leave of a step.

Beside other work the ratios mean nothing: a busy core stops all of torch.

Result: with as many experts a token (2 of 32) 1.45 times the words a second of
torch's twin at 32 rows of 32 words and 1.63 at 32 rows of 128; with the paper's
4 of 32 against the peer's 2, 1.21 and 1.35; dense 1.27 and 1.41 (two quiet
cores of an AMD EPYC, results/lm_speed.csv). The softmax makes that: given ours,
torch has 1.04 and 1.13 with 2 of 32, 0.87 and 0.94 with 4, dense 0.87 and 0.99.
Before ours did the same products as torch's: 0.93 and 1.17 on an Intel Xeon. A
profile of rows of 128 shows little but products, at 80 to 100 GFLOP/s a core, a
bare one's rate; the softmax was a quarter of a step and is an eighth, the
LSTMs' loop back in time ran at 61 and runs at 99.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import optax

from experiments import (
  expert_count_cost,
  figures,
  harness,
  layer_speed,
  training,
)
from moejax import config as config_lib
from moejax import losses, terminal
from moejax.models import layers
from moejax.moe import ROUTING

SEED = 0
VOCABULARY = expert_count_cost.VOCABULARY
SIZES = ((32, 32), (32, 128))
DISTINCT = "distinct"
# Of models in the figure; torch's mixture visits 2 of 32.
LABELS = {
  ("moejax", "moe"): "4 of 32",
  ("moejax", "moe, 2 of 32"): "2 of 32",
  ("torch", "moe"): "2 of 32",
  ("torch", "moe, distinct"): "2 of 32, distinct samples",
  ("moejax", "dense"): "dense",
  ("torch", "dense"): "dense",
  ("torch", "dense, distinct"): "dense, distinct samples",
}

Run = Callable[[], Any]
Runs = dict[str, Run]
# Table, implementation, and which model or part.
Label = tuple[str, str, str]
Times = dict[Label, harness.Milliseconds]


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields the rows of both tables, for each size of a batch."""
  for size in ((2, 4),) if quick else SIZES:
    at = {"rows": size[0], "length": size[1]}
    times = measure(size, quick)
    for row in of_steps(times, size[0] * size[1]):
      yield {"table": "step", **at, **row}
    for by in dict.fromkeys(by for _, by, _ in times):
      for row in of_parts(times, by):
        yield {"table": "part", **at, **row}


def load(
  name: str, size: tuple[int, int], quick: bool, **fields: Any
) -> config_lib.Config:
  """Reads a config of configs/lm1b, for batches of `size`, all one group."""
  config = training.load(f"lm1b/{name}")
  fields |= {"data.batch_size": size[0], "data.row_length": size[1]}
  if quick:
    fields |= {"model.width": 8, "model.num_samples": 16}
  config.update_from_flattened_dict(fields)
  training.regroup(config, size[0] * size[1])
  return config


def measure(size: tuple[int, int], quick: bool) -> Times:
  """Times all steps and parts, in turn."""
  configs = {
    "moe": load("moe_32", size, quick),
    "dense": load("moe_1_wide", size, quick),
  }
  if not quick:
    of_two = {"model.moe.router.k": 2}
    configs["moe, 2 of 32"] = load("moe_32", size, quick, **of_two)
  steps = {n: expert_count_cost.program(c)[0] for n, c in configs.items()}
  runs = labelled("moejax", steps, our_parts(configs["moe"]))
  try:
    twins = {name: Twin(configs[name]) for name in ("moe", "dense")}
    twins |= {
      f"{name}, {DISTINCT}": Twin(configs[name], True) for name in twins
    }
  except ImportError:
    terminal.say(
      "torch or mixture-of-experts is not installed: no rows for them"
    )
  else:
    steps = {name: twin.step for name, twin in twins.items()}
    runs |= labelled("torch", steps, torch_parts(twins["moe"]))
  return harness.interleaved(runs, 2 if quick else 9)


def labelled(by: str, steps: Runs, parts: Runs) -> dict[Label, Run]:
  whole = {("step", by, name): run for name, run in steps.items()}
  return whole | {("part", by, name): run for name, run in parts.items()}


def of_steps(times: Times, words: int) -> Iterator[harness.Row]:
  """Yields a row for each implementation and model."""
  for (table, by, name), ours in times.items():
    if table == "step":
      twin = name.partition(",")[0]
      theirs, distinct = (
        times.get((table, "torch", name))
        for name in (twin, f"{twin}, {DISTINCT}")
      )
      yield {
        "by": by,
        "what": name,
        "ms": round(ours.median, 1),
        "fastest_ms": round(ours.fastest, 1),
        "words_per_second": round(1e3 * words / ours.fastest),
        "speedup": theirs and round(theirs.fastest / ours.fastest, 2),
        "of_distinct": distinct and round(distinct.fastest / ours.fastest, 2),
      }


def of_parts(times: Times, by: str) -> Iterator[harness.Row]:
  """Yields a row for each part of a step, and for what they leave of it."""
  step = times["step", by, "moe"].fastest
  ms = {
    name: t.fastest
    for (table, of, name), t in times.items()
    if (table, of) == ("part", by)
  }
  ms["experts"] = ms.pop("mixture") - ms["router"]
  ms["other"] = step - sum(ms.values())
  for name, fastest in ms.items():
    yield {
      "by": by,
      "what": name,
      "fastest_ms": round(fastest, 1),
      "of_step": round(fastest / step, 3),
    }


# -- ours ---------------------------------------------------------------------


def our_parts(config: config_lib.Config) -> Runs:
  """Returns the parts of our training step of a mixture."""
  model = config_lib.model(config, VOCABULARY)
  shape = (config.data.batch_size, config.data.row_length)
  key = jax.random.key(SEED)
  words = jax.random.randint(key, shape, 0, VOCABULARY)
  start = jnp.zeros(shape, bool)
  batch = {"inputs": words, "targets": words, "mask": ~start, "start": start}
  init = functools.partial(model.init, method="loss")
  params = nn.unbox(jax.jit(init)(key, batch)["params"])
  lstms = params["layers_0"], params["layers_2"]
  moe = params["layers_1"]
  x = jax.random.normal(key, (*shape, config.model.width))
  weights, _ = config_lib.aux(config)
  return {
    "embedding": gradient(embedding, params["embed"]["table"], (), words),
    "LSTMs": gradient(functools.partial(both_lstms, model), lstms, x, start),
    "router": gradient(
      functools.partial(router, model, weights), moe["router"], x, key
    ),
    "mixture": gradient(
      functools.partial(mixture, model, weights), moe, x, key
    ),
    "dropout": gradient(functools.partial(dropout, model), (), x, key),
    "softmax": gradient(
      functools.partial(softmax, model), params["head"], x, words, key
    ),
    "optimiser": optimiser(config, params),
  }


def embedding(table, x, words):
  del x
  return jnp.square(layers.look_up(table, words)).mean()


def both_lstms(model, params, x, start):
  for lstm, own in zip(model.layers[::2], params, strict=True):
    x = lstm.apply({"params": own}, x, start)
  return jnp.square(x).mean()


def router(model, weights, params, x, key):
  x = x.reshape(1, -1, x.shape[-1])
  routing = model.layers[1].router.apply(
    {"params": params}, x, train=True, rngs={"router": key}
  )
  auxiliary, _ = losses.auxiliary([routing], weights)
  return jnp.square(routing.assignment.gate).mean() + auxiliary


def mixture(model, weights, params, x, key):
  y, sown = model.layers[1].apply(
    {"params": params}, x, train=True, rngs={"router": key}, mutable=[ROUTING]
  )
  auxiliary, _ = losses.auxiliary(sown, weights)
  return jnp.square(y).mean() + auxiliary


def dropout(model, params, x, key):
  del params
  drop = nn.Dropout(model.dropout, deterministic=False)
  for place in range(1 + len(model.layers)):
    x = drop.apply({}, x, rngs={"dropout": jax.random.fold_in(key, place)})
  return jnp.square(x).mean()


def softmax(model, params, x, words, key):
  loss = model.apply(
    {"params": {"head": params}},
    x,
    words,
    rngs={"softmax": key},
    method=lambda model, *args: model.head.loss(*args, train=True),
  )
  return loss.mean()


def gradient(
  loss: Callable[..., jax.Array], params: Any, x: Any, *args: jax.Array
) -> Callable[[], Any]:
  """Compiles the gradient of loss(params, x, *args) by the first two."""

  def run(params, x, *args_and_before):
    return jax.grad(loss, (0, 1))(params, x, *args_and_before[:-1])

  zeros = jax.tree.map(jnp.zeros_like, (params, x))
  return layer_speed.Program(run, params, x, *args, donated=zeros).run


def optimiser(config: config_lib.Config, params: Any) -> Callable[[], Any]:
  """Compiles an update, by a gradient that is always the same."""
  _, tx = config_lib.optimizer(config)

  def run(gradients, before):
    params, state = before
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  own = jax.tree.map(jnp.copy, params)
  return layer_speed.Program(run, params, donated=(own, tx.init(own))).run


# -- torch's ------------------------------------------------------------------


class Twin:
  """The model of a config, made of torch's modules."""

  def __init__(self, config: config_lib.Config, distinct: bool = False):
    """Makes the modules; raises ImportError where one of torch's is missing.

    Args:
      config: of the model.
      distinct: whether the softmax scores a class that was drawn twice once.
    """
    import torch

    model = config.model
    width = model.width
    self.is_mixture = "moe" in model
    if self.is_mixture:
      sizes = model.moe.num_experts, width, model.moe.experts.hidden
      self.middle = layer_speed.peer_layer(*sizes)
    else:
      self.middle = layer_speed.peer_dense(width, model.one_expert.hidden)
    self.embed, self.head = (
      torch.nn.Embedding(VOCABULARY, width) for _ in range(2)
    )
    for table in (self.embed, self.head):
      # As ours. With torch's own, of variance 1, a softmax is so sure that its
      # gradient is full of subnormal numbers: products take 17 times as long.
      torch.nn.init.normal_(table.weight, std=width**-0.5)
    self.lstms = torch.nn.ModuleList(
      torch.nn.LSTM(width, width, batch_first=True) for _ in range(2)
    )
    self.num_samples, self.distinct = model.num_samples, distinct
    self.drop = torch.nn.Dropout(model.dropout)
    modules = (self.embed, *self.lstms, self.middle, self.head)
    self.parameters = [w for module in modules for w in module.parameters()]
    # The form that is fastest on a CPU.
    self.adam = torch.optim.Adam(self.parameters, fused=True)
    shape = (config.data.batch_size, config.data.row_length)
    self.words = torch.randint(VOCABULARY, shape)

  def step(self) -> None:
    """Updates the parameters once."""
    self.adam.zero_grad()
    self.loss().backward()
    self.adam.step()

  def loss(self) -> Any:
    """Returns nats per word and the package's balance loss, added up."""
    first, second = self.lstms
    x = self.drop(self.embed(self.words))
    x = x + self.drop(first(x)[0])
    y, auxiliary = self.mix(x)
    x = x + self.drop(y.sigmoid())
    x = x + self.drop(second(x)[0])
    return self.softmax(x) + auxiliary

  def grouped(self, x: Any) -> Any:
    length = min(x[..., 0].numel(), layer_speed.PEER_GROUP)
    return x.reshape(-1, length, x.shape[-1])

  def mix(self, x: Any) -> tuple[Any, Any]:
    if not self.is_mixture:
      return self.middle(x), 0.0
    y, auxiliary = self.middle(self.grouped(x))
    return y.reshape(x.shape), auxiliary

  def softmax(self, x: Any) -> Any:
    """The sampled softmax of `models.softmax`, with the fewest passes."""
    import torch

    x, words = x.reshape(-1, x.shape[-1]), self.words.reshape(-1)
    size = math.log(VOCABULARY + 1)

    def log_expected(ids):
      chance = torch.log1p(1 / (ids + 1.0)) / size
      return torch.log(-torch.expm1(self.num_samples * torch.log1p(-chance)))

    ids = torch.exp(torch.rand(self.num_samples) * size).long() - 1
    ids = ids.clamp(0, VOCABULARY - 1).sort().values
    if self.distinct:
      ids = ids.unique_consecutive()
    bias = -log_expected(ids)
    bias[1:][ids[1:] == ids[:-1]] = -math.inf
    others = torch.addmm(bias[None], x, self.head(ids).T)
    others = others.masked_fill_(ids[None] == words[:, None], -math.inf)
    own = (x * self.head(words)).sum(-1) - log_expected(words)
    return (torch.logaddexp(others.logsumexp(-1), own) - own).mean()


def torch_parts(twin: Twin) -> Runs:
  """Returns the parts of the training step of a twin's mixture."""
  import torch

  width = twin.embed.embedding_dim
  x = torch.randn(*twin.words.shape, width, requires_grad=True)

  def lstms():
    y = x
    for lstm in twin.lstms:
      y, _ = lstm(y)
    return y.square().mean()

  def router():
    _, combine, auxiliary = twin.middle.gate(twin.grouped(x))
    return combine.square().mean() + auxiliary

  def mixture():
    y, auxiliary = twin.mix(x)
    return y.square().mean() + auxiliary

  def dropout():
    y = x
    for _ in range(4):
      y = twin.drop(y)
    return y.square().mean()

  def by_gradient(loss):
    by = (x, *twin.parameters)
    return lambda: torch.autograd.grad(loss(), by, allow_unused=True)

  return {
    "embedding": by_gradient(lambda: twin.embed(twin.words).square().mean()),
    "LSTMs": by_gradient(lstms),
    "router": by_gradient(router),
    "mixture": by_gradient(mixture),
    "dropout": by_gradient(dropout),
    "softmax": by_gradient(lambda: twin.softmax(x)),
    # By the gradient that the last step has left.
    "optimiser": twin.adam.step,
  }


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> str:
  """Draws words a second, and where a step goes at the first size."""
  figure.set_size_inches(8, 4.4)
  speed, where = figure.subplots(1, 2)
  size = (table[0]["rows"], table[0]["length"])
  first = [row for row in table if (row["rows"], row["length"]) == size]
  whole = [row for row in first if row["table"] == "step"]
  whole.sort(key=lambda row: "moe" not in row["what"])
  colors = {
    ("moejax", True): figures.SPARSE,
    ("moejax", False): figures.DENSE,
    ("torch", True): figures.PALE_SPARSE,
    ("torch", False): figures.PALE_DENSE,
  }
  figures.bars(
    speed,
    [f"{row['by']}, {LABELS[row['by'], row['what']]}" for row in whole],
    {"words": [row["words_per_second"] for row in whole]},
    [colors[row["by"], "moe" in row["what"]] for row in whole],
  )
  speed.set_xlabel(f"words a second, {size[0]} rows of {size[1]}")
  parts = {
    by: {r["what"]: r["fastest_ms"] for r in first if r["by"] == by}
    for by in dict.fromkeys(row["by"] for row in first)
  }
  names = [row["what"] for row in first if row["table"] == "part"]
  names = list(dict.fromkeys(names))
  series = {by: [ms[name] for name in names] for by, ms in parts.items()}
  figures.bars(where, names, series, (figures.SPARSE, figures.PALE_SPARSE))
  where.set_xlabel("ms of a training step of the mixture")
  ours = {row["what"]: row for row in whole if row["by"] == "moejax"}
  if (speedup := ours["moe"].get("speedup")) is None:
    return f"{ours['moe']['words_per_second']:,} words a second"
  return (
    f"Training with 4 of 32 experts is {speedup:.2f} times as fast as torch's"
    f" with 2 of 32, and {ours['moe, 2 of 32']['speedup']:.2f} times with"
    " as many"
  )


if __name__ == "__main__":
  harness.main("lm_speed", rows, draw, SEED)
