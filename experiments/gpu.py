"""Question: on a real GPU, are dropless layers right, and how fast are they?

Method: one call, `python experiments/gpu.py --out=FILE`, of at most --seconds;
it needs jax, flax, optax, jaxtyping and numpy alone, and begins with what
matters most: what there is no time for is left out, and said. A row a line:

  kit      the contract of grouped products, of every backend that is here
  layer    forward and backward, bfloat16, of E experts without capacity: ms,
           over one dense block of equal FLOPs ("of_dense"), TFLOPS, over those
           of one large product ("of_large"), and the estimate of `moejax plan`
  repeats  whether 20 runs give the same bits
  step     a training step: the paper's MoE-256 at batch 64, and a Transformer

Medians of steps that take turns. --quick is small and rough, for any platform.

Result: none; no GPU was there.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax import experts, grouped, moe, router
from moejax.models import layers, lstm_lm, transformer
from moejax.planning import chips, collectives, estimate, work
from moejax.testing import grouped as kit_lib
from moejax.training import optim, step
from moejax.training.state import TrainState

# E, D, F, k and tokens.
SIZES = ((8, 4096, 14336, 2, 16384), (128, 512, 1024, 4, 16384))
SIZES += ((1024, 512, 1024, 4, 16384),)
# Seconds that a part takes at most; it does not begin with less left.
ENOUGH = 60


class Report:
  """Prints rows, and keeps them after each: nothing is lost at the end."""

  def __init__(self, seconds: float, out: str):
    self._begin, self._seconds, self._out = time.time(), seconds, out
    self.rows = []

  def say(self, **row: object) -> None:
    self.rows.append(row)
    cells = " ".join(f"{name}={value}" for name, value in row.items())
    print(f"[{time.time() - self._begin:4.0f} s] {cells}", flush=True)
    if self._out:
      text = json.dumps(self.rows, indent=1) + "\n"
      pathlib.Path(self._out).write_text(text)

  def has_time(self, **part: object) -> bool:
    """Says whether there is enough left for a part, and so in a row if not."""
    left = self._seconds - (time.time() - self._begin)
    if left < ENOUGH:
      self.say(**part, left_out=f"{left:.0f} s are left")
    return left >= ENOUGH


def kit(report: Report, quick: bool) -> None:
  """Holds every backend of this platform against loops in NumPy."""
  many, rows, widths = (8, 24, (4, 6)) if quick else (256, 300, (128, 130))
  for name in grouped.backends_here():
    if not report.has_time(part="kit", backend=name):
      return
    product = functools.partial(grouped.grouped_dot, backend=name)
    cases = kit_lib.checks(rows, widths, many, ("float32", "bfloat16"))
    if quick:
      cases = {"values": cases["values"]}
    with jax.default_matmul_precision("highest"):
      for check, some in cases.items():
        faults = (kit_lib.fault(product, case) for case in some)
        fault = next(filter(None, faults), "")
        report.say(part="kit", backend=name, check=check, fault=fault)


def turns(programs: dict, repeats: int) -> dict[str, float]:
  """Returns the median ms of each of (program, arguments), taking turns."""
  times = {name: [] for name in programs}
  for _ in range(1 + repeats):
    for name, (program, args) in programs.items():
      begin = time.perf_counter()
      jax.block_until_ready(program(*args))
      times[name].append(1e3 * (time.perf_counter() - begin))
  return {name: statistics.median(each[1:]) for name, each in times.items()}


def planned(program: jax.stages.Compiled) -> float | None:
  """Returns the ms that a plan would say; None where the chip is unknown."""
  where = chips.find("")
  if where.chip is None:
    return None
  mesh, text = jax.make_mesh((1,), ("expert",)), program.as_text()
  found = collectives.read(text, mesh)
  done = list(work.instructions(text))
  return round(1e3 * estimate.estimate(done, found, where, mesh).seconds, 3)


def of_layers(report: Report, quick: bool) -> None:
  """Times layers of E experts beside dense blocks and one large product."""
  for E, D, F, k, T in ((4, 32, 64, 2, 64),) if quick else SIZES:
    if not report.has_time(part="layer", E=E):
      return
    x = jax.random.normal(jax.random.key(0), (1, T, D), jnp.bfloat16)
    gate, some = router.TopK(E, k), experts.FeedForward(E, F)
    modules = {
      "dense": moe.MoE(router.Single(), experts.FeedForward(1, k * F)),
      "gather 1.25": moe.MoE(gate, some, dispatch="gather"),
      "dropless": moe.MoE(gate, some, dispatch="ragged", capacity_factor=None),
    }
    large = jnp.ones((T * k, D), x.dtype), jnp.ones((D, F), x.dtype)
    programs = {"large product": (jax.jit(jnp.matmul), large)}
    compiled = {}
    for name, module in modules.items():
      if not report.has_time(part="layer", E=E, layer=name):
        continue
      params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x)["params"])

      def loss(params, x, module=module):
        y = module.apply({"params": params}, x, train=True)
        return jnp.square(y.astype(jnp.float32)).mean()

      begin = time.perf_counter()
      fn = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
      compiled[name] = fn, time.perf_counter() - begin
      programs[name] = fn, (params, x)
    ms = turns(programs, 3 if quick else 10)
    flops = 2 * T * k * D * F
    rate = flops / ms["large product"] / 1e9
    size = {"part": "layer", "E": E, "D": D, "F": F, "k": k, "tokens": T}
    report.say(**size, layer="large product", TFLOPS=round(rate, 2))
    for name, (fn, seconds) in compiled.items():
      # Two products of each expert, forward and twice backward.
      own = 6 * flops / ms[name] / 1e9
      report.say(
        **size,
        layer=name,
        ms=round(ms[name], 3),
        of_dense=round(ms[name] / ms.get("dense", ms[name]), 3),
        TFLOPS=round(own, 2),
        of_large=round(own / rate, 3),
        planned_ms=planned(fn),
        temporary_GB=round(fn.memory_analysis().temp_size_in_bytes / 1e9, 3),
        compiled_s=round(seconds, 1),
      )
    if "dropless" in compiled:
      fn, args = programs["dropless"]
      bits = {
        b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))
        for found in (jax.device_get(fn(*args)) for _ in range(20))
      }
      report.say(part="repeats", E=E, runs=20, different=len(bits) - 1)


def models(quick: bool) -> dict[str, nn.Module]:
  """Returns the paper's MoE-256 (configs/lm1b), and a Transformer."""
  V, D, F, E = (200, 16, 32, 8) if quick else (32_000, 512, 1024, 256)
  more = {"num_samples": 50 if quick else 2048, "dtype": "bfloat16"}

  def mixture(gate):
    options = {"dispatch": "ragged", "capacity_factor": None}
    return moe.MoE(gate, experts.FeedForward(gate.num_experts, F), **options)

  stack = layers.LSTM(D), mixture(router.NoisyTopK(E, 4)), layers.LSTM(D)
  # As OLMoE: 8 of 64 experts in every block.
  E, k, heads = (8, 2, 2) if quick else (64, 8, 8)
  blocks = transformer.Blocks(
    num_layers=8,
    attention=functools.partial(transformer.MultiHeadAttention, heads),
    pattern=(lambda: mixture(router.SoftmaxTopK(E, k)),),
    scan=True,
  )
  return {
    "moe_256": lstm_lm.LSTMLM(V, D, stack, 0.1, **more),
    "transformer": transformer.Transformer(V, D, blocks, **more),
  }


def of_steps(report: Report, quick: bool) -> None:
  """Times training steps: words a second, kernels, and the estimate."""
  B, L = (4, 8) if quick else (64, 128)
  for name, model in models(quick).items():
    if not report.has_time(part="step", model=name):
      return
    words = jax.random.randint(jax.random.key(0), (B, L), 0, model.vocab_size)
    start = jnp.zeros((B, L), bool).at[:, 0].set(True)
    ones = jnp.ones((B, L), bool)
    batch = {"inputs": words, "targets": words, "mask": ones, "start": start}
    tx = optim.adam(lambda count: 1e-3)
    keys = ("params", "dropout", "router", "softmax")
    rngs = {each: jax.random.key(i) for i, each in enumerate(keys)}
    init = functools.partial(model.init, method="loss", train=True)
    params = nn.unbox(jax.jit(init)(rngs, batch)["params"])
    state = TrainState(jnp.int32(0), params, tx.init(params))
    train = functools.partial(
      step.train_step,
      model=model,
      tx=tx,
      aux_weights={"importance": 0.1, "load": 0.1},
      seed=0,
    )
    begin = time.perf_counter()
    fn = jax.jit(train).lower(state, batch).compile()
    seconds = time.perf_counter() - begin
    (ms,) = turns({name: (fn, (state, batch))}, 3 if quick else 10).values()
    launches = sum(e.launches for e in work.instructions(fn.as_text()))
    report.say(
      part="step",
      model=name,
      ms=round(ms, 2),
      words_per_second=round(1e3 * B * L / ms),
      kernels=launches,
      planned_ms=planned(fn),
      compiled_s=round(seconds, 1),
    )


def main() -> None:
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument("--quick", action="store_true", help="small and rough")
  parser.add_argument("--seconds", type=float, default=480, help="at most")
  parser.add_argument("--out", default="", help="file for the rows, as JSON")
  args = parser.parse_args()
  report = Report(args.seconds, args.out)
  device = jax.devices()[0]
  report.say(jax=jax.__version__, device=device.device_kind)
  for part in (kit, of_layers, of_steps):
    part(report, args.quick)


if __name__ == "__main__":
  main()
