"""Whole runs by the command line: report, resume, stop, refuse."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import program
import pytest
from program import curve, wait_for_step

from moejax import workdir as workdir_lib
from moejax.main import main
from moejax.training import metrics, run

# What a line of training holds, but for what a clock makes.
NAMES = """
step split sampled_loss auxiliary sampled_perplexity cv_importance cv_load
max_over_mean_load max_over_mean_count unused_experts entropy dropped_fraction
dropped_first_fraction dropped_later_fraction grad_norm param_norm learning_rate
words flops
"""


def finish(start, workdir, whole):
  """Runs the same command again; the curve must be the undisturbed one."""
  (output,) = program.end_well(start(workdir))
  assert curve(workdir) == curve(whole[0])
  assert program.loads(workdir) == program.loads(whole[0])
  return output


def test_a_run_reports_and_remembers(whole):
  workdir, output = whole
  lines = curve(workdir)
  train = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in train] == list(range(1, 13))
  assert {*train[0]} == {*NAMES.split()}
  # Two edges of each word; their balance is what the metrics tell.
  ((layer, (steps, counts)),) = metrics.loads(workdir).items()
  assert layer == "layers_1" and steps.tolist() == list(range(1, 13))
  for line, count in zip(train, counts, strict=True):
    assert count.sum() == 2 * line["words"] <= 2 * 8 * 16
    assert (
      line["flops"] == train[0]["flops"] / train[0]["words"] * line["words"]
    )
    highest = count.max() / count.mean()
    np.testing.assert_allclose(line["max_over_mean_count"], highest, 1e-6)
  others = [(ln["step"], ln["split"]) for ln in lines if ln["split"] != "train"]
  assert others == [(6, "validation"), (12, "validation"), (12, "test")]
  perplexity = program.result(workdir)["test"]["perplexity"]
  assert f"test perplexity {perplexity:,.2f}" in output
  assert str(workdir) in output and "left" in output
  # Adam's two moments, and two counts of updates.
  size, num_bytes = (
    int(re.search(rf"([\d,]+) {unit}", output)[1].replace(",", ""))
    for unit in ("parameters", "bytes, 8.00 a parameter")
  )
  assert num_bytes == 4 * (2 * size + 2)
  assert list((workdir / "tensorboard").iterdir())
  # Twelve steps already teach something.
  halfway, end = (ln["loss"] for ln in lines if ln["split"] == "validation")
  assert end < halfway


def test_loads_of_blocks_under_scan_are_those_of_each_block(config, tmp_path):
  fields = {
    "model.blocks.scan": True,
    "model.blocks.num_layers": 4,
    "model.blocks.attention.num_heads": 2,
    "model.blocks.dense.hidden": 16,
    "model.blocks.moe.num_experts": 8,
    "model.blocks.moe.group_size": 16,
    "model.blocks.moe.experts.hidden": 4,
    "train.steps": 1,
  }
  flags = config("transformer/noisy_top_k", fields)
  assert main(["moejax", "train", *flags, f"--workdir={tmp_path}/run"]) == 0
  (line, *_) = curve(tmp_path / "run")
  found = metrics.loads(tmp_path / "run")
  names = [f"blocks/layers_{i}/block_0/feed_forward" for i in (1, 3)]
  assert list(found) == names
  # Each has its own decisions: 4 experts a word.
  (_, first), (_, second) = found.values()
  assert first.sum() == second.sum() == 4 * line["words"]
  assert first.shape == (1, 8) and not np.array_equal(first, second)


def test_a_token_visits_fewer_experts_from_phase_to_phase(
  small_flags, tmp_path
):
  """All of 8, then 4, then 2; also where training stops within a phase."""
  phases = "{'k': (8, 4), 'until': (2, 5)}"
  argv = ["moejax", "train", *small_flags, f"--config.train.annealing={phases}"]

  def train(name, steps):
    workdir = tmp_path / name
    more = f"--workdir={workdir}", f"--config.train.steps={steps}"
    assert main([*argv, *more]) == 0
    return curve(workdir)

  lines = train("whole", 7)
  ((_, (_, counts)),) = metrics.loads(tmp_path / "whole").items()
  steps = [line for line in lines if line["split"] == "train"]
  words = np.array([line["words"] for line in steps])
  assert (counts.sum(axis=1) / words).tolist() == [8, 8, 4, 4, 4, 2, 2]
  ops = np.array([line["flops"] for line in steps]) / words
  more = ops - ops[-1]
  np.testing.assert_allclose(more / more[2], [3, 3, 1, 1, 1, 0, 0], 1e-6)
  train("parts", 6)
  kept = [
    line
    for line in train("parts", 7)
    if (line["step"], line["split"]) not in ((6, "validation"), (6, "test"))
  ]
  assert [ln for ln in kept if ln["step"] > 6] == [
    ln for ln in lines if ln["step"] > 6
  ]


@pytest.mark.parametrize(
  "fields, complaint",
  [
    (
      {"train.passes": 1, "train.annealing": {"k": (8,), "until": (390,)}},
      r"ends at step 390, but the text is good for \d+, .* more text",
    ),
    (
      {
        "train.annealing": {"k": (8,), "until": (2,)},
        "model.moe.router": {
          "kind": "softmax_top_k",
          "k": 2,
          "num_groups": 4,
          "max_groups": 2,
        },
      },
      "annealing, until step 2: k = 8 experts per token, but 2 of 4 groups",
    ),
  ],
)
def test_phases_that_cannot_be_leave_no_run(
  fields, complaint, small_flags, tmp_path, capsys
):
  workdir = tmp_path / "run"
  argv = ["moejax", "train", *small_flags, f"--workdir={workdir}"]
  fields = {"train.steps": 400, **fields}
  argv += [f"--config.{name}={value}" for name, value in fields.items()]
  assert main(argv) == 1
  assert re.search(complaint, capsys.readouterr().err)
  assert not (workdir / workdir_lib.CONFIG_FILE).exists()


def test_stopped_saves_and_resumes(start, whole, tmp_path):
  workdir, number = tmp_path / "run", signal.SIGINT
  process = start(workdir)
  wait_for_step(process, workdir, 4)
  process.send_signal(number)
  # What make and timeout do: the same signal reaches the group and its parts.
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate()
  assert process.returncode == 128 + number, output
  assert "Traceback" not in output
  assert output.count("stopping after this step") == 1
  step = int(output.split("stopped at step ")[1].split()[0])
  assert (workdir / run.CHECKPOINTS / str(step)).is_dir()
  again = finish(start, workdir, whole)
  assert f"resuming {workdir} at step {step} of 12" in again


def test_ctrl_c_counts_though_sigterm_was_seen_first(
  environment, small_flags, tmp_path
):
  """Of two at once the system may deliver the later one first."""
  code = """
import os, signal, time
from moejax import main, signals
from moejax.training import checkpoint, step

signals._AT_ONCE = 600
place, save = step.place, checkpoint.Checkpoints.save

def send(number):
  os.kill(os.getpid(), number)
  time.sleep(0.2)

def places(*args):
  send(signal.SIGTERM)
  return place(*args)

def saves(*args, **options):
  send(signal.SIGINT)
  save(*args, **options)

step.place, checkpoint.Checkpoints.save = places, saves
main.console()
"""
  done = program.run_code(environment, code, small_flags, tmp_path / "run")
  assert done.returncode == 128 + signal.SIGINT, done.stderr


# A signal to itself, where it evaluates.
ASKED = textwrap.dedent("""
  import os, signal
  from moejax import main
  from moejax.training import {module}
  undisturbed = {module}.{name}

  def asked(*args, **options):
    if {when}:
      os.kill(os.getpid(), signal.SIGTERM)
    return undisturbed(*args, **options)

  {module}.{name} = asked
  main.console()
""")
LAST_VALIDATION = {
  "module": "metrics",
  "name": "Writer.write",
  "when": "args[1:3] == (12, 'validation')",
}
FINAL_TEST = {"module": "checkpoint", "name": "Checkpoints.best", "when": True}


def test_a_signal_at_the_end_stops_before_or_in_the_test(
  environment, small_flags, whole, tmp_path
):
  workdir = tmp_path / "run"
  for where, status, said in (
    (LAST_VALIDATION, 128 + signal.SIGTERM, "stopped at step 12 of 12"),
    (FINAL_TEST, -signal.SIGTERM, "at step 12 of 12"),
  ):
    code = ASKED.format(**where)
    done = program.run_code(environment, code, small_flags, workdir)
    assert done.returncode == status, done.stderr
    assert said in done.stdout and "test perplexity" not in done.stdout
    assert curve(workdir) == curve(whole[0])[:-1]


def test_what_is_no_number_stops_the_run(small_flags, tmp_path, capsys):
  workdir = tmp_path / "run"
  flags = ["--config.optimizer.peak=1e30", "--config.train.checkpoint_every=1"]
  argv = ["moejax", "train", *small_flags, *flags, f"--workdir={workdir}"]
  assert main(argv) == 1
  said = capsys.readouterr().err
  found = re.search(
    r"became (nan|inf) at step (\d+); (?:checkpoint (\d+)|no checkpoint)", said
  )
  assert found, said
  kept = program.saved_steps(workdir)
  assert (int(found[3]) if found[3] else None) == max(kept, default=None)
  assert all(step < int(found[2]) for step in kept)


def test_of_two_starts_at_one_moment_one_trains(start, tmp_path):
  """The other is refused: it trains not on, nor reports, what is another's."""
  workdir = tmp_path / "new" / "run"
  rates = (0.001, 0.002)
  several = [start(workdir, f"--config.optimizer.peak={r}") for r in rates]
  outputs = program.end(several)
  statuses = [process.returncode for process in several]
  assert sorted(statuses) == [0, 1], outputs
  own = json.loads((workdir / workdir_lib.CONFIG_FILE).read_text())
  assert own["optimizer"]["peak"] == rates[statuses.index(0)]
  for status, output in zip(statuses, outputs, strict=True):
    refused = "another process trains in" in output or (
      "was made with another config" in output
    )
    assert refused == (status == 1) and refused != ("perplexity" in output)
    # At once: it has read no text, and built nothing.
    assert refused != ("parameters" in output)


def test_a_finished_run_goes_on_as_if_it_had_not_been_at_its_end(
  start, whole, corpus, tmp_path
):
  """Also where the text has moved, its digest says that it is the same."""
  workdir = tmp_path / "run"
  program.end_well(start(workdir, "--config.train.steps=7"))
  moved = shutil.copy(corpus, tmp_path / "moved.txt")
  data = {"train": moved, "data_dir": tmp_path / "prepared"}
  elsewhere = [f"--config.data.{name}={path}" for name, path in data.items()]
  (output,) = program.end_well(start(workdir, *elsewhere))
  assert "at step 7 of 12" in output
  # But for the validation at the first end.
  lines = [
    line
    for line in curve(workdir)
    if (line["step"], line["split"]) != (7, "validation")
  ]
  assert lines == curve(whole[0])


def test_one_pass_ends_with_the_text(corpus, tmp_path, small_flags, capsys):
  """Whatever the steps, and though it was stopped on the way."""
  short = tmp_path / "short.txt"
  short.write_text("\n".join(corpus.read_text().splitlines()[:120]) + "\n")
  workdir = tmp_path / "run"
  fields = {
    "data.train": short,
    "data.data_dir": tmp_path / "prepared",
    "train.passes": 1,
  }
  argv = ["moejax", "train", *small_flags, f"--workdir={workdir}"]
  argv += [f"--config.{name}={value}" for name, value in fields.items()]

  def train(steps):
    assert main([*argv, f"--config.train.steps={steps}"]) == 0
    return capsys.readouterr().out

  assert "good for" not in train(5)
  output = train(1_000_000)
  steps = int(re.search(r"good for (\d+) of the 1,000,000 steps", output)[1])
  assert 12 < steps < 100
  assert f"at step 5 of {steps}" in output
  assert re.search(rf"step \d+/{steps} .* left", output)
  lines = curve(workdir)
  train_lines = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in train_lines] == list(range(1, steps + 1))
  ends = [(line["step"], line["split"]) for line in lines[-2:]]
  assert ends == [(steps, "validation"), (steps, "test")]
  assert (workdir / run.CHECKPOINTS / str(steps)).is_dir()
  result = program.result(workdir)
  assert result["steps"] == steps and result["passes"] == 1
  # What is asked for beyond the end of the text is not to be had.
  output = train(2_000_000)
  assert "finished before" in output and "parameters" not in output


def test_a_terminal_that_is_stuck_or_gone_stops_no_run(
  environment, small_flags, whole, tmp_path
):
  """A pager that was stopped, `| head`, and letters that it cannot show."""
  workdir = tmp_path / "run\x1b世"
  out, stuck = os.pipe()
  fcntl.fcntl(stuck, fcntl.F_SETPIPE_SZ, 4096)
  os.write(stuck, b"\n" * 4096)
  error, gone = os.pipe()
  os.close(error)
  process = subprocess.Popen(
    [sys.executable, "-m", "moejax", "train", *small_flags]
    + [f"--workdir={workdir}"],
    env=environment | {"PYTHONIOENCODING": "ascii"},
    stdout=stuck,
    stderr=gone,
  )
  for end in (stuck, gone):
    os.close(end)
  wait_for_step(process, workdir, 4)
  process.send_signal(signal.SIGHUP)
  assert process.wait(program.PATIENCE) == 128 + signal.SIGHUP
  os.close(out)
  saved = program.saved_steps(workdir)[-1]
  assert 4 <= saved < 12
  assert curve(workdir) == [
    line for line in curve(whole[0]) if line["step"] <= saved
  ]
