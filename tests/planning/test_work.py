"""Products and bytes of a program, as its text tells them."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.planning import collectives, hlo, work

M, N, K, A, B = 256, 128, 384, 3, 5
# What compilers made, without what nothing here reads.
TEXTS = pathlib.Path(__file__).parent / "texts"


def total(text):
  """FLOPs, bytes, and whether all loops have a known length."""
  flops, moved, bounded, _ = zip(*work.instructions(text), strict=True)
  return sum(flops), sum(moved), all(bounded)


def compiled(fn, *shapes):
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(fn).lower(*inputs).compile()


def read(fn, *shapes):
  return total(compiled(fn, *shapes).as_text())


def text_of(name):
  return (TEXTS / f"{name}.txt").read_text()


# -- products -----------------------------------------------------------------


@pytest.mark.parametrize(
  "spec, shapes, times",
  [
    ("mk,kn->mn", ((M, K), (K, N)), 1),
    ("km,nk->nm", ((K, M), (N, K)), 1),
    ("abmk,bkan->bman", ((A, B, M, K), (B, K, A, N)), A * B),
    ("mak,kan->mn", ((M, A, K), (K, A, N)), A),
  ],
)
def test_products(spec, shapes, times):
  """Three in a gradient; all arrays are read and written once."""
  program = compiled(functools.partial(jnp.einsum, spec), *shapes)
  flops, _, is_bounded = total(program.as_text())
  assert flops == 2 * times * M * N * K and is_bounded
  # It counts all arithmetic, but there is little besides.
  assert flops == pytest.approx(program.cost_analysis()["flops"], rel=0.01)

  def loss(x, y):
    return jnp.square(jnp.einsum(spec, x, y)).sum()

  assert read(jax.grad(loss, (0, 1)), *shapes)[0] == 3 * flops


def test_products_of_a_tpu():
  """A gradient of [A,M,K] x [A,K,N]; what is between stays on the chip."""
  flops, moved, is_bounded = total(text_of("tpu_batch"))
  assert (flops, is_bounded) == (3 * 2 * A * M * N * K, True)
  # The second operand is read twice.
  assert moved == 4 * A * (2 * M * K + 3 * K * N)


def by_hand(inputs, window, of):
  """Multiplications of one axis, one by one."""
  (stride,), ((low, high),), (holes,), (step,) = of.values()
  end = low + (inputs - 1) * holes + 1 + high
  total = 0
  for o in range((end - (window - 1) * step - 1) // stride + 1):
    for k in range(window):
      i = o * stride + k * step - low
      total += i % holes == 0 and 0 <= i // holes < inputs
  return total


@pytest.mark.parametrize("groups", [{}, {"feature_group_count": 2}])
def test_convolutions_count_what_meets(groups):
  inputs, window, batch, features, out = 11, 4, 2, 6, 8
  per_group = features // groups.get("feature_group_count", 1)
  options = [
    {
      "window_strides": (stride,),
      "padding": (pad,),
      "lhs_dilation": (holes,),
      "rhs_dilation": (step,),
    }
    for stride, pad, holes, step in itertools.product(
      (1, 3), ((0, 0), (4, 2), (-1, 3)), (1, 3), (1, 2)
    )
  ]

  def fn(x, w):
    return [jax.lax.conv_general_dilated(x, w, **o, **groups) for o in options]

  text = compiled(
    fn, (batch, features, inputs), (out, per_group, window)
  ).as_text()
  want = [by_hand(inputs, window, of) for of in options]
  want = sorted(2 * n * batch * per_group * out for n in want)
  assert sorted(e.flops for e in work.instructions(text) if e.flops) == want


def test_products_by_a_library_of_gpus():
  text = text_of("gpu_library")
  want = 2 * 768 * 2304 * 8192, 2 * (768 * 2304 + 768 * 8192 + 2304 * 8192)
  assert total(text) == (*want, True)
  older = text.replace("$lt$matmul", "$gemm")
  older = older.replace('["0"]', "[0]").replace('["1"]', "[1]")
  assert total(older) == (*want, True)


def test_a_kernel_of_a_gpu_tells_its_products_by_name():
  text = """
ENTRY %main (x: bf16[10,4], w: bf16[2,4,6]) -> bf16[10,6] {
  %x = bf16[10,4]{1,0} parameter(0)
  %w = bf16[2,4,6]{2,1,0} parameter(1)
  ROOT %y = bf16[10,6]{1,0} custom-call(%x, %w), custom_call_target="a", \
metadata={op_name="jit(f)/jvp(grouped_dot_N10_I4_O6)/pallas_call"}
}
"""
  assert total(text) == (
    2 * 10 * 4 * 6,
    2 * (10 * 4 + 2 * 4 * 6 + 10 * 6),
    True,
  )


def test_only_the_rows_of_a_ragged_buffer_count():
  """64 rows are sent to a kernel and back, in a buffer for 256."""
  text = text_of("tpu_ragged")
  flops, moved, _ = total(text)
  assert flops == 4000 // 4
  rows, buffer, numbers = 2 * 64 * 16, 2 * 256 * 16, 4 * 4 * 4
  # Sending reads and writes the rows; so does the kernel.
  assert moved == 2 * (2 * rows + numbers) + 2 * buffer // 4
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "e")
  out, back = collectives.read(text, mesh)
  assert out.wire_bytes == back.wire_bytes == rows * 3 // 4
  assert (out.bytes, back.bytes) == (buffer, rows)
  assert work.filled(text) == 1 / 4
  # The busiest of all devices cannot get more than there is room for.
  for busiest, part in (1.5, 3 / 8), (9.0, 1):
    assert work.filled(text, busiest) == part
    flops = sum(each.flops for each in work.instructions(text, busiest))
    assert flops == 4000 * part
  out, _ = collectives.read(text, mesh, busiest=1.5)
  assert out.wire_bytes == 1.5 * rows * 3 // 4


# -- loops --------------------------------------------------------------------


def step(x, w):
  return jnp.tanh(x @ w)


def test_loops_count_all_their_rounds():
  def scan(x, w, length=12):
    return jax.lax.scan(lambda x, _: (step(x, w), None), x, length=length)[0]

  def nested(x, w):
    return jax.lax.scan(lambda x, _: (scan(x, w, 7), None), x, length=5)[0]

  def from_three_to_nine_nine_times(x, w):
    """The inner loop's end is a number that the outer one carries along."""

    def body(_, carry):
      x, end = carry
      start = jnp.int32(3)
      return jax.lax.fori_loop(start, end, lambda _, x: step(x, w), x), end

    return jax.lax.fori_loop(2, 11, body, (x, jnp.int32(9)))[0]

  for fn, rounds in (
    (scan, 12),
    (nested, 35),
    (from_three_to_nine_nine_times, 54),
  ):
    flops, _, is_bounded = read(fn, (N, N), (N, N))
    assert (flops, is_bounded) == (rounds * 2 * N**3, True)
  # The last for a TPU, which does not say how long its loops are.
  assert total(text_of("tpu_loops"))[::2] == (54 * 2 * N**3, True)


def test_a_gpus_host_starts_kernels_and_copies():
  """Two copies and three kernels; five rounds of three kernels and a copy."""
  done = work.instructions(text_of("gpu_loop"))
  assert sum(each.launches for each in done) == 2 + 3 + 5 * (3 + 1)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  def fn(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

  assert read(fn, (N, N), (N, N))[::2] == (2 * N**3, False)
  assert total(text_of("tpu_unknown"))[::2] == (2 * N**3, False)


def looping(adds="", *, update="add(%at, %one)", start="%zero", end="%n"):
  """A loop while at < end, in the text of a TPU."""
  return f"""HloModule jit_f

%below (t: (s32[], s32[])) -> pred[] {{
  %t = (s32[], s32[]) parameter(0)
  %at = s32[] get-tuple-element(%t), index=0
  %end = s32[] get-tuple-element(%t), index=1
  ROOT %test = pred[] compare(%at, %end), direction=LT
}}

%again (t: (s32[], s32[])) -> (s32[], s32[]) {{
  %t = (s32[], s32[]) parameter(0)
  %at = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(2)
  %next = s32[] {update}
  %end = s32[] get-tuple-element(%t), index=1
  ROOT %both = (s32[], s32[]) tuple(%next, %end)
}}

ENTRY %main (x: s32[]) -> (s32[], s32[]) {{
  %x = s32[] parameter(0)
  %n = s32[] constant(9)
  %zero = s32[] constant(0)
{adds}
  %start = (s32[], s32[]) tuple({start}, {end})
  ROOT %loop = (s32[], s32[]) while(%start), condition=%below, body=%again
}}
"""


@pytest.mark.parametrize(
  "change, times",
  [
    # Twos from 0 to 9; from 9, never; to a number that nobody knows.
    ({}, 5),
    ({"start": "%n"}, 0),
    ({"end": "%x"}, None),
    # The step is no constant, or there is none.
    ({"update": "add(%at, %at)", "start": "%n"}, None),
    ({"update": "subtract(%at, %one)"}, None),
    # Each number takes the one before it twice: 2^60 paths to the first.
    (
      {
        "adds": "\n".join(
          f"  %n{i} = s32[] add(%n{i - 1 or ''}, %n{i - 1 or ''})"
          for i in range(1, 61)
        ),
        "end": "%n60",
      },
      9 * 2**59,
    ),
  ],
)
def test_rounds_of_a_loop_that_does_not_say_them(change, times):
  (run,) = (r for r in hlo.runs(looping(**change)) if r.op.name == "next")
  assert (run.times, run.is_bounded) == (
    (1, False) if times is None else (times, True)
  )


# -- bytes --------------------------------------------------------------------


def test_bytes_are_those_of_the_compiler_without_loops():
  """A product reads and writes each array once."""

  def loss(x, w_in, w_out):
    return jnp.square(jax.nn.relu(x @ w_in) @ w_out).sum()

  shapes = (8 * M, M), (M, 4 * M), (4 * M, M)
  program = compiled(jax.grad(loss, (1, 2)), *shapes)
  want = program.cost_analysis()["bytes accessed"]
  assert total(program.as_text())[1] == pytest.approx(want, rel=0.001)
  product = read(jnp.matmul, (M, K), (K, N))
  assert product[1] == 4 * (M * K + K * N + M * N)


def test_a_scan_reads_and_writes_its_slices_once():
  length = 40

  def fn(x, slices):
    def body(x, each):
      x = jnp.tanh(x)
      return x, each * x[None]

    return jax.lax.scan(body, x, slices)[1]

  slices = 4 * length * M * M
  # A CPU fills the result with zeros before.
  for passes, moved in (
    (3, read(fn, (M,), (length, M, M))[1]),
    (2, total(text_of("tpu_scan"))[1]),
  ):
    assert passes * slices <= moved < (passes + 0.1) * slices


def test_rows_looked_up_and_added():
  """Of a large table, only the rows that are named."""
  rows = 4096

  def fn(table, change):
    index = jnp.arange(8, dtype=jnp.int32) * 7
    return table.at[index].add(change), table[index]

  table, change = 4 * rows * N, 4 * 8 * N
  # The table is copied, as it was not given away.
  moved = read(fn, (rows, N), (8, N))[1]
  assert 2 * table <= moved <= 2 * table + 20 * change
  # Rows that are added to are read, too.
  text = """
ENTRY %main (t: f32[64,6], i: s32[2,1], r: f32[2,6]) -> f32[64,6] {
  %t = f32[64,6]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %r = f32[2,6]{1,0} parameter(2)
  ROOT %s = f32[64,6]{1,0} scatter(%t, %i, %r), inserted_window_dims={0}
}
"""
  assert total(text)[1] == 3 * 4 * 2 * 6 + 4 * 2


def test_what_is_kept_on_the_chip_costs_nothing():
  """The copy reads all of x, the fusion writes a row and reads where to."""
  assert total(text_of("tpu_on_chip")) == (0, 4 * (8 * 6 + 6 + 1), True)
  # The same in memory: the copy is written and its row is read.
  outside = total(text_of("tpu_on_chip").replace("S(1)", ""))
  assert outside[1] == 4 * (2 * 8 * 6 + 2 * 6 + 1)


def test_a_collective_spread_over_fusions_counts_once():
  """Half a matrix is read and a whole one written; a product of others."""
  want = 2 * 8**3, 4 * (4 * 8 + 8 * 8) + 3 * 4 * 8 * 8, True
  assert total(text_of("tpu_spread")) == want
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "e")
  (found,) = collectives.read(text_of("tpu_spread"), mesh)
  assert (found.kind, found.bytes) == ("all-gather", 4 * 8 * 8)
