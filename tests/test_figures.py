"""Every figure is drawn from its table alone, and can be read."""

import importlib
import itertools
import shutil

import pytest
from matplotlib.patches import Rectangle

from experiments import figures

STEMS = sorted(path.stem for path in figures.RESULTS.glob("*.csv"))


def faults(figure):
  """What a reader would stumble over."""
  found = []
  boxes, whole = figures.texts(figure), figure.bbox
  for text, box in boxes:
    inside = whole.x0 <= box.x0 and box.x1 <= whole.x1
    if not (inside and whole.y0 <= box.y0 and box.y1 <= whole.y1):
      found.append(f"{text.get_text()!r} is cut off")
  for (one, box), (other, its) in itertools.combinations(boxes, 2):
    if box.overlaps(its):
      found.append(f"{one.get_text()!r} on {other.get_text()!r}")
  for axes in figure.axes:
    bars = [p for p in axes.patches if isinstance(p, Rectangle)]
    if bars and axes.get_xscale() != "linear":
      found.append("bars on a log scale")
    if bars and not (axes.get_xlim()[0] == 0 == min(b.get_x() for b in bars)):
      found.append("bars that do not begin at 0")
    names = axes.get_xlabel(), axes.get_title("left"), figure.get_supxlabel()
    if not any(names):
      found.append("an axis without a name")
  if not figure.get_suptitle():
    found.append("no title")
  return found


@pytest.mark.parametrize("stem", STEMS)
def test_a_figure_can_be_read(stem):
  module = importlib.import_module(f"experiments.{figures.experiment(stem)}")
  table = figures.read(figures.RESULTS / f"{stem}.csv")
  figure = figures.picture(module.draw, table)
  figure.draw_without_rendering()
  assert faults(figure) == []


def test_all_are_drawn_by_one_command(tmp_path, monkeypatch):
  shutil.copy(figures.RESULTS / f"{STEMS[0]}.csv", tmp_path)
  monkeypatch.setattr(figures, "RESULTS", tmp_path)
  figures.main([])
  assert 5_000 < (tmp_path / f"{STEMS[0]}.png").stat().st_size < 100_000


def test_every_result_has_its_table_figure_and_origin():
  kinds = {".csv", ".json", ".png"}
  found = {path.name for path in figures.RESULTS.iterdir()}
  assert found == {f"{stem}{kind}" for stem in STEMS for kind in kinds}
  assert len(STEMS) >= 22


def test_faults_are_seen():
  def draw(figure, table):
    left, right = figure.subplots(1, 2)
    left.bar([0, 1], [2, 3], bottom=1)
    left.set_xlim(1, 2)
    left.set_xlabel("one")
    right.barh([0, 1], [2, 3])
    right.set_xscale("log")
    right.annotate("on", (1, 0))
    right.annotate("top", (1, 0))
    figure.text(0.99, 0.5, "beyond the edge")
    return ""

  found = " ".join(faults(figures.picture(draw, [])))
  for fault in ("cut off", "'on' on 'top'", "log", "begin at 0", "name"):
    assert fault in found
  assert "no title" in found


def test_labels_make_way():
  def draw(figure, table):
    axes = figure.subplots()
    axes.plot([1, 1.01, 1.02], [1, 1.01, 1.02], "o")
    for i in range(3):
      figures.label(axes, f"point {i}", (1 + i / 100,) * 2, "black")
      figures.level(axes, f"level {i}", 1 + i / 1000)
    axes.set_xlim(0, 2)
    axes.set_xlabel("one")
    return "Three in one place"

  assert faults(figures.picture(draw, [])) == []


def test_numbers_in_words():
  numbers = map(figures.number, (1234.5, 99.94, 0.1234, None))
  assert [*numbers] == ["1,234", "99.9", "0.123", ""]
  assert figures.span([2, 1.5]) == "1.50 to 2.00"
  assert figures.span([2, 1.999], "{:.1f}") == "2.0"
  assert figures.than(79.77, 94.29) == "15 % lower"
  assert figures.than(2, 1) == "100 % higher"
  assert figures.paper_name("lm1b/moe_256_h") == "MoE-256-h"
  assert figures.experiment("capacity_curve_text_models") == "capacity_curve"


def test_a_table_is_read_as_it_was(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text('a,b,c,d\n1,0.5,True,\nx,-2e3,False,"1, 2"\n')
  assert figures.read(path) == [
    {"a": 1, "b": 0.5, "c": True, "d": None},
    {"a": "x", "b": -2000.0, "c": False, "d": "1, 2"},
  ]
