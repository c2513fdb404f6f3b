"""The load of a real run, as a plan takes it."""

import config_shapes
import numpy as np
import pytest

from moejax.analysis import trace
from moejax.main import main
from moejax.planning import load
from moejax.training import metrics

pytestmark = pytest.mark.usefixtures("one_device")
FIELDS = {
  "model.moe.num_experts": 8,
  "model.moe.group_size": 16,
  "model.moe.experts.hidden": 4,
  "model.moe.router": {"kind": "top_k", "k": 2},
}


def by_hand(edges, devices):
  """The busiest device's part of all, times the devices."""
  each = len(edges) // devices
  sums = [sum(edges[i * each : (i + 1) * each]) for i in range(devices)]
  return devices * max(sums) / sum(sums)


def test_the_busiest_device_is_that_of_every_step_and_mixture():
  rng = np.random.default_rng(0)
  edges = {name: rng.integers(0, 99, (5, 8)) for name in "ab"}
  for devices in 1, 2, 8:
    want = [by_hand(row, devices) for rows in edges.values() for row in rows]
    got = load.Load("", edges).busiest(devices)
    assert got == pytest.approx(np.mean(want))
  assert load.Load("", {"a": np.zeros((1, 8))}).busiest(2) == 0


def test_a_run_and_its_trace_tell_of_their_experts(trained, tmp_path, capsys):
  workdir = trained("sotu/moe_32", FIELDS)
  planned = config_shapes.experiment("tiny")  # of 8 experts, too
  trace.record(workdir, tmp_path / "trace")
  told = load.read(tmp_path / "trace", planned)
  ((name, edges),) = told.edges.items()
  text = trace.decisions(tmp_path / "trace", name)
  want = [(text.expert == e).sum() for e in range(8)]
  np.testing.assert_array_equal(edges, [want])
  # Of a run the last tenth, which of its steps is the last.
  with (tmp_path / metrics.LOADS_FILE).open("w") as file:
    for step in range(20):
      counts = [step] * 7 + [3 * step]
      file.write(f'{{"step": {step}, "layer": "m", "count": {counts}}}\n')
  told = load.read(tmp_path, planned)
  np.testing.assert_array_equal(told.edges["m"][:, 0], [18, 19])
  assert told.busiest(8) == pytest.approx(8 * 3 / 10)
  # What is refused.
  config = "--config=transformer/noisy_top_k"
  for flags, why in (
    ([f"--trace={tmp_path}", config], "of 8 experts in m, but the config has"),
    ([f"--trace={tmp_path / 'nothing'}", config], "is neither a run that"),
    ([f"--trace={tmp_path}", "--config=transformer/dense"], "mixtures of none"),
  ):
    assert main(["moejax", "plan", "--topology=cpu:8", *flags]) == 1
    assert why in capsys.readouterr().err
