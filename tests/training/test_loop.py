"""Whole runs by the command line: kill, resume, damage, stop."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moejax.training import loop, metrics

ROOT = pathlib.Path(__file__).parents[2]
FROM_CLOCK = {"words_per_second"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """What a user's shell has, and a compilation cache to save time."""
  cache = tmp_path_factory.mktemp("compiled")
  return os.environ | {
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }


@pytest.fixture(scope="module")
def start(environment, small_flags):
  """Starts `moejax train` in a process of its own."""

  def start(workdir, *flags):
    command = [sys.executable, "-m", "moejax", "train", *small_flags, *flags]
    return subprocess.Popen(
      [*command, f"--workdir={workdir}"],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
  """A run that nothing disturbed: its workdir and what it printed."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  process = start(workdir)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  return workdir, output


def curve(workdir):
  """The metrics of a run, but for those a clock makes."""
  return [
    {name: value for name, value in line.items() if name not in FROM_CLOCK}
    for line in metrics.read(workdir / metrics.METRICS_FILE)
  ]


def wait_for_step(process, workdir, step):
  """Waits until a step is in the metrics."""
  path = workdir / metrics.METRICS_FILE
  while process.poll() is None:
    lines = metrics.read(path)
    if lines and lines[-1]["step"] >= step:
      return
    time.sleep(0.005)
  pytest.fail(f"ended before step {step}: {process.communicate()[0]}")


def finish(start, workdir, whole):
  """Runs the same command again; the curve must be the undisturbed one."""
  process = start(workdir)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert curve(workdir) == curve(whole[0])
  return output


def test_a_run_reports_and_remembers(whole):
  workdir, output = whole
  lines = curve(workdir)
  train = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in train] == list(range(1, 13))
  assert set(train[0]) == {
    "step",
    "split",
    "loss",
    "auxiliary",
    "perplexity",
    "cv_importance",
    "cv_load",
    "max_over_mean_load",
    "max_over_mean_count",
    "unused_experts",
    "entropy",
    "dropped_fraction",
    "dropped_first_fraction",
    "dropped_later_fraction",
    "grad_norm",
    "param_norm",
    "learning_rate",
  }
  others = [(ln["step"], ln["split"]) for ln in lines if ln["split"] != "train"]
  assert others == [(6, "validation"), (12, "validation"), (12, "test")]
  result = json.loads((workdir / loop.RESULT_FILE).read_text())
  assert f"test perplexity {result['test']['perplexity']:,.2f}" in output
  assert str(workdir) in output
  assert "left" in output
  assert list((workdir / "tensorboard").iterdir())
  # Twelve steps already teach something.
  halfway, end = (ln["loss"] for ln in lines if ln["split"] == "validation")
  assert end < halfway


def test_finished_and_started_again_says_the_same(start, whole, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  output = finish(start, workdir, whole)
  assert "finished before: test perplexity" in output
  assert "compiling" not in output


def test_killed_in_the_final_test_tests_again(start, whole, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  (workdir / loop.RESULT_FILE).unlink()
  output = finish(start, workdir, whole)
  assert "at step 12 of 12" in output
  assert whole[1].split("test perplexity")[1][:6] in output


@pytest.mark.parametrize("step", [1, 5, 8])
def test_killed_and_started_again_is_the_same_run(start, whole, tmp_path, step):
  workdir = tmp_path / "run"
  process = start(workdir)
  wait_for_step(process, workdir, step)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  finish(start, workdir, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_saves_and_leaves(start, whole, tmp_path, number):
  workdir = tmp_path / "run"
  process = start(workdir)
  wait_for_step(process, workdir, 4)
  process.send_signal(number)
  # What make and timeout do: the same signal reaches the group and its parts.
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert "Traceback" not in output
  assert output.count("stopping after this step") == 1
  step = int(output.split("stopped at step ")[1].split()[0])
  assert (workdir / loop.CHECKPOINTS / str(step)).is_dir()
  again = finish(start, workdir, whole)
  assert f"resuming {workdir} at step {step} of 12" in again


def test_a_checkpoint_cut_short_is_passed_over(start, whole, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  newest = workdir / loop.CHECKPOINTS / "12"
  files = [file for file in newest.rglob("*") if file.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  (workdir / loop.RESULT_FILE).unlink()
  output = finish(start, workdir, whole)
  assert "checkpoint of step 12 cannot be read" in output
  assert "at step 9 of 12" in output


@pytest.mark.parametrize(
  "flags",
  [
    ["--config.optimizer.peak=1e30"],
    # The very first update divides 0 by 0; its loss and gradient are fine.
    ["--config.optimizer.eps=0.0", "--config.train.steps=1"],
  ],
)
def test_what_is_no_number_stops_the_run(start, tmp_path, flags):
  workdir = tmp_path / "run"
  process = start(workdir, *flags, "--config.train.checkpoint_every=1")
  output, _ = process.communicate()
  assert process.returncode == 1
  message = output.splitlines()[-1]
  found = re.search(
    r"became (nan|inf) at step (\d+); (?:checkpoint (\d+)|no checkpoint)",
    message,
  )
  assert found, output
  kept = [int(path.name) for path in (workdir / loop.CHECKPOINTS).iterdir()]
  assert (int(found[3]) if found[3] else None) == max(kept, default=None)
  assert all(step < int(found[2]) for step in kept)


def test_two_cannot_train_in_one_workdir(start, tmp_path):
  workdir = tmp_path / "run"
  first = start(workdir, "--config.train.steps=100000")
  wait_for_step(first, workdir, 1)
  second = start(workdir, "--config.train.steps=100000")
  output, _ = second.communicate()
  assert second.returncode == 1
  assert f"another process trains in {workdir}" in output
  first.kill()
  first.communicate()


def test_another_text_is_refused(start, whole, tmp_path, corpus):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  (workdir / loop.RESULT_FILE).unlink()
  before = corpus.read_text(encoding="utf-8")
  try:
    corpus.write_text(before + "One more sentence .\n", encoding="utf-8")
    process = start(workdir)
    output, _ = process.communicate()
  finally:
    corpus.write_text(before, encoding="utf-8")
  assert process.returncode == 1
  assert "has changed since the run" in output
