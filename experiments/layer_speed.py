"""Question: what does the layer cost beside a dense block of equal FLOPs?

Method: T tokens, k = 4 experts each, float32, noise-free routing by random
weights, all cores. "dense" is one block of hidden width k * F: the same active
multiply-adds without a choice. Candidates take turns in one process; forward,
and forward+backward with the gradients of input and weights written into the
buffers of the turn before, as a training step has it. ms is the median of the
repeats, of_dense its ratio to the dense block of the same turn. GB is what XLA
sets aside for arguments, results and temporaries, flops its count over the
analytic one, which includes the router (a loop's body is counted once, so it
means nothing for ragged on a CPU). einsum routes in groups of 512, which suits
it best. The peer is the PyTorch package mixture-of-experts (top 2 of E,
capacity for all edges at 1.25), beside a torch block of hidden width 2 * F.

"growth" is the same at D=256, F=128 for E from 4 to 4096. "tpu" rows are
compiled ahead of time for one v5e chip in bfloat16 (needs libtpu, no TPU):
compiled over analytic FLOPs and bytes accessed.

Result: two cores of an AMD EPYC, forward and backward: the best of ours takes
1.11 (E=4), 1.20 (E=32), 1.30 (E=128), 1.49 (E=256) of the dense block. What
grows is the traffic of the weights, read twice and their gradient zeroed and
written once. Compiled for a TPU, ragged does 1.004 to 1.008 times the analytic
FLOPs (results/layer_speed.csv).
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import figures, harness, training
from moejax import experts, moe, router
from moejax.training import session as session_lib

SEED = 0
K = 4
PARTS = ("forward", "both")
CANDIDATES = {
  "einsum": {"dispatch": "einsum", "group_size": 512, "capacity_factor": 1.25},
  "gather": {"dispatch": "gather", "capacity_factor": 1.25},
  "ragged": {"dispatch": "ragged", "capacity_factor": 1.25},
  "dropless": {"dispatch": "ragged", "capacity_factor": None},
}
TPU = "v5e:2x2"
PEER_GROUP = 512


def rows(quick: bool) -> figures.Rows:
  """Yields the rows of the three tables."""
  T, D, F, repeats = (16, 8, 16, 2) if quick else (4096, 512, 1024, 7)
  with training.roughly_compiled(quick):
    for E in (8,) if quick else (4, 32, 128, 256):
      names = ("einsum", "dropless") if quick else tuple(CANDIDATES)
      yield from speed("speed", (E, T, D, F), repeats, names)
      with harness.if_installed("mixture-of-experts of torch"):
        yield from peer(E, T, D, F, repeats)
    for E in (4,) if quick else (4, 16, 64, 256, 1024, 4096):
      names = ("dropless",) if quick else ("gather", "ragged", "dropless")
      yield from speed("growth", (E, T, D // 2, F // 8), repeats, names)
  for E in () if quick else (32, 128):
    with harness.if_installed("a TPU"):
      yield from tpu(E, T, D, F)


def layer(num_experts: int, hidden: int, **options: Any) -> moe.MoE:
  """Returns the layer under test."""
  own = router.TopK(num_experts, K), experts.FeedForward(num_experts, hidden)
  return moe.MoE(*own, **options)


def analytic(E: int, T: int, D: int, F: int) -> int:
  """Returns the FLOPs of router and chosen experts, forward."""
  return 2 * T * (K * 2 * D * F + D * E)


def speed(
  table: str, size: tuple[int, ...], repeats: int, names: Sequence[str]
) -> figures.Rows:
  """Yields a row for the dense block and for each way to dispatch."""
  E, T, D, F = size
  x = jax.random.normal(jax.random.key(SEED), (1, T, D))
  modules = {"dense": moe.MoE(router.Single(), experts.FeedForward(1, K * F))}
  for name in names:
    options = dict(CANDIDATES[name])
    if "group_size" in options:
      options["group_size"] = min(T, options["group_size"])
    modules[name] = layer(E, F, **options)
  programs = {part: {} for part in PARTS}
  for name, module in modules.items():
    # The layer's weights are the same however it sends, and in memory once.
    if name in ("dense", names[0]):
      params = jax.jit(module.init)(jax.random.key(1), x)["params"]
      params = nn.unbox(params)
    for part in PARTS:
      programs[part][name] = program(module, params, x, part)
  for name, row in measured(programs, repeats).items():
    both = programs["both"][name].compiled
    flops = both.cost_analysis().get("flops", 0) / (3 * analytic(*size))
    about = {"table": table, "E": E, "D": D, "F": F, "k": K, "dispatch": name}
    memory = round(session_lib.bytes_needed(both) / 1e9, 2)
    yield about | row | {"GB": memory, "flops": round(flops, 3)}


def measured(
  runs: Mapping[str, Mapping[str, Callable[[], Any]]], repeats: int
) -> dict[str, figures.Row]:
  """Times what runs the parts, also over the time of "dense"."""
  rows = {name: {} for name in runs["both"]}
  for part in PARTS:
    times = harness.interleaved(runs[part], repeats)
    for name, row in rows.items():
      ratio = times[name].median / times["dense"].median
      row[f"{part}_ms"] = round(times[name].median, 1)
      row[f"{part}_of_dense"] = round(ratio, 2)
  return rows


class Program:
  """A compiled function; a call's result has the buffers of the one before."""

  def __init__(self, fn: Callable[..., Any], *args: Any, donated: Any):
    # An argument that nobody reads would be left out, its buffers unused.
    jitted = jax.jit(fn, donate_argnums=len(args), keep_unused=True)
    self.compiled = jitted.lower(*args, donated).compile()
    self._args, self._donated = args, donated

  def __call__(self) -> Any:
    self._donated = self.compiled(*self._args, self._donated)
    return self._donated


def program(module: nn.Module, params: Any, x: jax.Array, part: str) -> Program:
  """Compiles the layer, or "both" it and its gradient by weights and input."""

  def run(params, x, before):
    del before
    if part == "forward":
      return module.apply({"params": params}, x, train=True)
    return jax.grad(functools.partial(loss, module), (0, 1))(params, x)

  result = x if part == "forward" else (params, x)
  return Program(run, params, x, donated=jax.tree.map(jnp.zeros_like, result))


def loss(module: nn.Module, params: Any, x: jax.Array) -> jax.Array:
  """The mean square of the output: it needs all of it, in both directions."""
  y = module.apply({"params": params}, x, train=True)
  return jnp.square(y.astype(jnp.float32)).mean()


def peer(E: int, T: int, D: int, F: int, repeats: int) -> figures.Rows:
  """Yields a row for the PyTorch package and one for a dense torch block."""
  import torch

  mixture, group = peer_layer(E, D, F), min(T, PEER_GROUP)
  x = torch.randn(T // group, group, D, requires_grad=True)
  modules = {"dense": peer_dense(D, 2 * F), "mixture-of-experts": mixture}

  def run(name, part):
    with torch.set_grad_enabled(part == "both"):
      y = modules[name](x)
    y = y if name == "dense" else y[0]
    if part == "both":
      modules[name].zero_grad()
      y.square().mean().backward()

  runs = {
    part: {name: functools.partial(run, name, part) for name in modules}
    for part in PARTS
  }
  for name, row in measured(runs, repeats).items():
    about = {"table": "torch", "E": E, "D": D, "F": F, "k": 2}
    yield about | {"dispatch": name} | row


def peer_layer(num_experts: int, width: int, hidden: int) -> Any:
  """Returns the package's layer: rows [B, L, D] -> rows, its balance loss.

  Every token visits 2 experts. A row is a group: PEER_GROUP long is best.
  ImportError where torch or the package is not installed.
  """
  import mixture_of_experts
  import torch

  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(SEED)
  return mixture_of_experts.MoE(
    width,
    num_experts,
    hidden_dim=hidden,
    second_policy_train="all",
    # Of first choices alone: 1.25 of all edges.
    capacity_factor_train=2.5,
  )


def peer_dense(width: int, hidden: int) -> Any:
  """Returns a dense block of torch."""
  import torch

  first = torch.nn.Linear(width, hidden, bias=False)
  second = torch.nn.Linear(hidden, width, bias=False)
  return torch.nn.Sequential(first, torch.nn.ReLU(), second)


def tpu(E: int, T: int, D: int, F: int) -> figures.Rows:
  """Yields what a TPU's compiler makes of each way to dispatch."""
  import libtpu  # noqa: F401

  # It asks the cloud what machine this is, and waits long for no answer.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  device = topologies.get_topology_desc(TPU, "tpu").devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)

  def on_device(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  x = on_device(jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16))
  for name, options in CANDIDATES.items():
    module = layer(E, F, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(1), x)["params"]
    params = jax.tree.map(on_device, nn.unbox(shapes))
    run = functools.partial(loss, module)
    row = {"table": f"tpu {TPU}", "E": E, "D": D, "F": F, "k": K}
    row["dispatch"] = name
    for part, times in zip(PARTS, (1, 3), strict=True):
      fn = run if part == "forward" else jax.grad(run, (0, 1))
      compiled = jax.jit(fn).lower(params, x).compile()
      cost = compiled.cost_analysis()
      flops = cost["flops"] / (times * analytic(E, T, D, F))
      row[f"{part}_flops"] = round(flops, 3)
      row[f"{part}_GB_moved"] = round(cost["bytes accessed"] / 1e9, 2)
      row["GB"] = round(session_lib.bytes_needed(compiled) / 1e9, 2)
    yield row


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  colors = dict(zip(CANDIDATES, figures.OTHERS[1:], strict=False))
  colors |= {"dropless": figures.SPARSE, "dense": figures.DENSE}
  colors["mixture-of-experts"] = figures.GRAY
  names = {name: name for name in (*CANDIDATES, "mixture-of-experts", "dense")}
  speed = [row for row in table if row["table"] in ("speed", "torch")]
  speed = [row for row in speed if row["dispatch"] != "dense"]
  growth = [row for row in table if row["table"] == "growth"]
  some = {"both_of_dense": speed, "both_ms": growth}
  meanings = {
    "both_of_dense": "forward + backward, time / dense block of equal work",
    "both_ms": "forward + backward, ms, smaller experts",
  }
  for axes, column in figures.panels(figure, 4, meanings):
    points = figures.points(some[column], "E", column, "dispatch", names)
    figures.lines(axes, points, [colors[name] for name in points])
    ticks = sorted({row["E"] for row in some[column]})
    ticks = ticks if len(ticks) < 5 else ticks[::2]
    figures.scales(axes, "experts", x_ticks=ticks)
  left, right = figure.axes
  figures.level(left, "dense", 1, figures.DENSE)
  left.set_ylim(bottom=0)
  figures.scales(right, "experts", y_ticks=(50, 100, 200, 500, 1000))
  ours = [row for row in speed if row["table"] == "speed"]
  few, many = min(row["E"] for row in ours), max(row["E"] for row in ours)
  fewest, most = (
    min(row["both_of_dense"] for row in ours if row["E"] == E)
    for E in (few, many)
  )
  return (
    f"The fastest dispatch takes {fewest:.2f} times the dense block's time"
    f" with {few} experts, {most:.2f} times with {many}"
  )


if __name__ == "__main__":
  harness.main("layer_speed", rows, draw, SEED)
