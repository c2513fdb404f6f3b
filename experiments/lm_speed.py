"""Question: how fast does the paper's MoE-32 train, beside torch's twin?

Method: words a second of whole training steps (forward, backward, Adam) of
configs/lm1b/moe_32.py: embedding, LSTM, 32 experts, LSTM, all 512 wide, dropout
0.1, float32; 10,000 words, softmax over 8192 samples and the target. "torch" is
the same of `torch.nn.LSTM`, the package mixture-of-experts as in layer_speed (2
of 32 experts a token), the same dropout, the same samples and fused Adam. Ours
visits 4 experts a token, as in the paper, or 2, as the peer does. "dense" is
the twin without a choice, moe_1_wide. A class that is drawn again is scored
once by ours; by torch's twins as often as it is drawn, by those called
"distinct" once. All take turns in one process on random words; ms is the median
of the repeats, fastest_ms the least disturbed one, from which words a second
come, `speedup` over the first kind of twin and `of_distinct` over the second.

"part" rows say where a step of the mixture goes: parts compiled by themselves,
forward and backward, on the same shapes; "other" is what they leave of a step.

Result: with as many experts a token 1.45 times the words a second of torch's
twin at 32 rows of 32 words and 1.63 at 32 rows of 128; with 4 against the
peer's 2, 1.21 and 1.35; dense 1.27 and 1.41 (two quiet cores of an AMD EPYC,
results/lm_speed.csv). The softmax makes that: given ours, torch has 1.04 and
1.13 with 2 of 32, 0.87 and 0.94 with 4, dense 0.87 and 0.99.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import (
  figures,
  harness,
  layer_speed,
  training,
)
from moejax import config as config_lib
from moejax import losses
from moejax.models import layers
from moejax.moe import ROUTING

SEED = 0
VOCABULARY = training.VOCABULARY
SIZES = ((32, 32), (32, 128))
# The models of torch's twins, and of those that score a class once.
TWINS = {
  f"{name}{suffix}": (name, bool(suffix))
  for suffix in ("", ", distinct")
  for name in ("moe", "dense")
}
LABELS = {
  "moejax": {"moe": "4 of 32", "moe, 2 of 32": "2 of 32", "dense": "dense"},
  "torch": {
    "moe": "2 of 32",
    "moe, distinct": "2 of 32, distinct samples",
    "dense": "dense",
    "dense, distinct": "dense, distinct samples",
  },
}
PARTS = ("embedding", "LSTMs", "router", "mixture", "dropout", "softmax")
PARTS += ("optimizer",)


def rows(quick: bool) -> figures.Rows:
  """Yields the rows of both tables, for each size of a batch."""
  for size in ((2, 4),) if quick else SIZES:
    at = {"rows": size[0], "length": size[1]}
    with training.roughly_compiled(quick):
      candidates = runs(size, quick)
    times = harness.interleaved(candidates, 2 if quick else 9)
    ms = {label: each.fastest for label, each in times.items()}
    for (table, by, name), ours in times.items():
      if table == "part":
        continue
      row = {
        "ms": round(ours.median, 1),
        "fastest_ms": round(ours.fastest, 1),
        "words_per_second": round(1e3 * size[0] * size[1] / ours.fastest),
      }
      twin = name.partition(",")[0]
      for column, other in {"speedup": "", "of_distinct": ", distinct"}.items():
        theirs = ms.get(("step", "torch", twin + other))
        row[column] = theirs and round(theirs / ours.fastest, 2)
      yield {"table": "step"} | at | {"by": by, "what": name} | row
    for by in dict.fromkeys(by for _, by, _ in ms):
      step = ms["step", by, "moe"]
      parts = {name: ms["part", by, name] for name in PARTS}
      parts["experts"] = parts.pop("mixture") - parts["router"]
      parts["other"] = step - sum(parts.values())
      for name, fastest in parts.items():
        row = {"by": by, "what": name, "fastest_ms": round(fastest, 1)}
        of_step = {"of_step": round(fastest / step, 3)}
        yield {"table": "part"} | at | row | of_step


def runs(
  size: tuple[int, int], quick: bool
) -> dict[tuple[str, str, str], Callable[[], Any]]:
  """Returns all steps and parts, by table, implementation and name."""
  fields = {"data.batch_size": size[0], "data.row_length": size[1]}
  fields["train.microbatches"] = 1  # as torch's
  if quick:
    fields |= {"model.width": 8, "model.num_samples": 16}
  files = {"moe": "moe_32", "dense": "moe_1_wide", "moe, 2 of 32": "moe_32"}
  if quick:
    del files["moe, 2 of 32"]
  configs = {}
  for name, file in files.items():
    configs[name] = training.load(f"lm1b/{file}", fields)
    training.regroup(configs[name], size[0] * size[1])
    if name == "moe, 2 of 32":
      configs[name].model.moe.router.k = 2
  found = {
    ("step", "moejax", name): training.random_step(config)
    for name, config in configs.items()
  }
  ours = parts(configs["moe"])
  found |= {("part", "moejax", name): run for name, run in ours.items()}
  with harness.if_installed("torch's twins"):
    twins = {
      name: Twin(configs[of], distinct)
      for name, (of, distinct) in TWINS.items()
    }
    found |= {("step", "torch", name): twin for name, twin in twins.items()}
    theirs = torch_parts(twins["moe"])
    found |= {("part", "torch", name): run for name, run in theirs.items()}
  return found


def parts(config: config_lib.Config) -> dict[str, Callable[[], Any]]:
  """Returns the parts of our training step of a mixture, by gradients."""
  experiment = config_lib.parse(config)
  model, weights = experiment.model(VOCABULARY), experiment.aux_weights
  shape = (config.data.batch_size, config.data.row_length)
  key = jax.random.key(SEED)
  words = jax.random.randint(key, shape, 0, VOCABULARY)
  start = jnp.zeros(shape, bool)
  batch = {"inputs": words, "targets": words, "mask": ~start, "start": start}
  init = jax.jit(functools.partial(model.init, method="loss"))
  params = nn.unbox(init(key, batch)["params"])
  first, moe, second = (params[f"layers_{i}"] for i in range(3))
  x = jax.random.normal(key, (*shape, config.model.width))

  # Each of its parameters, x, and the batch, which is no constant of the
  # program.
  def embedding(table, x, batch):
    return jnp.square(layers.look_up(table, batch["inputs"])).mean()

  def lstms(params, x, batch):
    for lstm, own in zip(model.layers[::2], params, strict=True):
      x = lstm.apply({"params": own}, x, batch["start"])
    return jnp.square(x).mean()

  def router(params, x, batch):
    x = x.reshape(1, -1, x.shape[-1])
    rngs = {"router": batch["key"]}
    routing = model.layers[1].router.apply(
      {"params": params}, x, train=True, rngs=rngs
    )
    auxiliary, _ = losses.auxiliary([routing], weights)
    return jnp.square(routing.assignment.gate).mean() + auxiliary

  def mixture(params, x, batch):
    rngs = {"router": batch["key"]}
    y, sown = model.layers[1].apply(
      {"params": params}, x, train=True, rngs=rngs, mutable=[ROUTING]
    )
    return jnp.square(y).mean() + losses.auxiliary(sown, weights)[0]

  def dropout(params, x, batch):
    drop = nn.Dropout(model.dropout, deterministic=False)
    for place in range(1 + len(model.layers)):
      rngs = {"dropout": jax.random.fold_in(batch["key"], place)}
      x = drop.apply({}, x, rngs=rngs)
    return jnp.square(x).mean()

  def softmax(params, x, batch):
    return model.apply(
      {"params": {"head": params}},
      rngs={"softmax": batch["key"]},
      method=lambda model: model.head.loss(x, batch["targets"], train=True),
    ).mean()

  def by_gradient(loss, params, x):
    def run(params, x, batch, before):
      del before
      return jax.grad(loss, (0, 1))(params, x, batch)

    zeros = jax.tree.map(jnp.zeros_like, (params, x))
    data = batch | {"key": key}
    return layer_speed.Program(run, params, x, data, donated=zeros)

  def update(gradients, before):
    params, state = before
    updates, state = experiment.tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  own = jax.tree.map(jnp.copy, params)
  before = own, experiment.tx.init(own)
  return {
    "embedding": by_gradient(embedding, params["embed"]["table"], ()),
    "LSTMs": by_gradient(lstms, (first, second), x),
    "router": by_gradient(router, moe["router"], x),
    "mixture": by_gradient(mixture, moe, x),
    "dropout": by_gradient(dropout, (), x),
    "softmax": by_gradient(softmax, params["head"], x),
    "optimizer": layer_speed.Program(update, params, donated=before),
  }


# -- torch's ------------------------------------------------------------------


class Twin:
  """The model of a config, made of torch's modules.

  Where `distinct`, the softmax scores a class that is drawn twice once.
  """

  def __init__(self, config: config_lib.Config, distinct: bool):
    import torch

    model, width = config.model, config.model.width
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

  def __call__(self) -> None:
    """Updates the parameters once, by nats per word and the balance loss."""
    self.adam.zero_grad()
    first, second = self.lstms
    x = self.drop(self.embed(self.words))
    x = x + self.drop(first(x)[0])
    y, auxiliary = self.mix(x)
    x = x + self.drop(y.sigmoid())
    x = x + self.drop(second(x)[0])
    (self.softmax(x) + auxiliary).backward()
    self.adam.step()

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


def torch_parts(twin: Twin) -> dict[str, Callable[[], Any]]:
  """Returns the parts of the training step of a twin's mixture."""
  import torch

  shape = (*twin.words.shape, twin.embed.embedding_dim)
  x = torch.randn(*shape, requires_grad=True)

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

  every = (lambda: twin.embed(twin.words).square().mean(), lstms, router)
  every += (mixture, dropout, lambda: twin.softmax(x))
  # The optimizer's is by the gradient that the last step has left.
  programs = [*map(by_gradient, every), twin.adam.step]
  return dict(zip(PARTS, programs, strict=True))


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  figure.set_size_inches(8, 4.4)
  speed, where = figure.subplots(1, 2)
  size = (table[0]["rows"], table[0]["length"])
  first = [row for row in table if (row["rows"], row["length"]) == size]
  whole = [row for row in first if row["table"] == "step"]
  whole.sort(key=lambda row: "moe" not in row["what"])
  colors = {
    "moejax": (figures.DENSE, figures.SPARSE),
    "torch": (figures.PALE_DENSE, figures.PALE_SPARSE),
  }
  names = [f"{row['by']}, {LABELS[row['by']][row['what']]}" for row in whole]
  words = {"words": [row["words_per_second"] for row in whole]}
  own = [colors[row["by"]]["moe" in row["what"]] for row in whole]
  figures.bars(speed, names, words, own)
  speed.set_xlabel(f"words a second, {size[0]} rows of {size[1]}")
  parts = [row for row in first if row["table"] == "part"]
  names = list(dict.fromkeys(row["what"] for row in parts))
  series = {
    by: [row["fastest_ms"] for row in parts if row["by"] == by]
    for by in dict.fromkeys(row["by"] for row in parts)
  }
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
