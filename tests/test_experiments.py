"""Every experiment runs, quickly, and leaves its files where it is told."""

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import figures, harness, training

pytestmark = pytest.mark.usefixtures("standard_promotion", "few_sizes")

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
# What experiments share, and what makes them text.
OTHERS = {"__init__", "figures", "harness", "package_pairs"}
OTHERS |= {"paper_tables", "training", "translating"}
# A program of its own: `test_gpu_needs_five_packages`.
OTHERS |= {"gpu"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - OTHERS)


# What several of these train is the same, and trained once, as by full runs.
TOGETHER = {"capacity_curve", "compute_curve", "specialization"}
TOGETHER |= {"translation_capacity", "translation_curve"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(name, tmp_path, runs, monkeypatch):
  if name in TOGETHER:

    @contextlib.contextmanager
    def folder(name, quick, files=""):
      (runs / name).mkdir(exist_ok=True)
      with training.roughly_compiled():
        yield runs / name

    monkeypatch.setattr(training, "folder", folder)
  if name not in ("memory_137b", "sharding_layouts", "todays_machines"):
    # As a plain machine has it: compiling for eight takes much longer.
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])
  experiment = importlib.import_module(f"experiments.{name}")
  for part in ("Question:", "Method:", "Result:"):
    assert part in experiment.__doc__
  argv = ["--quick", f"--out={tmp_path}"]
  table = harness.main(name, experiment.rows, experiment.draw, argv=argv)
  assert len(figures.read(tmp_path / f"{name}.csv")) == len(table) > 0
  about = json.loads((tmp_path / f"{name}.json").read_text())
  assert about["command"] == f"python -m experiments.{name} {' '.join(argv)}"
  assert (tmp_path / f"{name}.png").stat().st_size > 1000
  # The columns of the results, which full runs write.
  results = map(figures.read, figures.RESULTS.glob(f"{name}*.csv"))
  known = {column for rows in results for column in rows[0]}
  assert not known or set(harness.columns(table)) <= known
  globals().get(f"check_{name}", len)(table)


def check_balanced_gating(table):
  whole = [row for row in table if row["layer"] == "all"]
  assert [row["max_over_mean_count"] for row in whole] == [1.0]


def check_mixed_experts(table):
  kinds = ["wide", "narrow", "linear", "identity"]
  assert [row["kind"] for row in table] == kinds
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


def check_upcycling(table):
  found = {(row["start"], row["extra"]): row["validation"] for row in table}
  assert len({*found.values()}) == len(found) == 8
  scratch = [found[of, n] for of in ("scratch", "scratch_all") for n in (2, 4)]
  assert scratch == sorted(scratch, reverse=True)
  assert all(found[of, 4] < found["dense", 2] for of in ("dense", "copies"))


def check_specialization(table):
  experts = [row for row in table if row["about"] == "expert"]
  assert [row["expert"] for row in experts] == list(range(len(experts)))
  mean = sum(row["load"] for row in experts) / len(experts)
  assert mean == pytest.approx(1, abs=0.01)
  assert any(row["about"] == "context" for row in table)


def test_files_are_where_options_say(tmp_path, monkeypatch):
  """A full run's beside other results; a quick one's nowhere."""
  monkeypatch.setattr(harness, "RESULTS", tmp_path)

  def rows(quick, text, size, config, changes=()):
    if text == "missing":
      raise FileNotFoundError(f"there is no {text}")
    yield {"text": text, "size": size, "ms": 1.5, "changes": len(changes)}

  def draw(figure, table):
    figure.subplots().set_title(table[0]["text"])
    return "One"

  def run(*argv):
    about = {"text": "a text", "size": "a number", "config": "a config"}
    return harness.main("some", rows, draw, 3, argv, **about)

  assert run("--quick")[0]["text"] == ""
  assert not list(tmp_path.iterdir())
  row = {"text": "long", "size": "", "ms": 1.5, "changes": 0}
  assert run("--text=long") == [row]
  stem = tmp_path / "some_text"
  content = "text,size,ms,changes\nlong,,1.5,0\n"
  assert stem.with_suffix(".csv").read_text() == content
  note = json.loads(stem.with_suffix(".json").read_text())
  assert note["seed"] == 3
  assert stem.with_suffix(".png").exists()
  fields = ["--config.data.kind=text", "--config.seed=1"]
  assert run("--quick", "--config=tiny", *fields)[0]["changes"] == 2
  for wrong in ("--confg=tiny", "--data.kind=text"):
    with pytest.raises(SystemExit, match="2"):
      run("--quick", wrong)
  # What is refused ends in one sentence.
  with pytest.raises(SystemExit, match="^experiments.some: there is no"):
    run("--text=missing")


FIVE_PACKAGES = """
import runpy, sys
import flax.linen, jax, jaxtyping, numpy, optax

class Refuse:
  def find_spec(self, name, path=None, target=None):
    top = name.split(".")[0]
    own = {"moejax", *(each.split(".")[0] for each in sys.modules)}
    if top not in own | sys.stdlib_module_names:
      raise ModuleNotFoundError(f"it imports {name}")

sys.meta_path.insert(0, Refuse())
program, *sys.argv = sys.argv[1], sys.argv[1], *sys.argv[2:]
runpy.run_path(program, run_name="__main__")
"""


def test_gpu_needs_five_packages(tmp_path):
  """What a machine with a GPU may lack; each part says what it found."""
  program, out = FOLDER / "gpu.py", tmp_path / "rows.json"
  command = [sys.executable, "-c", FIVE_PACKAGES, program, "--quick"]
  run = subprocess.run(
    [*command, f"--out={out}"],
    env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  assert run.returncode == 0, run.stderr
  _, *rows = json.loads(out.read_text())
  assert all(not row["fault"] for row in rows if row["part"] == "kit")
  assert {row["model"] for row in rows if row["part"] == "step"} == {
    "moe_256",
    "transformer",
  }
  assert all(row["kernels"] > 0 for row in rows if row["part"] == "step")
  (same,) = (row for row in rows if row["part"] == "repeats")
  assert same["different"] == 0
  layers = [row["layer"] for row in rows if row["part"] == "layer"]
  assert layers == ["large product", "dense", "gather 1.25", "dropless"]
  # Where there is no time each part says what it leaves out.
  run = subprocess.run(
    [*command, "--seconds=0"], capture_output=True, text=True, cwd=tmp_path
  )
  assert run.stdout.count("left_out=") == 3


def test_rows_are_added_to_those_of_other_models(tmp_path):
  ms = iter(range(9))

  def rows(quick, models, size):
    yield from ({"model": m, "ms": next(ms)} for m in models.split(","))

  def run(*argv):
    argv = [f"--out={tmp_path}", *argv]
    about = {"models": "which", "size": "a number"}
    harness.main("some", rows, lambda *_: "One", 0, argv, **about)

  run("--models=1.5,b", "--add")
  run("--models=c,1.5", "--add")
  table = (tmp_path / "some.csv").read_text()
  assert table == "model,ms\nb,1\nc,2\n1.5,3\n"
  note = json.loads((tmp_path / "some.json").read_text())
  assert "--models=c,1.5" in note["command"]
  assert "--models=1.5,b" in note["before"]["command"]
  # Of another size they are other results; so are those that are not added.
  run("--models=c", "--size=2", "--add")
  run("--models=c")
  for stem in "some_size", "some_models":
    assert "c," in (tmp_path / f"{stem}.csv").read_text()
  assert (tmp_path / "some.csv").read_text() == table


def test_times_are_those_of_each_in_turn(monkeypatch):
  clock = iter([0, 9, 0, 9, 0, 1, 10, 14, 20, 25, 30, 32, 40, 43, 50, 57])
  monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock) / 1e3)
  order = []
  candidates = {name: lambda n=name: order.append(n) for name in "ab"}
  times = harness.interleaved(candidates, 3)
  assert order == ["a", "b"] * 4
  assert times["a"] == pytest.approx((3, 1))
  assert times["b"] == pytest.approx((4, 2))


def test_runs_side_by_side_have_a_core_each(tmp_path, environment, monkeypatch):
  """They give what they give here; one that fails is named, and ends all."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
  pinned = []
  monkeypatch.setattr(os, "sched_setaffinity", lambda _, on: pinned.append(on))
  wanted = {}
  for seed in range(2):
    config = training.load("sotu/moe_32", {"seed": seed})
    training.shrink(config, tmp_path)
    wanted[str(seed)] = config
  folder = tmp_path / "beside"
  beside = training.train_all(folder, wanted, quick=False)
  assert [{0}, {0, 1}, {1}, {0, 1}] == [set(cores) for cores in pinned]
  here = training.train(config, tmp_path / "here")
  assert beside["1"].last("sampled_loss") == pytest.approx(
    here.last("sampled_loss"), rel=1e-4
  )
  assert beside["0"].last("sampled_loss") != here.last("sampled_loss")
  written = json.loads((folder / "1.json").read_text())
  assert written == json.loads(json.dumps(config.to_dict()))
  config.model.moe.router.k = 64
  with pytest.raises(SystemExit, match="0 ended: moejax: k = 64 experts"):
    training.train_all(tmp_path / "failing", {"0": config}, quick=False)
