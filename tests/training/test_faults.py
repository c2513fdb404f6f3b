"""Whatever dies, and whenever: the resumed curve is the undisturbed one."""

import functools
import re
import resource
import shutil
import signal

import program
import pytest
import states

from moejax.main import main
from moejax.training import run

CHECKPOINTS = "moejax.training.checkpoint:Checkpoints"
# One after the other in the life of one run: a function, which of its calls,
# what must be there then, and the newest checkpoint that is left.
KILLS = [
  ("moejax.files write_whole", 1, "-", 0),  # before there is a run
  (f"{CHECKPOINTS} _sign", 1, "-", 0),  # in the midst of the first save
  (f"{CHECKPOINTS} save", 1, "checkpoints/3", 3),  # at the end of a save
  (f"{CHECKPOINTS} save", 2, "checkpoints/*tmp*", 3),
  (f"{CHECKPOINTS} best", 1, "-", 12),  # before the test
]


def test_fault_killed_in_every_part_of_its_life(start, whole, tmp_path):
  """And the last checkpoint is damaged at the end."""
  workdir = tmp_path / "run"
  for function, call, until, newest in KILLS:
    process = start(workdir, fault=program.fault(function, call, until=until))
    (output,) = program.end(process)
    assert process.returncode == -signal.SIGKILL, output
    saved = [0, *program.saved_steps(workdir)]
    # A save may end before the signal comes.
    assert newest <= saved[-1] <= 4 * newest, (function, saved)
  program.damage(program.largest_file(workdir / run.CHECKPOINTS / "12"))
  (output,) = program.end_well(start(workdir))
  assert "checkpoint of step 12 cannot be read" in output
  assert f"resuming {workdir} at step 9 of 12" in output
  assert program.curve(workdir) == program.curve(whole[0])


def test_fault_full_disk(environment, small_flags, whole, tmp_path):
  """A limit on the size of a file stands in for the end of the disk."""
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  shutil.rmtree(workdir / run.CHECKPOINTS / "12")
  program.forget_the_end(workdir)
  folder = workdir / run.CHECKPOINTS
  # How Orbax splits the arrays into files varies; this one is in every save.
  size = (folder / "9" / "state" / "_METADATA").stat().st_size - 1
  full = program.run_code(
    environment,
    "from moejax import main; main.console()",
    small_flags,
    workdir,
    functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)),
  )
  assert full.returncode == 1, full.stderr
  # And no word of what the threads of libraries have met.
  assert "Traceback" not in full.stderr
  said = [ln for ln in full.stderr.splitlines() if ln.startswith("moejax: ")]
  (message,) = said
  assert "step 12 could not be saved" in message and "Make room" in message
  assert f"the last one in {folder} is of step 9" in message
  assert program.saved_steps(workdir) == [9]


def test_fault_full_disk_while_preparing(small_flags, tmp_path, capsys):
  data = f"--config.data.data_dir={tmp_path / 'prepared'}"
  argv = ["moejax", "train", *small_flags, data, f"--workdir={tmp_path}/run"]
  with states.files_of_at_most(10_000):
    assert main(argv) == 1
  preparing, message = capsys.readouterr().err.splitlines()
  assert "once" in preparing and message.startswith("moejax: text_files could")
  assert "File too large" in message and "make room" in message
  assert not (tmp_path / "run").exists()
  assert not list(tmp_path.rglob("incomplete.*"))


@pytest.mark.parametrize(
  "code, limit, amount, said",
  [
    (
      "from moejax import main; main.console()",
      resource.RLIMIT_NOFILE,
      24,
      "moejax: only 24 files .* by ulimit -n 4096",
    ),
    (
      "from moejax import limits; limits.check()",
      resource.RLIMIT_AS,
      2**30,
      "OSError: only 1,073,741,824 bytes .* ulimit -v unl",
    ),
  ],
)
def test_fault_limits_that_libraries_cannot_live_with(
  environment, small_flags, tmp_path, code, limit, amount, said
):
  limited = functools.partial(resource.setrlimit, limit, (amount, amount))
  done = program.run_code(environment, code, small_flags, tmp_path, limited)
  assert done.returncode == 1
  assert re.match(said, done.stderr.splitlines()[-1])
  assert ("Traceback" in done.stderr) == ("main" not in code)
