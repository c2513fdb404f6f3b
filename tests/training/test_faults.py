"""Whatever dies, and whenever: the resumed curve is the undisturbed one."""

import functools
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import program
import pytest

from moejax.training import run

KILLS = 20
LONG = ("--config.train.steps=120", "--config.train.checkpoint_every=2")


@pytest.fixture(scope="module")
def long_run(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("long") / "run"
  program.end_well(start(workdir, *LONG))
  return workdir


def finish(start, workdir, undisturbed, *flags):
  """Runs the same command again, to the end."""
  (output,) = program.end_well(start(workdir, *flags))
  assert program.curve(workdir) == program.curve(undisturbed)
  return output


def wait_for_draft(process, workdir):
  """Waits until a checkpoint is being written."""
  folder = workdir / run.CHECKPOINTS
  while process.poll() is None:
    if list(folder.glob("*.orbax-checkpoint-tmp*")):
      return True
  return False


def test_fault_killed_at_random_moments(start, long_run, tmp_path):
  """Within a step, within a save, while starting: all in one run's life."""
  chance = random.Random(0)
  workdir = tmp_path / "run"
  steps = sorted(chance.sample(range(1, 115), KILLS))
  saves = 0
  for number, step in enumerate(steps):
    process = start(workdir, *LONG)
    if number % 10 == 4:
      time.sleep(chance.uniform(0, 6))
    else:
      program.wait_for_step(process, workdir, step)
      if number % 2:
        saves += wait_for_draft(process, workdir)
      time.sleep(chance.uniform(0, 0.03))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  assert saves >= KILLS // 4
  finish(start, workdir, long_run, *LONG)


def flip_a_bit(file, chance):
  content = bytearray(file.read_bytes())
  content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
  file.write_bytes(content)


def cut_in_half(file, chance):
  del chance
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half])
def test_fault_damaged_checkpoint_is_passed_over(
  start, whole, tmp_path, damage
):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  newest = workdir / run.CHECKPOINTS / "12"
  damage(program.largest_file(newest), random.Random(1))
  program.forget_the_end(workdir)
  output = finish(start, workdir, whole[0])
  assert "checkpoint of step 12 cannot be read" in output
  assert "at step 9 of 12" in output


def test_fault_full_disk(start, environment, small_flags, whole, tmp_path):
  """A limit on the size of a file stands in for the end of the disk."""
  workdir = tmp_path / "run"
  process = start(workdir)
  program.wait_for_step(process, workdir, 4)
  process.send_signal(signal.SIGTERM)
  program.end(process)
  before = program.kept(workdir)
  folder = workdir / run.CHECKPOINTS / str(before[-1])
  # How Orbax splits the arrays into files varies; this one is in every save.
  limit = (folder / "state" / "_METADATA").stat().st_size - 1
  command = [sys.executable, "-m", "moejax", "train", *small_flags]
  full = subprocess.run(
    [*command, f"--workdir={workdir}"],
    env=environment,
    capture_output=True,
    text=True,
    timeout=program.PATIENCE,
    preexec_fn=functools.partial(
      resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)
    ),
  )
  assert full.returncode == 1, full.stderr
  # And no word of what the threads of libraries have met.
  assert "Traceback" not in full.stderr
  said = [ln for ln in full.stderr.splitlines() if ln.startswith("moejax: ")]
  (message,) = said
  assert "could not be saved" in message and "Make room" in message
  assert f"the last one in {workdir / run.CHECKPOINTS} is of step" in message
  assert program.kept(workdir) == before
  finish(start, workdir, whole[0])


# Not by the data: word ids cannot be NaN.
NAN_AT_STEP_8 = textwrap.dedent("""
  import jax
  from moejax import main
  from moejax.training import step
  place, calls = step.train_step, []

  def broken(state, batch, **options):
    state, metrics = place(state, batch, **options)
    bad = state.step == 8
    params = jax.tree.map(
      lambda w: jax.numpy.where(bad, jax.numpy.nan, w), state.params
    )
    loss = jax.numpy.where(bad, jax.numpy.nan, metrics["loss"])
    return state._replace(params=params), metrics | {"loss": loss}

  step.train_step = broken
  main.console()
""")


def test_fault_not_a_number(start, environment, small_flags, whole, tmp_path):
  workdir = tmp_path / "run"
  broken = program.run_code(environment, NAN_AT_STEP_8, small_flags, workdir)
  assert broken.returncode == 1, broken.stderr
  assert "loss became nan at step 8; checkpoint 6 was saved" in broken.stderr
  assert program.kept(workdir)[-1] == 6
  finish(start, workdir, whole[0])


def test_fault_full_disk_while_preparing(
  environment, small_flags, start, whole, tmp_path
):
  own = f"--config.data.data_dir={tmp_path / 'prepared'}"
  command = [sys.executable, "-m", "moejax", "train", *small_flags, own]
  full = subprocess.run(
    [*command, f"--workdir={tmp_path / 'run'}"],
    env=environment,
    capture_output=True,
    text=True,
    timeout=program.PATIENCE,
    preexec_fn=functools.partial(
      resource.setrlimit, resource.RLIMIT_FSIZE, (10000, 10000)
    ),
  )
  assert full.returncode == 1
  preparing, message = full.stderr.splitlines()
  assert "once" in preparing and message.startswith("moejax: text_files could")
  assert "File too large" in message and "make room" in message
  assert not (tmp_path / "run").exists()
  assert not list(tmp_path.rglob("incomplete.*"))


@pytest.mark.parametrize(
  "limit, amount, said",
  [
    (resource.RLIMIT_NOFILE, 24, "only 24 files .* by ulimit -n 4096"),
    (resource.RLIMIT_AS, 2**30, "only 1,073,741,824 bytes .* ulimit -v unl"),
  ],
)
def test_fault_limits_that_libraries_cannot_live_with(
  environment, small_flags, tmp_path, limit, amount, said
):
  command = [sys.executable, "-m", "moejax", "train", *small_flags]
  done = subprocess.run(
    [*command, f"--workdir={tmp_path}"],
    env=environment,
    capture_output=True,
    text=True,
    timeout=program.PATIENCE,
    preexec_fn=functools.partial(resource.setrlimit, limit, (amount, amount)),
  )
  assert done.returncode == 1
  (message,) = done.stderr.splitlines()
  assert re.match(f"moejax: {said}", message)
