"""The search for the fastest layout that fits, on costs made up."""

import itertools
import math
import types

import config_shapes
import jax
import pytest

from moejax import config as config_lib
from moejax.planning import chips, plan, search

# Nothing is compiled for them.
CHIP = chips.Topology(
  "made up", 2 * jax.devices(), chips.CHIPS["v5e"], (4, 4), False
)


def made_up(config, vocab_size, topology, changes, load=None):
  """Memory falls with microbatches and recompute, which cost time."""
  layout = config.layout.name
  if layout == "data_expert":
    raise ValueError("16 devices do not divide.")
  count = config.train.microbatches
  sections = dict(config_lib.mixtures(config.values)).values()
  moe = types.SimpleNamespace(**{"recompute": False} | [*sections][-1])
  needs = 40e9 / count if layout == "expert" else 30e9 + 1e9 / count
  if layout == "fsdp":
    needs = 30e9 - 6e9 * math.log2(count)
  needs -= 2e9 * moe.recompute
  seconds = 1 + 0.1 * count + 0.3 * moe.recompute + 0.2 * moe.capacity_factor
  seconds += 0.5 * (layout != "expert") + 64 / moe.group_size
  if needs > 100e9:
    return plan.Refusal("made up", layout, changes, "large", int(needs), 1)
  memory = plan.Memory(0, 0, int(needs), int(16e9))
  estimate = plan.Estimate(0.0, seconds, 0.0)
  return plan.Plan(
    "made up",
    layout,
    changes,
    *(16, 1, 1),
    memory,
    *(1.0, 0.5, 1.0, 1, 1, None, True, [], estimate, 1, 0.0, 1e12, None),
  )


@pytest.fixture(scope="module")
def suggested():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "make", made_up)
    patch.setattr(search, "STEPS", 16)
    config = config_shapes.experiment("tiny")
    return list(search.suggest(config, 100, CHIP))


def test_it_goes_on_from_the_best_until_nothing_helps(suggested):
  best = min(suggested, key=search.rank)
  # What fits at all needs four microbatches; then all that makes it faster.
  assert best.layout == "expert"
  assert best.changes["config.train.microbatches"] == 4
  assert best.changes["config.model.moe.capacity_factor"] == 1.0
  assert best.changes["config.model.moe.group_size"] > 128
  assert not best.changes.get("config.model.moe.recompute", False)
  seen = [(each.layout, tuple(each.changes.items())) for each in suggested]
  assert len(set(seen)) == len(seen)


def test_both_sides_of_a_transformer_are_changed(monkeypatch):
  monkeypatch.setattr(plan, "make", made_up)
  config = config_shapes.experiment("transformer/translate_tiny")
  tried = search.suggest(config, 100, CHIP)
  best = min(tried, key=search.rank)
  sides = [f"config.model.{side}.moe" for side in ("encoder", "decoder")]
  for field in ("capacity_factor", "group_size"):
    first, second = (best.changes[f"{side}.{field}"] for side in sides)
    assert first == second


def test_what_more_microbatches_cannot_help_is_left(suggested):
  # 40 GB halved and halved again fit into 16; 30 GB of 31 stay; of the last 6
  # are saved every time.
  runs = itertools.groupby(suggested, lambda each: each.layout)
  tries = [(layout, len(list(run))) for layout, run in runs]
  first = [("expert", 3), ("replicated", 2), ("data_expert", 1)]
  assert tries[:5] == [*first, ("expert_model", 2), ("fsdp", 4)]


def test_the_verdict_names_it_and_why(suggested):
  said = search.verdict(suggested)
  assert "layout 'expert' --config.train.microbatches=4" in said
  assert "needs 10 GB of 16 GB" in said and "bound by memory" in said
  best = min(suggested, key=search.rank)
  ms, rate = 1e3 * best.estimate.seconds, best.words_per_second
  assert f"{ms:,.1f} ms a step by the estimate ({rate:,.0f} words/s)" in said
  assert said.splitlines()[-1].startswith(
    "  data_expert, expert_model, replicated: "
  )
  # One that fits with another layout is named, with how much slower it is.
  others = [each for each in suggested if each.layout == "fsdp"]
  ratio = min(others, key=search.rank).estimate.seconds / best.estimate.seconds
  assert f"'fsdp', takes {ratio:.2f} times" in said


def test_the_verdict_on_what_does_not_fit(suggested):
  large = [each for each in suggested if search.rank(each)[0]]
  with pytest.raises(ValueError, match=r"needs [12]\d(\.\d)? GB of each"):
    search.verdict(large)
  (none,) = [each for each in suggested if each.layout == "data_expert"]
  with pytest.raises(ValueError, match="16 devices do not divide"):
    search.verdict([none])


def test_a_config_need_not_say_how_many_microbatches(monkeypatch):
  monkeypatch.setattr(
    search,
    "attempt",
    lambda *args: plan.Refusal("made up", "expert", {}, "too large", 2, 1),
  )
  config = config_shapes.load("tiny")
  del config.train.microbatches
  config = config_lib.parse(config)
  tried = list(search.suggest(config, 100, CHIP))
  assert len(tried) > search.STEPS


def test_one_group_a_device_is_halved_with_its_microbatch():
  tiny = config_shapes.experiment("tiny", model__moe__group_size=32 * 32)
  step = search._more_microbatches(tiny, CHIP._replace(devices=[None]))
  assert step["config.model.moe.group_size"] == 32 * 16


def test_a_layout_is_named_or_the_configs_own():
  config = config_shapes.experiment("lm1b/moe_256")
  assert list(search.layouts(config))[:2] == ["expert_vocab", "replicated"]


def test_changes_leave_the_config_alone():
  config = config_shapes.experiment("tiny")
  changes = {"config.layout": {"mesh_shape": (1, 8, 1)}, "config.seed": 3}
  changed = config_lib.changed(config, changes)
  assert (changed.seed, config.seed, config.layout.name) == (3, 0, "expert")
  assert changed.layout.mesh_shape == (1, 8, 1)


@pytest.mark.parametrize(
  "changes, parts",
  [
    ({"config.layout": "expert"}, 1),
    ({"config.layout": "data_expert"}, 2),
    ({"config.layout": "data_expert", "config.train.microbatches": 2}, 4),
  ],
)
def test_groups_of_tokens_are_together_in_a_replica(
  changes, parts, monkeypatch
):
  def make(config, vocab_size, topology, changes, load=None):
    raise ValueError("what it was asked for is known")

  monkeypatch.setattr(plan, "make", make)
  config = config_shapes.experiment("news/moe_131072_h")
  layer = config.values["model"]["hierarchical_moe"]
  assert config.train.microbatches == 1
  tokens = math.prod(config.shapes["mask"].shape)
  groups = tokens // layer["group_size"]
  assert layer["groups_together"] == groups
  here = chips.find("cpu:8")
  planned = search.attempt(config, 100, here, changes)
  name = "config.model.hierarchical_moe.groups_together"
  assert planned.changes.get(name, groups) == groups // parts
