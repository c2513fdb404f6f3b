"""A plan says what the compiled step needs, works and sends."""

import functools
import json
import re

import config_shapes
import jax
import pytest
import topology

from moejax import config as config_lib
from moejax import seats
from moejax.planning import chips, command, cost, plan, report, search
from moejax.training import state

pytestmark = pytest.mark.usefixtures("standard_promotion")
VOCABULARY = 1000
H100 = chips.CHIPS["h100"]


def tiny():
  return config_shapes.load("tiny.py")


@functools.cache
def here():
  """On the 8 CPU devices, as if each were a GPU; the step also runs."""
  found = chips.find("")._replace(chip=H100)
  return plan.make(tiny(), VOCABULARY, found)


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
  assert got.words == config.data.batch_size * config.data.row_length


def test_work_is_the_models_and_that_of_empty_slots():
  config, got = tiny(), here()
  tokens = config.data.batch_size * config.data.row_length
  assert 8 * got.model_flops == cost.flops_per_step(config, VOCABULARY)
  slots = seats.capacity(2 * 128, 128, 8, 1.25) * 8
  spare = slots / (2 * 128) - 1
  of_experts = 6 * (2 * 2 * 32 * 64) * tokens
  want = 8 * got.model_flops + spare * of_experts
  # The embedding, whose gradient is no product, and the target's own score.
  assert 8 * got.flops == pytest.approx(want, rel=0.03)


def test_exchanges_are_those_of_the_layout():
  """Tokens there and back, forward and backward (see test_layouts)."""
  config, got = tiny(), here()
  ways = [each for each in got.collectives if each.kind == "all-to-all"]
  groups = config.data.batch_size * config.data.row_length // 128
  capacity = seats.capacity(2 * 128, 128, 8, 1.25)
  travelling = 4 * 32 * 8 * capacity * groups // 8
  assert [each.bytes for each in ways] == 4 * [travelling]
  assert {each.axes for each in ways} == {("expert",)}
  assert not any(each.kind == "all-gather" for each in got.collectives)


def test_estimate_is_a_roofline():
  got = here()
  assert got.estimate.seconds == pytest.approx(sum(got.estimate))
  assert got.estimate.bound == "memory"
  sent = sum(each.wire_bytes * each.times for each in got.collectives)
  assert got.estimate.network == pytest.approx(sent / 450e9)
  # Neither products nor bytes in more than all the time.
  assert got.estimate.matrix <= got.flops / H100.flops
  assert got.words_per_second == got.words / got.estimate.seconds
  meanwhile = H100.flops * got.estimate.seconds
  assert got.utilisation == pytest.approx(got.model_flops / meanwhile)
  assert got.measured > got.estimate.seconds


def test_only_a_cpu_at_hand_saves_beside_a_step():
  there = plan.make(tiny(), VOCABULARY, chips.find("cpu:8"))
  kept = sum(here().memory[:2])
  # And the counters of step and words.
  assert 0 <= here().memory.needs - there.memory.needs - kept < 100


def test_too_little_memory_is_seen_before_anything_is_compiled():
  small = chips.find("cpu:8")._replace(chip=H100._replace(memory=1e5))
  with pytest.raises(
    plan.DoesNotFit, match=r"alone need 1\.\d+ MB .* which has 100 kB"
  ):
    plan.make(tiny(), VOCABULARY, small)


def test_the_compilers_report_of_too_little_memory():
  topology.chips()  # or skip
  config = config_shapes.load("sotu/moe_32.py")
  config.data.batch_size = 2**17
  got = plan.make(config, VOCABULARY, chips.find("v5e:2x2"))
  assert got.memory.needs > got.memory.has > 1.6e10
  assert not got.memory.fits
  # All else is known of it even so.
  assert got.collectives and got.estimate.seconds > 0
  said = report.text([got])
  assert re.search(
    r"expert on v5e:2x2: needs \d\d\.\d GB .* has 16\.9 GB", said
  )


def test_a_chip_has_its_roofline():
  topology.chips()  # or skip
  got = plan.make(tiny(), VOCABULARY, chips.find("v5e:2x4"))
  assert got.estimate.seconds > 0 and got.measured is None
  assert got.memory.has == 16 * 2**30 and got.memory.fits
  assert got.peak_flops == 197e12
  kinds = {each.kind for each in got.collectives}
  assert "all-to-all" in kinds and "all-gather" not in kinds


def test_sorted_rows_are_planned_for_as_many_as_come():
  topology.chips()  # or skip
  config = tiny()
  # What the kernels of a TPU take.
  config.model.width = config.model.moe.experts.hidden = 128
  config.model.moe.update({"dispatch": "ragged", "group_size": 64})
  with config.ignore_type():
    config.model.moe.capacity_factor = None
  config.data.update({"batch_size": 64, "row_length": 64})
  got = plan.make(config, VOCABULARY, chips.find("v5e:2x4"))
  assert got.flops == pytest.approx(got.model_flops, rel=0.1)
  ways = [e for e in got.collectives if e.kind == "ragged-all-to-all"]
  assert len(ways) == 4 and len({each.wire_bytes for each in ways}) == 1


def test_report_has_all_of_it(tmp_path):
  changes = {"config.train.microbatches": 2}
  refused = search.Refusal(
    "cpu:8", "fsdp", changes, "too large.", 2 * 10**9, 10**9
  )
  outcomes = [here(), refused]
  text = report.text(outcomes)
  for part in ("expert", "fsdp", "too large.", "2 GB", "all-to-all", "memory"):
    assert part in text
  head, first, second = report.tries(outcomes).splitlines()
  assert head.split()[:3] == ["tried", "needs", "fits"]
  assert "yes" in first and "memory" in first
  assert second.startswith("fsdp, cpu:8, microbatches 2") and "no" in second
  report.write(outcomes, outcomes, tmp_path)
  first, second = json.loads((tmp_path / report.PLAN_FILE).read_text())
  assert first["memory"]["fits"] and first["estimate"]["bound"] == "memory"
  assert len(first["collectives"]) == len(here().collectives)
  assert second["reason"] == "too large."
  assert (tmp_path / report.FIGURE_FILE).stat().st_size > 5000


def test_the_command_says_why_nothing_can_be(capsys):
  config = tiny()
  for name in {*config.data} - {"row_length", "batch_size"}:
    del config.data[name]
  about = {"kind": "lm1b", "vocab_size": VOCABULARY, "vocab_file": "none.txt"}
  config.data.update(about)
  with pytest.raises(ValueError, match=r"splits the devices by 2.* the 3 at"):
    command.run(config, ["cpu:3"], ["data_expert"], False)
  with pytest.raises(ValueError, match="nearest is 'expert'"):
    command.run(config, ["cpu:8"], ["exprt"], False)
  with pytest.raises(ValueError, match="how fast a device of cpu:8"):
    command.run(config, ["cpu:8"], [], True)
  assert "compiling data_expert" in capsys.readouterr().out
  assert config_lib.vocab_size(config) == VOCABULARY
