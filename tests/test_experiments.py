"""Every experiment runs, quickly, and leaves its files where it is told."""

import csv
import importlib
import json
import pathlib

import pytest

from experiments import harness

pytestmark = pytest.mark.usefixtures("standard_promotion")

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
# What experiments share, and what makes them text.
OTHERS = {"__init__", "figures", "harness", "package_pairs"}
OTHERS |= {"paper_tables", "training", "translating"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(name, tmp_path, capsys):
  experiment = importlib.import_module(f"experiments.{name}")
  for part in ("Question:", "Method:", "Result:"):
    assert part in experiment.__doc__
  argv = ["--quick", f"--out={tmp_path}"]
  table = harness.main(name, experiment.rows, experiment.draw, argv=argv)
  assert table
  with (tmp_path / f"{name}.csv").open() as file:
    assert len(list(csv.DictReader(file))) == len(table)
  about = json.loads((tmp_path / f"{name}.json").read_text())
  assert about["command"] == f"python -m experiments.{name} {' '.join(argv)}"
  assert (tmp_path / f"{name}.png").stat().st_size > 1000
  assert capsys.readouterr().out
  # The columns of the results, which full runs write.
  known = set()
  for path in harness.RESULTS.glob(f"{name}*.csv"):
    known |= set(path.read_text().partition("\n")[0].split(","))
  assert not known or set(harness.columns(table)) <= known
  globals().get(f"check_{name}", len)(table)


def check_balanced_gating(table):
  whole = [row for row in table if row["layer"] == "all"]
  assert [row["max_over_mean_count"] for row in whole] == [1.0]


def check_mixed_experts(table):
  assert [row["kind"] for row in table] == [
    "wide",
    "narrow",
    "linear",
    "identity",
  ]
  for column in ("share", "gate", "frequent"):
    assert sum(row[column] for row in table) == pytest.approx(1, abs=0.01)
  assert table[0]["ops"] > table[1]["ops"] > table[3]["ops"] == 0


def check_sharding_layouts(table):
  assert all(row["loss_difference"] < 1e-5 for row in table)
  assert all(row["gradient_difference"] < 1e-4 for row in table)
  sent = [row["sent_MB"] > 0 for row in table]
  assert sent == [row["layout"] != "one device" for row in table]


def check_expert_count_cost(table):
  dense, flat, two_level = table
  assert dense["parameters"] < flat["parameters"] < two_level["parameters"]


def check_capacity_curve(table):
  *models, counted = table
  assert counted["model"] == "kneser_ney_5"
  assert all(row["paper"] and row["dropped"] is not None for row in models)


def check_specialization(table):
  experts = [row for row in table if row["about"] == "expert"]
  assert [row["expert"] for row in experts] == list(range(512))
  mean = sum(row["load"] for row in experts) / 512
  assert mean == pytest.approx(1, abs=0.01)
  assert any(row["about"] == "context" for row in table)


def test_quick_without_out_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(harness, "RESULTS", tmp_path)
  table = harness.main(
    "none", lambda quick: [{"quick": quick}], None, argv=["--quick"]
  )
  assert table == [{"quick": True}]
  assert not list(tmp_path.iterdir())


def test_a_full_run_writes_to_results_by_its_options(tmp_path, monkeypatch):
  monkeypatch.setattr(harness, "RESULTS", tmp_path)

  def rows(quick, text, size):
    assert not quick
    yield {"text": text, "size": size, "ms": 1.5}

  def draw(figure, table):
    figure.subplots().set_title(table[0]["text"])
    return "One"

  about = {"text": "a text", "size": "a number"}
  table = harness.main("some", rows, draw, 3, ["--text=long"], **about)
  assert table == [{"text": "long", "size": "", "ms": 1.5}]
  stem = tmp_path / "some_text"
  assert stem.with_suffix(".csv").read_text() == "text,size,ms\nlong,,1.5\n"
  note = json.loads(stem.with_suffix(".json").read_text())
  assert note["seed"] == 3
  assert stem.with_suffix(".png").exists()


def test_times_are_those_of_each_in_turn(monkeypatch):
  clock = iter([0, 1, 10, 14, 20, 25, 30, 32, 40, 43, 50, 57])
  monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock) / 1e3)
  order = []
  candidates = {name: lambda n=name: order.append(n) for name in "ab"}
  times = harness.interleaved(candidates, 3)
  assert order == ["a", "b"] * 4
  assert times["a"] == pytest.approx((3, 1))
  assert times["b"] == pytest.approx((4, 2))
