"""Products and bytes of a program, as its text tells them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology

from moejax import kernels
from moejax.models import layers
from moejax.planning import collectives, hlo, work

M, N, K, A, B = 256, 128, 384, 3, 5
WHERE = {"cpu": lambda: jax.devices()[0], "tpu": lambda: topology.chips()[0]}
EACH = pytest.mark.parametrize("where", WHERE)


def compiled(fn, where, *shapes, dtype=jnp.float32):
  """Compiles fn of arrays, for one device that may not be there."""
  one = jax.sharding.SingleDeviceSharding(WHERE[where]())
  inputs = [jax.ShapeDtypeStruct(s, dtype, sharding=one) for s in shapes]
  return jax.jit(fn).lower(*inputs).compile()


def read(fn, where, *shapes, dtype=jnp.float32):
  return work.read(compiled(fn, where, *shapes, dtype=dtype).as_text())


def einsum(spec):
  return functools.partial(jnp.einsum, spec)


def gradient(spec):
  """Of both operands, so that no product can be left out."""

  def fn(x, y):
    return jnp.square(jnp.einsum(spec, x, y)).sum()

  return jax.grad(fn, (0, 1))


# fn, shapes, products of M * N * K.
PRODUCTS = {
  "plain": (einsum("mk,kn->mn"), ((M, K), (K, N)), 1),
  "transposed": (einsum("km,nk->nm"), ((K, M), (N, K)), 1),
  "batched": (einsum("amk,akn->amn"), ((A, M, K), (A, K, N)), A),
  "two batches": (
    einsum("abmk,bkan->bman"),
    ((A, B, M, K), (B, K, A, N)),
    A * B,
  ),
  "two contracted": (
    einsum("mak,kan->mn"),
    ((M, A, K), (K, A, N)),
    A,
  ),
  "gradient": (gradient("mk,kn->mn"), ((M, K), (K, N)), 3),
  "gradient of a batch": (
    gradient("amk,akn->amn"),
    ((A, M, K), (A, K, N)),
    3 * A,
  ),
}


@EACH
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, where):
  fn, shapes, times = PRODUCTS[name]
  program = compiled(fn, where, *shapes)
  found = work.read(program.as_text())
  assert found.flops == 2 * times * M * N * K
  assert found.is_bounded
  # It counts all arithmetic, but there is little besides.
  assert found.flops == pytest.approx(
    program.cost_analysis()["flops"], rel=0.01
  )


def windows():
  """Convolutions of one axis, with all that may become of a product."""
  options = itertools.product((1, 3), ((0, 0), (4, 2), (-1, 3)), (1, 3), (1, 2))
  for stride, pad, holes, step in options:
    yield {
      "window_strides": (stride,),
      "padding": (pad,),
      "lhs_dilation": (holes,),
      "rhs_dilation": (step,),
    }


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
  for of in windows():

    def fn(x, w, of=of):
      return jax.lax.conv_general_dilated(x, w, **of, **groups)

    left, right = (batch, features, inputs), (out, per_group, window)
    program = jax.jit(fn).lower(
      jnp.zeros(left, jnp.float32), jnp.zeros(right, jnp.float32)
    )
    meet = by_hand(inputs, window, of)
    text = program.compile().as_text()
    assert work.read(text).flops == 2 * meet * batch * per_group * out


def step(x, w):
  return jnp.tanh(x @ w)


def scan(x, w, length):
  return jax.lax.scan(lambda x, _: (step(x, w), None), x, length=length)[0]


@EACH
def test_a_loop_counts_as_often_as_it_goes_round(where):
  shapes = (N, N), (N, N)

  def nested(x, w):
    def body(x, _):
      return scan(x, w, 7), None

    return jax.lax.scan(body, x, length=5)[0]

  one = read(step, where, *shapes)
  many = read(functools.partial(scan, length=12), where, *shapes)
  most = read(nested, where, *shapes)
  assert one.flops == 2 * N**3
  assert (many.flops, most.flops) == (12 * one.flops, 35 * one.flops)
  assert many.is_bounded and most.is_bounded


@EACH
def test_a_loop_of_unknown_length_counts_once_and_says_so(where):
  def fn(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

  found = read(fn, where, (N, N), (N, N))
  assert (found.flops, found.is_bounded) == (2 * N**3, False)


@EACH
def test_loops_that_begin_and_end_elsewhere(where):
  """The inner loop's end is a number that the outer one carries along."""

  def inner(x, w, times):
    return jax.lax.fori_loop(jnp.int32(3), times, lambda _, x: step(x, w), x)

  def fn(x, w):
    def body(_, carry):
      x, times = carry
      return inner(x, w, times), times

    return jax.lax.fori_loop(2, 11, body, (x, jnp.int32(9)))[0]

  found = read(fn, where, (N, N), (N, N))
  assert (found.flops, found.is_bounded) == (9 * 6 * 2 * N**3, True)


@EACH
def test_a_real_lstm(where):
  rows, length, width, units, out = 16, 24, 128, 256, 128

  def loss(x, w_in, w_rec, w_out):
    start = jnp.zeros(x.shape[:2], bool)
    bias = jnp.zeros(4 * units, jnp.float32)
    y = layers.lstm(x, start, w_in, w_rec, bias, w_out)
    return jnp.square(y).sum()

  found = read(
    jax.grad(loss, (0, 1, 2, 3)),
    where,
    (rows, length, width),
    (width, 4 * units),
    (out, 4 * units),
    (units, out),
  )
  weights = 4 * units * (width + out) + units * out
  assert found.flops == 3 * 2 * rows * length * weights
  assert found.is_bounded


def test_a_kernel_of_a_tpu_says_what_it_multiplies():
  def fn(rows, matrices):
    sizes = jnp.full(A, M // A, jnp.int32)
    return kernels.rows_by_matrix(rows, matrices, sizes)

  found = read(fn, "tpu", (M, K), (A, K, N), dtype=jnp.bfloat16)
  assert found.flops == 2 * M * N * K


# Rows travel to a kernel and home, 64 of them in room for 256, as a TPU's
# compiler writes it down in a dump: keys in the order of the alphabet.
ROWS_BY_NUMBER = """
ENTRY %main (a: bf16[64,16], b: bf16[256,16], c: s32[4]) -> bf16[64,16] {
  %rows = bf16[64,16]{1,0} parameter(0)
  %room = bf16[256,16]{1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %out = bf16[256,16]{1,0} ragged-all-to-all(%rows, %room, %n, %n, %n, %n), \
replica_groups={{0,1,2,3}}
  %kernel = bf16[256,16]{1,0} custom-call(%out), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"cost_estimate":{"bytes_accessed":"123","flops":"4000"}}}
  ROOT %home = bf16[64,16]{1,0} ragged-all-to-all(%kernel, %rows, %n, %n, %n, \
%n), replica_groups={{0,1,2,3}}
}
"""


def test_room_for_rows_is_not_all_taken():
  found = work.read(ROWS_BY_NUMBER)
  assert found.flops == 4000 // 4
  way, room, numbers = 2 * 64 * 16, 2 * 256 * 16, 4 * 4 * 4
  # Each way reads and writes what travels; the kernel all that it is given.
  assert found.bytes == 2 * (2 * way + numbers) + 2 * room
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "e")
  out, home = collectives.read(ROWS_BY_NUMBER, mesh)
  assert out.wire_bytes == home.wire_bytes == way * 3 // 4
  assert (out.bytes, home.bytes) == (room, way)


# -- bytes --------------------------------------------------------------------


@EACH
def test_a_product_reads_and_writes_each_array_once(where):
  found = read(einsum("mk,kn->mn"), where, (M, K), (K, N))
  assert found.bytes == 4 * (M * K + K * N + M * N)


@EACH
def test_a_scan_reads_and_writes_its_slices_once(where):
  length = 40

  def fn(x, slices):
    def body(x, each):
      x = jnp.tanh(x)
      return x, each * x[None]

    return jax.lax.scan(body, x, slices)[1]

  found = read(fn, where, (M,), (length, M, M))
  slices = 4 * length * M * M
  # A CPU fills the room with zeros before.
  passes = 3 if where == "cpu" else 2
  assert passes * slices <= found.bytes < (passes + 0.1) * slices


@EACH
def test_rows_looked_up_and_added(where):
  """Of a large table, only the rows that are named."""
  rows = 4096

  def fn(table, change):
    index = jnp.arange(8, dtype=jnp.int32) * 7
    return table.at[index].add(change), table[index]

  table, change = 4 * rows * N, 4 * 8 * N
  found = read(fn, where, (rows, N), (8, N))
  # The table is copied, as it was not given away.
  assert 2 * table <= found.bytes <= 2 * table + 20 * change


@EACH
def test_bytes_of_a_program_without_loops(where):
  """On a CPU the compiler's; on a TPU what is between stays on the chip."""

  def loss(x, w_in, w_out):
    return jnp.square(jax.nn.relu(x @ w_in) @ w_out).sum()

  shapes = (8 * M, M), (M, 4 * M), (4 * M, M)
  program = compiled(jax.grad(loss, (1, 2)), where, *shapes)
  theirs = program.cost_analysis()["bytes accessed"]
  found = work.read(program.as_text()).bytes
  if where == "cpu":
    assert found == pytest.approx(theirs, rel=0.001)
  else:
    assert found == 4 * (8 * M * M + 2 * 2 * 4 * M * M)
    assert found < theirs


# -- what no CPU compiles -----------------------------------------------------

LIBRARY = """HloModule jit_f

ENTRY %main (p0: bf16[768,2304], p1: bf16[8192,768]) -> bf16[2304,8192] {
  %p0 = bf16[768,2304]{1,0} parameter(0)
  %p1 = bf16[8192,768]{1,0} parameter(1)
  %cublas-lt-matmul.1 = (bf16[2304,8192]{1,0}, s8[4194304]{0}) \
custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul", \
backend_config={"operation_queue_id":"0","gemm_backend_config":{\
"alpha_real":1,"beta":0,"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  ROOT %get-tuple-element.1 = bf16[2304,8192]{1,0} \
get-tuple-element(%cublas-lt-matmul.1), index=0
}
"""


def test_products_by_a_library_of_gpus():
  found = work.read(LIBRARY)
  assert found.flops == 2 * 768 * 2304 * 8192
  assert found.bytes == 2 * (768 * 2304 + 768 * 8192 + 2304 * 8192)
  older = LIBRARY.replace("$lt$matmul", "$gemm")
  older = older.replace('["0"]', "[0]").replace('["1"]', "[1]")
  assert work.read(older) == found


ON_CHIP = """HloModule jit_f

%fused (a: f32[8,6], b: f32[8,6], at: s32[]) -> f32[8,6] {
  %a = f32[8,6]{1,0:T(8,128)} parameter(0)
  %b = f32[8,6]{1,0:T(8,128)S(1)} parameter(1)
  %at = s32[]{:T(128)} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,6]{1,0:T(8,128)} dynamic-slice(%b, %at, %zero), \
dynamic_slice_sizes={1,6}
  ROOT %c = f32[8,6]{1,0:T(8,128)} dynamic-update-slice(%a, %row, %at, %zero)
}

ENTRY %main (x: f32[8,6], at: s32[]) -> f32[8,6] {
  %x = f32[8,6]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %start = (f32[8,6]{1,0:T(8,128)S(1)}, f32[8,6]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%x)
  %done = f32[8,6]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %fusion = f32[8,6]{1,0:T(8,128)} fusion(%x, %done, %at), kind=kLoop, \
calls=%fused
}
"""


def test_what_is_kept_on_the_chip_costs_nothing():
  """The copy reads all of x, the fusion writes a row and reads where to."""
  assert work.read(ON_CHIP) == work.Work(0, 4 * (8 * 6 + 6 + 1), True)
  # The same in memory: the copy is written and its row is read.
  outside = work.read(ON_CHIP.replace("S(1)", ""))
  assert outside.bytes == 4 * (2 * 8 * 6 + 2 * 6 + 1)


SPREAD = """HloModule jit_f, num_partitions=2

%begin (a: f32[4,8]) -> (f32[4,8], f32[8,8], s32[2]) {
  %a = f32[4,8]{1,0} parameter(0)
  %ag = f32[8,8]{1,0} all-gather(%a), channel_id=1, \
replica_groups=[1,2]<=[2], frontend_attributes={chain_id="1"}
  ROOT %open = (f32[4,8]{1,0}, f32[8,8]{1,0}, s32[2]{0:S(4)}) \
custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (b: f32[4,8], c: f32[8,8], f: s32[2], d: f32[8,8], e: f32[8,8]) -> \
(f32[8,8], f32[4,8], f32[8,8], f32[8,8], s32[2]) {
  %b = f32[4,8]{1,0} parameter(0)
  %c = f32[8,8]{1,0} parameter(1)
  %f = s32[2]{0:S(4)} parameter(2)
  %d = f32[8,8]{1,0} parameter(3)
  %e = f32[8,8]{1,0} parameter(4)
  %ag.1 = f32[8,8]{1,0} all-gather(%b), channel_id=2, \
replica_groups=[1,2]<=[2], frontend_attributes={chain_id="1"}
  %product = f32[8,8]{1,0} convolution(%d, %e), dim_labels=bf_io->bf
  ROOT %all = (f32[8,8]{1,0}, f32[4,8]{1,0}, f32[8,8]{1,0}, f32[8,8]{1,0}, \
s32[2]{0:S(4)}) tuple(%product, %b, %c, %ag.1, %f)
}

%end (g: f32[4,8], h: f32[8,8], i: s32[2]) -> f32[8,8] {
  %g = f32[4,8]{1,0} parameter(0)
  %h = f32[8,8]{1,0} parameter(1)
  %i = s32[2]{0:S(4)} parameter(2)
  %ag.2 = f32[8,8]{1,0} all-gather(%g), channel_id=1, \
replica_groups=[1,2]<=[2], frontend_attributes={chain_id="1"}
  ROOT %close = f32[8,8]{1,0} custom-call(%g, %h, %ag.2, %i), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[4,8], y: f32[8,8], z: f32[8,8]) -> (f32[8,8], f32[8,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %z = f32[8,8]{1,0} parameter(2)
  %s = (f32[4,8]{1,0}, f32[8,8]{1,0}, s32[2]{0:S(4)}) fusion(%x), \
kind=kCustom, calls=%begin
  %s.0 = f32[4,8]{1,0} get-tuple-element(%s), index=0
  %s.1 = f32[8,8]{1,0} get-tuple-element(%s), index=1
  %s.2 = s32[2]{0:S(4)} get-tuple-element(%s), index=2
  %m = (f32[8,8]{1,0}, f32[4,8]{1,0}, f32[8,8]{1,0}, f32[8,8]{1,0}, \
s32[2]{0:S(4)}) fusion(%s.0, %s.1, %s.2, %y, %z), kind=kOutput, \
calls=%meanwhile
  %m.0 = f32[8,8]{1,0} get-tuple-element(%m), index=0
  %m.1 = f32[4,8]{1,0} get-tuple-element(%m), index=1
  %m.3 = f32[8,8]{1,0} get-tuple-element(%m), index=3
  %m.4 = s32[2]{0:S(4)} get-tuple-element(%m), index=4
  %gathered = f32[8,8]{1,0} fusion(%m.1, %m.3, %m.4), kind=kCustom, calls=%end
  ROOT %t = (f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%m.0, %gathered)
}
"""


def test_a_collective_spread_over_fusions_counts_once():
  """Half a matrix is read and a whole one written; a product of others."""
  found = work.read(SPREAD)
  assert found.flops == 2 * 8**3
  assert found.bytes == 4 * (4 * 8 + 8 * 8) + 3 * 4 * 8 * 8


def test_walk_goes_into_everything():
  """What runs within others, and what does so alone."""
  runs = list(hlo.walk(hlo.parse(ON_CHIP)))
  assert [run.op.name for run in runs if run.is_alone] == [
    *("x", "at", "start", "done", "fusion")
  ]
  assert [run.op.name for run in runs if not run.is_alone] == [
    *("a", "b", "at", "zero", "row", "c")
  ]


def test_numbers_that_lead_to_many_others_are_told_once():
  """Each takes the one before it twice: 2^60 ways to the first."""
  adds = "\n".join(
    f"  %n{i} = s32[] add(%n{i - 1}, %n{i - 1})" for i in range(1, 61)
  )
  text = f"""HloModule jit_f

%below (t: (s32[], s32[])) -> pred[] {{
  %t = (s32[], s32[]) parameter(0)
  %at = s32[] get-tuple-element(%t), index=0
  %end = s32[] get-tuple-element(%t), index=1
  ROOT %test = pred[] compare(%at, %end), direction=LT
}}

%again (t: (s32[], s32[])) -> (s32[], s32[]) {{
  %t = (s32[], s32[]) parameter(0)
  %at = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%at, %one)
  %end = s32[] get-tuple-element(%t), index=1
  ROOT %both = (s32[], s32[]) tuple(%next, %end)
}}

ENTRY %main (n: s32[]) -> (s32[], s32[]) {{
  %n0 = s32[] constant(1)
{adds}
  %zero = s32[] constant(0)
  %start = (s32[], s32[]) tuple(%zero, %n3)
  %loop = (s32[], s32[]) while(%start), condition=%below, body=%again
  %unknown = (s32[], s32[]) tuple(%zero, %n60)
  ROOT %other = (s32[], s32[]) while(%unknown), condition=%below, body=%again
}}
"""
  times = {r.times for r in hlo.walk(hlo.parse(text)) if r.op.name == "next"}

  assert times == {8, 2**60}
