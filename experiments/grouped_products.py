"""Question: which grouped products can be trusted, and which compile for what?

Method: the checks of moejax.testing.GroupedContract, values and gradients to
the last bit against loops in NumPy, on every product that installs: those of
moejax, and those of libraries as they are. A CPU runs them; kernels are
interpreted, in which memory that nobody wrote is NaN. An input that fails is
made smaller as long as it fails in the same way. --backend names the products.
--compiled=h100:1,v5e:2x2 compiles value and gradient for devices that are not
there; --layer=h100:1 a dropless layer, its products in a loop over experts and
in kernels. --speed=moejax/measured_products.json, on a machine with an
accelerator, times the backends of moejax and writes the table by which it
chooses.

Result: see docs/grouped_products.md. Nothing was run on a TPU or a GPU.
"""

import contextlib
import functools
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import figures, harness, training
from moejax import experts, grouped, kernels, moe, router, testing
from moejax.planning import chips, hlo, work
from moejax.testing.grouped import Product, checks, differentiable

DTYPES = ("float32", "bfloat16")
TPUS, GPUS = ("v5e:2x2", "v5p:2x2x1"), ("a100:1", "h100:1", "h200:1")
# E, N, I, O of what is compiled: odd; and many.
COMPILED = ((5, 1000, 200, 72), (4096, 8192, 64, 128))
# E, D, F, k and tokens of the layers.
LAYERS = (
  (8, 4096, 14336, 2, 16384),
  (128, 512, 1024, 4, 16384),
  (1024, 512, 1024, 4, 16384),
)


class Candidate(NamedTuple):
  """A product under test."""

  package: str  # Whose version is told.
  run: Callable[[], Product]  # Where a CPU runs or interprets it.
  compiled: Callable[[], Product]
  targets: tuple[str, ...]


def _ours(name: str, targets: tuple[str, ...], **tile: Any) -> Candidate:
  both = kernels.BACKENDS[name][2:]
  slow = (functools.partial(fn, interpret=True, **tile) for fn in both)
  slow, fast = differentiable(*slow), differentiable(*both)
  return Candidate("jax", lambda: slow, lambda: fast, targets)


def _megablox(interpret: bool) -> Product:
  from jax.experimental.pallas.ops.tpu import megablox

  tiles = (16, 16, 16) if interpret else (128, 128, 128)

  def product(rows, matrices, sizes):
    with (
      jax.numpy_dtype_promotion("standard"),
      jax.numpy_rank_promotion("allow"),
    ):
      y = megablox.gmm(
        rows, matrices, sizes, rows.dtype, tiles, None, None, False, interpret
      )
    return y

  return product


def _tokamax(module: str, name: str) -> Product:
  found = importlib.import_module(f"tokamax._src.ops.ragged_dot.{module}")
  op = getattr(found, name)
  # It asks what device is there, though it is interpreted or compiled ahead.
  op.supported_on = lambda self, device: True
  return lambda rows, matrices, sizes: op()(rows, matrices, group_sizes=sizes)


def _mosaic(interpret: bool) -> Product:
  from jax.experimental.pallas import mosaic_gpu
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu as forward
  from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as back

  options = {"block_m": 64, "block_n": 64, "block_k": 64, "grid_block_n": 1}
  options["max_concurrent_steps"] = 2

  @contextlib.contextmanager
  def slowly():
    # It asks for a number that only a GPU has.
    with contextlib.ExitStack() as stack:
      cores = mock.Mock(core_count=132)
      stack.enter_context(mock.patch.object(jax, "devices", lambda: [cores]))
      if interpret:
        params = mosaic_gpu.InterpretGPUParams()
        stack.enter_context(mosaic_gpu.force_gpu_interpret_mode(params))
      yield

  def by_matrix(rows, matrices, sizes, transposed):
    with slowly():
      return forward.ragged_dot(
        rows, matrices, group_sizes=sizes, transpose_rhs=transposed, **options
      )

  def by_rows(rows, gradient, sizes):
    with slowly():
      return back.transposed_ragged_dot(
        rows, gradient, group_sizes=sizes, **options
      )

  return differentiable(by_matrix, by_rows)


def _same(package: str, make: Callable[[], Product], *targets: str):
  return Candidate(package, make, make, targets)


CANDIDATES = {
  "moejax loop": _same(
    "moejax", lambda: grouped.grouped_dot, *GPUS[1:2], *TPUS[:1]
  ),
  "moejax triton": _ours("triton", GPUS, tile=(16, 16, 64)),
  "moejax megablox": _ours("megablox", TPUS),
  "jax ragged_dot": _same("jax", lambda: jax.lax.ragged_dot, *TPUS, "h100:1"),
  "jax megablox": Candidate(
    "jax",
    lambda: _megablox(interpret=True),
    lambda: _megablox(interpret=False),
    TPUS,
  ),
  "jax mosaic": Candidate(
    "jax",
    lambda: _mosaic(interpret=True),
    lambda: _mosaic(interpret=False),
    GPUS,
  ),
  "tokamax xla": _same("tokamax", lambda: _tokamax("base", "RaggedDot")),
  "tokamax triton": _same(
    "tokamax",
    lambda: _tokamax("pallas_triton", "PallasTritonRaggedDot"),
    *GPUS,
  ),
  "tokamax mosaic_tpu": _same(
    "tokamax",
    lambda: _tokamax("pallas_mosaic_tpu", "PallasMosaicTpuRaggedDot"),
    *TPUS,
  ),
}


def rows(
  quick: bool,
  backend: str = "",
  compiled: str = "",
  layer: str = "",
  speed: str = "",
) -> figures.Rows:
  """Yields the rows of the kit, or of the one other table that is asked for."""
  if layer:
    for size in ((4, 16, 32, 2, 64),) if quick else LAYERS:
      for products in ("loop", "kernels"):
        yield of_layer(layer, products, *size)
    return
  if speed:
    yield from of_speed(quick, pathlib.Path(speed))
    return
  some = ("jax ragged_dot",) if quick else ()
  for name in harness.chosen(backend, CANDIDATES, some):
    with harness.if_installed(name):
      if compiled:
        for target in compiled.split(","):
          yield from of_compiler(name, target)
      else:
        # Most programs run once. Tokamax reads the command line as its own.
        with (
          training.roughly_compiled(True),
          mock.patch.object(sys, "argv", sys.argv[:1]),
        ):
          yield from kit(name, quick)


def kit(name: str, quick: bool) -> figures.Rows:
  """Yields whether a product passes each check, and what it fails."""
  candidate = CANDIDATES[name]
  product = candidate.run()
  # Rows and widths of whole tiles, but for the check that asks for others.
  size = (24, (4, 6), 8) if quick else (48, (16, 16), 40)
  if name.endswith("mosaic"):
    size = (192, (64, 64), 40)
  dtypes = ("float16", "bfloat16") if name.endswith("mosaic") else DTYPES
  about = {"table": "kit", "product": name, **version(candidate)}
  cases = checks(*size, dtypes[: 1 if quick else 2])
  cases["same bits"] = cases["values"][:1]
  for check, inputs in cases.items():
    row = about | {"check": check, "passes": True}
    for case in inputs:
      twice = check == "same bits"
      if testing.grouped.fault(product, case, twice):
        case, said = testing.grouped.shrink(product, case, twice, tries=16)
        row |= {"passes": False, "fault": said, "smallest": str(case)}
        break
    yield row


def of_compiler(name: str, target: str) -> figures.Rows:
  """Yields what becomes of value and gradient, if the target is one of its."""
  candidate = CANDIDATES[name]
  for E, N, I, O in COMPILED if target in candidate.targets else ():
    row = {"table": "compiled", "product": name, **version(candidate)}
    row |= {"target": target, "E": E, "N": N, "I": I, "O": O}
    topology, product = chips.find(target), candidate.compiled()

    def both(rows, matrices, sizes, gradient, product=product):
      y, pull = jax.vjp(lambda *of: product(*of, sizes), rows, matrices)
      return y, *pull(gradient)

    shapes = ((N, I), (E, I, O), (E,), (N, O))
    dtypes = ("bfloat16", "bfloat16", "int32", "bfloat16")
    args = map(functools.partial(_on, topology), shapes, dtypes)
    yield row | _compile(both, topology, 6 * N * I * O, *args)


def of_layer(target: str, products: str, *size: int) -> figures.Row:
  """Compiles a dropless layer, forward and backward."""
  E, D, F, K, T = size
  topology = chips.find(target)
  module = moe.MoE(
    router.TopK(E, K), experts.FeedForward(E, F), dispatch="ragged"
  ).clone(capacity_factor=None)
  x = _on(topology, (1, T, D), "bfloat16")
  params = nn.unbox(jax.eval_shape(module.init, jax.random.key(1), x)["params"])
  params = jax.tree.map(lambda a: _on(topology, a.shape, a.dtype), params)

  def loss(params, x):
    y = module.apply({"params": params}, x, train=True)
    return jnp.square(y.astype(jnp.float32)).mean()

  row = {
    "table": "layer",
    "target": target,
    "E": E,
    "D": D,
    "F": F,
    "k": K,
    "tokens": T,
  }
  row["products"] = products
  analytic = 6 * T * (K * 2 * D * F + D * E)

  def by_default(*args, default, **_):
    return default(*args)

  loops = mock.patch.object(jax.lax, "platform_dependent", by_default)
  with loops if products == "loop" else contextlib.nullcontext():
    return row | _compile(jax.grad(loss, (0, 1)), topology, analytic, params, x)


def _on(topology, shape, dtype):
  where = jax.sharding.SingleDeviceSharding(topology.devices[0])
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _compile(fn, topology, analytic, *args):
  begin = time.perf_counter()
  try:
    program = jax.jit(fn).lower(*args).compile(topology.options or None)
  except Exception as error:  # Whatever a library or a compiler raises.
    said = str(error).strip().partition("\n")[0][:160]
    return {"compiles": False, "fault": f"{type(error).__name__}: {said}"}
  seconds = time.perf_counter() - begin
  text = program.as_text()
  done = list(work.instructions(text))
  loops = [run for run in hlo.runs(text) if run.op.opcode == "while"]
  names = {
    run.op.name
    for run in hlo.runs(text)
    if run.op.opcode == "custom-call" and "triton" in run.op.rest
  }
  return {
    "compiles": True,
    "loops": len(loops),
    "launches": sum(each.launches for each in done),
    "known": all(each.is_bounded for each in done),
    "triton_kernels": len(names),
    "flops": round(sum(each.flops for each in done) / analytic, 3),
    "temp_GB": round(program.memory_analysis().temp_size_in_bytes / 1e9, 3),
    "compile_s": round(seconds, 1),
  }


def of_speed(quick: bool, path: pathlib.Path) -> figures.Rows:
  """Times the backends of this machine, and writes the fastest of each size."""
  table = []
  kind = jax.devices()[0].device_kind
  sizes = (
    [(4, 64, 16, 8)]
    if quick
    else [(E, 16384, 512, 1024) for E in (8, 128, 1024)]
  )
  sizes += [] if quick else [(8, 16384, 4096, 14336)]
  for size, direction in ((s, d) for s in sizes for d in kernels.DIRECTIONS):
    E, N, I, O = size
    wanted = kernels.Sizes(direction, "bfloat16", *size)
    rows = jnp.ones((N, I), "bfloat16")
    right = jnp.ones(
      {"forward": (E, I, O), "transposed": (E, O, I)}.get(direction, (N, O)),
      "bfloat16",
    )
    counts = jnp.full(E, N // E, jnp.int32)
    runs = {}
    for name in grouped.backends_here():
      backend = grouped.BACKENDS[name]
      if not backend.refuses(wanted):
        fn = backend.rows_by_matrix
        rest = (direction == "transposed", None)
        if direction == "gradient":
          fn, rest = backend.rows_by_rows, (None,)
        program = jax.jit(lambda *a, fn=fn, rest=rest: fn(*a, *rest))
        runs[name] = functools.partial(program, rows, right, counts)
    times = harness.interleaved(runs, 2 if quick else 10)
    fastest = min(times, key=lambda name: times[name].median)
    row = {"device": kind, **wanted._asdict()}
    table.append(row | {"backend": fastest})
    yield {"table": "speed", **row} | {
      f"{name}_ms": round(ms.median, 3) for name, ms in times.items()
    }
  path.write_text(json.dumps(table, indent=1) + "\n")


def version(candidate: Candidate) -> dict[str, str]:
  """Returns the version of a candidate's package."""
  return {"version": importlib.metadata.version(candidate.package)}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws how many rows of each product are as they should be."""
  axes = figure.subplots()
  key = "product" if "product" in table[0] else "E"
  names = list(dict.fromkeys(str(row[key]) for row in table))
  good = [
    sum(
      str(row.get("passes", row.get("compiles", True))) == "True"
      for row in table
      if str(row[key]) == name
    )
    for name in names
  ]
  figures.bars(axes, names, {"": good}, [figures.SPARSE] * len(names))
  axes.set_xlabel("checks that it passes, or programs that compile")
  return "Grouped products: what keeps the contract"


if __name__ == "__main__":
  harness.main(
    "grouped_products",
    rows,
    draw,
    backend="products under test, with commas",
    compiled="topologies to compile for, with commas",
    layer="a topology to compile layers for",
    speed="the table to write",
  )
