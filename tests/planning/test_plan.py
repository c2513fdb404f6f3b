"""A plan says what the compiled step needs, works and sends."""

import functools
import json
import math
import re

import config_shapes
import jax
import numpy as np
import pytest
import topology

from moejax import config as config_lib
from moejax import slots as slots_lib
from moejax.models import softmax
from moejax.planning import chips, load, plan, report, search
from moejax.planning.collectives import Collective
from moejax.planning.work import Work
from moejax.training import cost, session, state

pytestmark = pytest.mark.usefixtures("standard_promotion")
VOCABULARY = 1000
H100, COMPILE = chips.CHIPS["h100"], plan._compile


def tiny():
  return config_shapes.experiment("tiny")


@functools.cache
def compiled():
  return COMPILE(session.lower(session.build(tiny(), VOCABULARY)), {})


@functools.cache
def on(name, chip=None):
  """The plan for 8 CPU devices, which is compiled once."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "_compile", lambda *_: compiled())
    found = chips.find(name)._replace(chip=chip)
    return plan.make(tiny(), VOCABULARY, found)


def here():
  """As if each device were a GPU; the step also runs."""
  return on("", H100)


def test_parameters_and_their_memory():
  config, counted = tiny(), cost.count(tiny(), VOCABULARY)
  got = here()
  assert got.parameters == counted.total
  assert got.inner == counted.parameters
  # One expert of 8 on each, everything else on all.
  experts = 2 * 32 * 64 * 8
  own = 4 * (counted.total - experts + experts // 8)
  assert got.memory.parameters == own
  # Two moments, and the counters of Adam and of the schedule.
  assert got.memory.optimizer == 2 * own + 2 * 4
  # The gradients, and the state before the step that is being saved.
  assert got.memory.rest > 4 * own
  assert got.memory.needs == sum(got.memory[:3])
  assert got.memory.has == state.device_memory(jax.devices()[0])
  assert got.memory.fits
  assert got.words == math.prod(config.shapes["mask"].shape)
  assert (got.topology, got.layout, got.devices) == ("8 x cpu", "expert", 8)


def distinct():
  """Classes that the 256 draws of a step are of, in the mean."""
  p = np.log1p(1 / np.arange(1, VOCABULARY + 1)) / np.log(VOCABULARY + 1)
  return (1 - (1 - p) ** 256).sum()


def test_work_is_the_models_and_that_of_empty_slots():
  config, got = tiny(), here()
  tokens = math.prod(config.shapes["mask"].shape)
  count = cost.count(config, VOCABULARY)
  needed = tokens * cost.flops_per_word(config, VOCABULARY, count)[0]
  assert 8 * got.model_flops == needed
  assert got.tflops_per_device == needed / 8 / got.measured / 1e12
  of_word = count.ops + 32 * (round(distinct()) + 1)
  assert got.experts_share == 2 * 2 * 32 * 64 / of_word
  assert got.ops_per_io == 64
  slots = slots_lib.capacity(2 * 128, 128, 8, 1.25) * 8
  spare = slots / (2 * 128) - 1
  of_experts = 6 * (2 * 2 * 32 * 64) * tokens
  # Places for classes that no draw takes.
  classes = softmax.most_distinct(256, VOCABULARY) - round(distinct())
  needed += spare * of_experts + 6 * 32 * classes * tokens
  # The embedding, whose gradient is no product, and the target's own score.
  assert 8 * got.flops == pytest.approx(needed, rel=0.03)


def test_collectives_are_those_of_the_layout():
  """Tokens there and back, forward and backward (see test_layouts)."""
  config, got = tiny(), here()
  found = [each for each in got.collectives if each.kind == "all-to-all"]
  groups = math.prod(config.shapes["mask"].shape) // 128
  capacity = slots_lib.capacity(2 * 128, 128, 8, 1.25)
  assert [each.bytes for each in found] == 4 * [
    4 * 32 * 8 * capacity * groups // 8
  ]
  assert {each.axes for each in found} == {("expert",)}
  assert not any(each.kind == "all-gather" for each in got.collectives)


def test_an_estimate_is_a_roofline():
  """On 450 GB/s of links: 5 ms of products, 2 ms of bytes, 12 of sending."""
  where = chips.find("")._replace(chip=H100)
  mesh = jax.sharding.Mesh(jax.devices(), "e")
  done = [
    Work(round(5e-3 * 989e12), round(4e-3 * 3350e9), True, 1),
    Work(round(1e-3 * 989e12), round(2e-3 * 3350e9), True, 4),
  ]
  sent = Collective(
    "all-to-all", "f32", 0, round(4e-3 * 450e9), ("e",), 3, True
  )
  found = plan.estimate(done, [sent], where, mesh)
  # Three collectives of 5 us and two kernels of 1 us.
  assert found == pytest.approx((5e-3, 2e-3, 12e-3, 17e-6))
  assert found.seconds == pytest.approx(19.017e-3) and found.bound == "network"
  v5p = where._replace(chip=chips.CHIPS["v5p"], sides=(2, 2, 2))
  assert plan.estimate(done, [], v5p, mesh).launches == 0
  got = here()
  assert got.words_per_second == got.words / got.estimate.seconds
  meanwhile = H100.flops * got.estimate.seconds
  assert got.utilization == pytest.approx(got.model_flops / meanwhile)
  assert got.measured > got.estimate.seconds > 0


def test_only_a_cpu_at_hand_saves_beside_a_step():
  there = on("cpu:8")
  kept = sum(here().memory[:2])
  # And the counters of step and words.
  assert 0 <= here().memory.needs - there.memory.needs - kept < 100
  assert there.measured is there.estimate is there.memory.has is None
  assert there.tflops_per_device is None


def test_too_little_memory_is_seen_before_anything_is_compiled():
  small = chips.find("cpu:8")._replace(chip=H100._replace(memory=1e5))
  got = plan.make(tiny(), VOCABULARY, small, {"config.seed": 1})
  assert got[:3] == ("cpu:8", "expert", {"config.seed": 1})
  needed = sum(here().memory[:2])
  assert 0 <= got.needs - needed < 100 and got.has == 100_000
  assert re.search(r"alone need 1\.\d+ MB .* which has 100 kB", got.reason)


def test_the_compilers_report_of_too_little_memory():
  topology.chips()  # or skip
  config = config_shapes.experiment("sotu/moe_32", data__batch_size=2**17)
  got = plan.make(config, VOCABULARY, chips.find("v5e:2x2"))
  assert got.memory.needs > got.memory.has > 1.6e10
  assert not got.memory.fits
  # All else is known of it even so.
  assert got.collectives and got.estimate.seconds > 0


def test_a_chip_that_is_not_there():
  """With sorted rows, planned for as many as come."""
  topology.chips()  # or skip
  config = functools.partial(
    config_shapes.experiment,
    "tiny",
    # What the kernels of a TPU take.
    model__width=128,
    model__moe__experts__hidden=128,
    model__moe__dispatch="ragged",
    model__moe__group_size=64,
    model__moe__capacity_factor=None,
    data__batch_size=64,
    data__row_length=64,
  )
  got = plan.make(config(), VOCABULARY, chips.find("v5e:2x4"))
  assert got.estimate.seconds > 0 and got.measured is None
  assert got.memory.has == 16 * 2**30 and got.memory.fits
  assert got.peak_flops == 197e12
  assert got.flops == pytest.approx(got.model_flops, rel=0.1)
  found = [e for e in got.collectives if e.kind == "ragged-all-to-all"]
  assert len(found) == 4 and len({each.wire_bytes for each in found}) == 1
  # The busiest device gets twice the rows, and has as many products more.
  uneven = load.Load("", {"layers_1": np.array([[4, 2, 2, 2, 2, 2, 2, 0]])})
  busy = plan.make(config(), VOCABULARY, chips.find("v5e:2x4"), load=uneven)
  assert (got.busiest, busy.busiest) == (1, 2)
  assert busy.filled == pytest.approx(2 * got.filled)
  assert 0 < busy.filled <= 1
  kernels = got.experts_share * got.model_flops
  assert busy.flops - got.flops == pytest.approx(kernels, rel=0.1)
  for before, after in zip(got.collectives, busy.collectives, strict=True):
    times = 1 + (before.kind == "ragged-all-to-all")
    assert after.wire_bytes == times * before.wire_bytes
  assert busy.estimate.network > got.estimate.network
  # Of more chips of this kind the compiler refuses the same program.
  with pytest.raises(ValueError, match="of this step .* says: INTERNAL: .*all"):
    more = config(model__moe__num_experts=64)
    plan.make(more, VOCABULARY, chips.find("v5e:8x8"))


# -- reports ------------------------------------------------------------------

MADE = plan.Plan(
  topology="v5e:2x2",
  layout="expert",
  changes={"config.train.microbatches": 2},
  devices=4,
  inner=1_000,
  parameters=3_000,
  memory=plan.Memory(1 * 10**9, 2 * 10**9, 4 * 10**9, 16 * 10**9),
  model_flops=2e12,
  experts_share=0.4,
  ops_per_io=1024.0,
  flops=3 * 10**12,
  bytes=5 * 10**12,
  launches=None,
  is_bounded=True,
  collectives=[
    Collective("all-gather", "f32", 0, 10**6, ("data",), 1, True),
    Collective("all-to-all", "f32", 0, 2 * 10**6, ("expert",), 3, True),
    Collective("all-to-all", "f32", 0, 8 * 10**6, ("expert",), 1, True),
    Collective("all-reduce", "f32", 0, 1000, None, 1, True),
  ],
  estimate=plan.Estimate(0.003, 0.005, 0.002),
  words=8_000,
  compile_seconds=7.0,
  peak_flops=1e15,
  measured=0.012,
)
REFUSED = plan.Refusal("cpu:8", "fsdp", {}, "too large.", 2 * 10**9, 10**9)


def test_every_number_of_a_table_is_what_it_is_called():
  table, sent, refused = report.text([MADE, REFUSED]).split("\n\n")
  cells = {
    name: (mine, other)
    for name, mine, other in (
      re.split(r"  +", line) for line in table.splitlines()
    )
  }
  assert {name: mine for name, (mine, _) in cells.items()} == {
    "layout": "expert",
    "topology": "v5e:2x2",
    "train.microbatches": "2",
    "devices": "4",
    "all parameters": "3,000",
    "but embedding, softmax": "1,000",
    "on a device: parameters": "1 GB",
    "optimizer": "2 GB",
    "all else": "4 GB",
    "needs": "7 GB",
    "has": "16 GB",
    "fits": "yes",
    "FLOPs": "3 T",
    "over the model's": "1.50",
    "bytes of memory moved": "5 TB",
    "experts, of the model's": "40.0%",
    "ops per number to or from experts": "1,024",
    "ms matrix": "3.0",
    "ms memory": "5.0",
    "ms network": "2.0",
    "ms a step, estimated": "10.0",
    "bound by": "memory",
    "words/s": "800,000",
    "utilization": "20.0%",
    "ms a step, measured": "12.0",
    "TFLOPS a device, measured": "167",
    "s to compile": "7",
  }
  others = {n: other for n, (_, other) in cells.items() if other != "-"}
  about = {"layout": "fsdp", "topology": "cpu:8"}
  assert others == about | {"needs": "2 GB", "has": "1 GB", "fits": "no"}
  assert [re.split(r"  +", line) for line in sent.splitlines()[1:]] == [
    ["expert", "all-to-all", "expert", "4", "3.5 MB", "14 MB"],
    ["expert", "all-gather", "data", "1", "1 MB", "1 MB"],
    ["expert", "all-reduce", "groups of no axis", "1", "1 kB", "1 kB"],
  ]
  assert refused == "fsdp on cpu:8: too large."


def test_a_table_of_gpus_has_launches_and_what_goes_between_nodes():
  across = MADE.collectives[1]._replace(between_bytes=10**6)
  made = MADE._replace(
    topology="h100:2x2",
    launches=12_345,
    estimate=plan.Estimate(0.003, 0.005, 0.002, 0.012),
    collectives=[MADE.collectives[0], across],
  )
  table, sent = report.text([made, MADE]).split("\n\n")
  cells = [re.split(r"  +", line) for line in table.splitlines()]
  assert ["kernels launched", "12,345", "-"] in cells
  assert ["ms launches", "12.0", "-"] in cells
  assert ["bound by", "launches", "memory"] in cells
  head, *rows = [re.split(r"  +", line) for line in sent.splitlines()]
  assert head[-1] == "to other nodes"
  assert [row[-1] for row in rows] == ["3 MB", "0 B", "0 B", "0 B", "0 B"]


def test_a_table_says_what_does_not_fit_or_is_unknown():
  large = MADE._replace(memory=MADE.memory._replace(rest=14 * 10**9))
  assert "microbatches 2 on v5e:2x2: needs 17 GB" in report.text([large])
  assert "which has 16 GB; take more devices" in report.text([large])
  unknown = MADE._replace(is_bounded=False, estimate=None)
  assert "FLOPs and time are more" in report.text([unknown])
  head, first, second = report.tries([MADE, REFUSED]).splitlines()
  assert head.split()[:3] == ["tried", "needs", "fits"]
  assert first.startswith("expert, v5e:2x2, microbatches 2")
  assert "yes" in first and "memory" in first
  assert second.startswith("fsdp, cpu:8") and "no" in second


def test_files_hold_all_that_is_known(tmp_path):
  report.write([MADE, REFUSED], [MADE], tmp_path)
  first, second = json.loads((tmp_path / report.PLAN_FILE).read_text())
  assert first["memory"] == MADE.memory._asdict() | {
    "needs": 7 * 10**9,
    "fits": True,
  }
  assert first["estimate"] == MADE.estimate._asdict() | {
    "seconds": pytest.approx(0.01),
    "bound": "memory",
    "words_per_second": pytest.approx(800_000),
    "utilization": pytest.approx(0.2),
  }
  assert first["tflops_per_device"] == pytest.approx(2 / 0.012)
  assert len(first["collectives"]) == 4
  assert second == REFUSED._asdict()
  assert (tmp_path / report.FIGURE_FILE).stat().st_size > 5000


def test_the_command_says_why_nothing_can_be(capsys):
  data = {
    "kind": "lm1b",
    "vocab_size": VOCABULARY,
    "vocab_file": "none.txt",
    "row_length": 32,
    "batch_size": 32,
  }
  config = config_shapes.experiment("tiny", data=data)
  with pytest.raises(ValueError, match=r"splits the devices by 2.* the 3 at"):
    search.run(config, ["cpu:3"], ["data_expert"], False)
  with pytest.raises(ValueError, match="nearest is 'expert'"):
    search.run(config, ["cpu:8"], ["exprt"], False)
  with pytest.raises(ValueError, match="speed of a device of cpu:8"):
    search.run(config, ["cpu:8"], [], True)
  assert "compiling data_expert" in capsys.readouterr().out
  assert config_lib.vocab_size(config) == VOCABULARY
