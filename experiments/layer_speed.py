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
it best; the others all tokens at once. The peer is the PyTorch package
mixture-of-experts (top 2 of E, capacity for all edges at 1.25), beside a torch
block of hidden width 2 * F, left out where it is not installed.

"growth" is the same at D=256, F=128 for E from 4 to 4096. "tpu" rows are
compiled ahead of time for one v5e chip in bfloat16 (needs libtpu, no TPU):
compiled over analytic FLOPs and bytes accessed. What a kernel costs is what its
authors declare; tiles that two experts share are computed twice.

Result: two cores of an AMD EPYC, jax 0.10.2, forward and backward: the best of
ours takes 1.11 (E=4), 1.20 (E=32), 1.30 (E=128), 1.49 (E=256) of the dense
block (a day before 1.13, 1.16, 1.33, 1.49); E=256 costs 1.34 times E=4. The
products run at the dense block's rate (86 GFLOP/s a core at 128 rows in a loop,
77 in one of 16,384); what grows is the traffic of the weights, read twice and
their gradient zeroed and written once: half a gigabyte of each at E=128, one at
E=256. So it is the machine's memory that decides: on an Intel Xeon which moved
8 to 10 GB/s it was 1.08, 1.25, 1.66, 2.01, and 1.83 from E=4 to E=256. Expected
before: the products. Found by timing every move alone: a sum over the K rows of
a token by one read [K, S, D] took 60 ms, by K reads 1 ms. Compiled for a TPU,
gather does 1.003 to 1.005 times those of its capacity, ragged 1.004 to 1.008
times the analytic ones.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure

from experiments import figures, harness
from moejax import experts, moe, router, terminal
from moejax.training import session as session_lib

SEED = 0
K = 4
CANDIDATES = {
  "einsum": {"dispatch": "einsum", "group_size": 512, "capacity_factor": 1.25},
  "gather": {"dispatch": "gather", "capacity_factor": 1.25},
  "ragged": {"dispatch": "ragged", "capacity_factor": 1.25},
  "dropless": {"dispatch": "ragged", "capacity_factor": None},
}
TPU = "v5e:2x2"
PEER_GROUP = 512


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields the rows of the three tables."""
  sizes = {"tokens": 16, "width": 8, "hidden": 16} if quick else {}
  repeats = 2 if quick else 7
  for num_experts in (8,) if quick else (4, 32, 128, 256):
    yield from speed("speed", num_experts, repeats, **sizes)
    yield from peer(num_experts, repeats, **sizes)
  if not quick:
    sizes = {"width": 256, "hidden": 128}
  for num_experts in (4,) if quick else (4, 16, 64, 256, 1024, 4096):
    names = ("dropless",) if quick else ("gather", "ragged", "dropless")
    yield from speed("growth", num_experts, repeats, names=names, **sizes)
  for num_experts in () if quick else (32, 128):
    yield from tpu(num_experts)


def layer(num_experts: int, hidden: int, **options: Any) -> moe.MoE:
  """Returns the layer under test."""
  return moe.MoE(
    router.TopK(num_experts, K),
    experts.FeedForward(num_experts, hidden),
    **options,
  )


def analytic(tokens: int, width: int, hidden: int, num_experts: int) -> int:
  """Returns the FLOPs of router and chosen experts, forward."""
  return 2 * tokens * (K * 2 * width * hidden + width * num_experts)


def speed(
  table: str,
  num_experts: int,
  repeats: int,
  tokens: int = 4096,
  width: int = 512,
  hidden: int = 1024,
  names: tuple[str, ...] = tuple(CANDIDATES),
) -> Iterator[harness.Row]:
  """Yields a row for the dense block and for each way to dispatch."""
  x = jax.random.normal(jax.random.key(SEED), (1, tokens, width))
  modules = {"dense": moe.OneExpert(experts.FeedForward(1, K * hidden))}
  for name in names:
    options = dict(CANDIDATES[name])
    if options.get("group_size", 0) > tokens:
      options["group_size"] = tokens
    modules[name] = layer(num_experts, hidden, **options)
  shared = {}
  programs, backs = {}, {}
  for name, module in modules.items():
    # Weights of one shape are the same for all, and in memory once.
    kind = type(module)
    if kind not in shared:
      init = jax.jit(module.init)
      shared[kind] = nn.unbox(init(jax.random.key(1), x)["params"])
    programs[name] = forward(module, shared[kind], x)
    backs[name] = backward(module, shared[kind], x)
  times = harness.interleaved({n: p.run for n, p in programs.items()}, repeats)
  both = harness.interleaved({n: p.run for n, p in backs.items()}, repeats)
  flops = analytic(tokens, width, hidden, num_experts)
  for name, program in backs.items():
    yield {
      "table": table,
      "E": num_experts,
      "D": width,
      "F": hidden,
      "k": K,
      "dispatch": name,
      "forward_ms": round(times[name].median, 1),
      "forward_of_dense": ratio(times, name),
      "both_ms": round(both[name].median, 1),
      "both_of_dense": ratio(both, name),
      "GB": round(program.peak_bytes / 1e9, 2),
      "flops": round(program.flops / (3 * flops), 3),
    }


def ratio(times: dict[str, harness.Milliseconds], name: str) -> float:
  return round(times[name].median / times["dense"].median, 2)


class Program:
  """A compiled function; `run` calls it once."""

  def __init__(self, fn: Callable[..., Any], *args: Any, donated: Any = ()):
    # An argument that nobody reads would be left out, its buffers unused.
    jitted = jax.jit(fn, donate_argnums=len(args), keep_unused=True)
    self._run = jitted.lower(*args, donated).compile()
    self._args, self._donated = args, donated
    self.flops = self._run.cost_analysis().get("flops", 0)
    self.peak_bytes = session_lib.bytes_needed(self._run)

  def run(self) -> Any:
    """Runs once; the result's buffers serve the next turn."""
    self._donated = self._run(*self._args, self._donated)
    return self._donated


def forward(module: nn.Module, params: Any, x: jax.Array) -> Program:
  """Compiles the layer."""

  def run(params, x, before):
    del before
    return module.apply({"params": params}, x, train=True)

  return Program(run, params, x, donated=jnp.zeros_like(x))


def backward(module: nn.Module, params: Any, x: jax.Array) -> Program:
  """Compiles the gradient by weights and input."""

  def run(params, x, before):
    del before
    return jax.grad(functools.partial(loss, module), (0, 1))(params, x)

  zeros = jax.tree.map(jnp.zeros_like, (params, x))
  return Program(run, params, x, donated=zeros)


def loss(module: nn.Module, params: Any, x: jax.Array) -> jax.Array:
  """The mean square of the output: it needs all of it, in both directions."""
  y = module.apply({"params": params}, x, train=True)
  return jnp.square(y.astype(jnp.float32)).mean()


def peer(
  num_experts: int,
  repeats: int,
  tokens: int = 4096,
  width: int = 512,
  hidden: int = 1024,
) -> Iterator[harness.Row]:
  """Yields a row for the PyTorch package and one for a dense torch block."""
  try:
    import torch

    module = peer_layer(num_experts, width, hidden)
  except ImportError:
    terminal.say(
      "torch or mixture-of-experts is not installed: no rows for the peer"
    )
    return
  dense = peer_dense(width, 2 * hidden)
  group = min(tokens, PEER_GROUP)
  x = torch.randn(tokens // group, group, width)

  def candidate(run, parameters):
    def forward_only():
      with torch.no_grad():
        run(x)

    def both():
      for parameter in parameters:
        parameter.grad = None
      run(x.requires_grad_()).square().mean().backward()

    return forward_only, both

  runs = {
    "dense": candidate(dense, list(dense.parameters())),
    "mixture-of-experts": candidate(
      lambda x: module(x)[0], list(module.parameters())
    ),
  }
  times, both = (
    harness.interleaved({n: run[i] for n, run in runs.items()}, repeats)
    for i in range(2)
  )
  for name in runs:
    yield {
      "table": "torch",
      "E": num_experts,
      "D": width,
      "F": hidden,
      "k": 2,
      "dispatch": name,
      "forward_ms": round(times[name].median, 1),
      "forward_of_dense": ratio(times, name),
      "both_ms": round(both[name].median, 1),
      "both_of_dense": ratio(both, name),
    }


def peer_layer(num_experts: int, width: int, hidden: int) -> Any:
  """Returns the package's layer: rows [B, L, D] -> rows, its balance loss.

  Every token visits 2 experts. A row is a group: PEER_GROUP long is best.

  Raises:
    ImportError: torch or the package is not installed.
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

  return torch.nn.Sequential(
    torch.nn.Linear(width, hidden, bias=False),
    torch.nn.ReLU(),
    torch.nn.Linear(hidden, width, bias=False),
  )


def tpu(
  num_experts: int, tokens: int = 4096, width: int = 512, hidden: int = 1024
) -> Iterator[harness.Row]:
  """Yields what a TPU's compiler makes of each way to dispatch."""
  try:
    import libtpu  # noqa: F401
  except ImportError:
    terminal.say("libtpu is not installed: no rows compiled for a TPU")
    return
  # It asks the cloud what machine this is, and waits long for no answer.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  device = topologies.get_topology_desc(TPU, "tpu").devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  flops = analytic(tokens, width, hidden, num_experts)

  def there(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

  for name, options in CANDIDATES.items():
    module = layer(num_experts, hidden, **options)
    x = there(jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16))
    init = functools.partial(module.init, jax.random.key(1))
    shapes = jax.eval_shape(init, x)["params"]
    params = jax.tree.map(there, nn.unbox(shapes))
    run = functools.partial(loss, module)
    row = {"table": f"tpu {TPU}", "E": num_experts, "D": width, "F": hidden}
    row |= {"k": K, "dispatch": name}
    for part, fn, times in (
      ("forward", run, 1),
      ("both", jax.grad(run, (0, 1)), 3),
    ):
      compiled = jax.jit(fn).lower(params, x).compile()
      cost = compiled.cost_analysis()
      row[f"{part}_flops"] = round(cost["flops"] / (times * flops), 3)
      row[f"{part}_GB_moved"] = round(cost["bytes accessed"] / 1e9, 2)
      row["GB"] = round(session_lib.bytes_needed(compiled) / 1e9, 2)
    yield row


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> str:
  """Draws the ratios to the dense block, and how time grows with E."""
  colors = dict(zip(CANDIDATES, figures.OTHERS[1:], strict=False))
  colors |= {"dropless": figures.SPARSE, "dense": figures.DENSE}
  colors["mixture-of-experts"] = figures.GRAY
  panels = {
    ("speed", "torch"): ("both_of_dense", "time / dense block of equal work"),
    ("growth",): ("both_ms", "ms, smaller experts"),
  }
  for axes, (tables, (column, meaning)) in zip(
    figure.subplots(1, 2), panels.items(), strict=True
  ):
    mine = [row for row in table if row["table"] in tables]
    points = {
      name: [(r["E"], r[column]) for r in mine if r["dispatch"] == name]
      for name in dict.fromkeys(row["dispatch"] for row in mine)
      if (name, column) != ("dense", "both_of_dense")
    }
    figures.lines(axes, points, [colors[name] for name in points])
    axes.set_xscale("log", base=2)
    axes.set_title(f"forward + backward, {meaning}")
    axes.set_xlabel("experts")
    figures.plain(
      axes.xaxis, (4, 32, 128, 256) if len(tables) > 1 else (4, 64, 1024)
    )
  left, right = figure.axes
  figures.level(left, "dense", 1, figures.DENSE)
  left.set_ylim(bottom=0)
  right.set_yscale("log")
  figures.plain(right.yaxis, (50, 100, 200, 500, 1000))
  best = {}
  for row in table:
    if row["table"] == "speed" and row["dispatch"] != "dense":
      ratio = row["both_of_dense"]
      best[row["E"]] = min(ratio, best.get(row["E"], ratio))
  few, many = min(best), max(best)
  return (
    f"The fastest dispatch takes {best[few]:.2f} times the dense block's time"
    f" with {few} experts, {best[many]:.2f} times with {many}"
  )


if __name__ == "__main__":
  harness.main("layer_speed", rows, draw, SEED)
