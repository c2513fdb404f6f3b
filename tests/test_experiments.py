"""Every experiment runs, quickly, and leaves its files where it is told."""

import csv
import importlib
import json
import pathlib

import pytest

pytestmark = pytest.mark.usefixtures("standard_promotion")

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
# What experiments share, and what makes them text.
OTHERS = {"__init__", "harness", "package_pairs", "training", "translating"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(name, tmp_path, capsys):
  from experiments import harness

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


def test_quick_without_out_writes_nothing(tmp_path, monkeypatch):
  from experiments import harness

  monkeypatch.setattr(harness, "RESULTS", tmp_path)
  table = harness.main(
    "none",
    lambda quick: [{"quick": quick}],
    lambda figure, table: None,
    argv=["--quick"],
  )
  assert table == [{"quick": True}]
  assert not list(tmp_path.iterdir())
