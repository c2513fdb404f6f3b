"""Several processes train one model: the same curve; one dies, all resume."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap

import program

from moejax.training import run

VOTE = "moejax.training.processes vote"
# What Gloo's threads say, and write into each other's lines.
_GLOO = "Gloo|Rank|ranks|is|connected|to|peer|Expected|number|of|[][.:0-9\\s]"


def test_multiprocess_fault_one_ends_all_and_they_resume(
  start_several, whole, tmp_path
):
  """A signal, two deaths and a damaged checkpoint in the life of a run.

  The curve is that of one process with one device.
  """
  workdir = tmp_path / "run"
  stop = program.fault(VOTE, 2, signal.SIGTERM)
  processes = start_several(workdir, 2, 2, faults={1: stop})
  outputs = program.end(processes)
  assert [process.returncode for process in processes] == [143, 143], outputs
  assert "stopping after this step" in outputs[1]
  step = int(outputs[0].split("stopped at step ")[1].split()[0])
  assert program.saved_steps(workdir) == [step] and step < 6

  # Early, and after the checkpoint of 6, while that of 9 is being saved.
  for victim, call in ((0, 3), (1, 7)):
    die = program.fault(VOTE, call)
    processes = start_several(workdir, 2, 2, faults={victim: die})
    output = program.end(processes)[1 - victim]
    assert processes[victim].returncode == -signal.SIGKILL
    assert processes[1 - victim].returncode != 0
    assert re.search("moejax: process . of 2 .*start all of them again", output)

  newest = program.saved_steps(workdir)[-1]
  assert newest in (6, 9)
  program.damage(program.largest_file(workdir / run.CHECKPOINTS / str(newest)))
  other = "--config.layout=replicated"
  first, *others = program.end_well(start_several(workdir, 2, 1, other))
  assert "layout replicated on 2 cpu device(s) of 2 processes" in first
  assert f"checkpoint of step {newest} cannot be read" in first
  assert "test perplexity" in first
  for output in others:
    assert not re.sub(_GLOO, "", output)
  program.assert_close(program.curve(workdir), program.curve(whole[0]))


def start_code(environment, code, *flags):
  """Starts code with the flags of a `moejax train` in each of two processes."""
  address = program.free_address()
  return [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(code), address, str(number)]
      + [*flags, f"--coordinator_address={address}", "--num_processes=2"]
      + [f"--process_id={number}"],
      env=environment | {"JAX_NUM_CPU_DEVICES": "4"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(2)
  ]


def test_multiprocess_ends_by_a_signal_before_it_trains(environment):
  code = """
    import sys, time
    from moejax.training import processes
    processes.join(sys.argv[1], 2, int(sys.argv[2]))
    print('joined', flush=True)
    time.sleep(900)
  """
  several = start_code(environment, code)
  for process in several:
    assert process.stdout.readline() == "joined\n"
  for process in several:
    process.terminate()
  for process in several:
    assert process.wait(program.PATIENCE) == -signal.SIGTERM


def test_multiprocess_ends_in_a_sentence_where_one_does_not_come(
  environment, small_flags, tmp_path
):
  code = (
    "from moejax import main\nfrom moejax.training import rendezvous\n"
    "rendezvous.PATIENCE, rendezvous.WORD = 3, 0.1\nmain.console()"
  )
  flags = [
    f"--coordinator_address={program.free_address()}",
    "--num_processes=2",
    "--process_id=0",
  ]
  done = program.run_code(
    environment, code, [*small_flags, *flags], tmp_path / "run"
  )
  assert done.returncode == 1
  *said, last = done.stderr.splitlines()
  assert said and all(line.startswith("moejax: ") for line in said)
  assert all("process 1" in line for line in said)
  assert last.startswith("moejax: the processes did not meet: process 1")
  assert not done.stdout


AGREE = """
  import sys
  from moejax import main
  from moejax.training import processes

  address, number, *flags = sys.argv[1:]
  number = int(number)
  processes.join(address, 2, number)
  processes.join = lambda *args: None

  # What one process has to say reaches the other.
  assert processes.several() and processes.first() == (number == 0)
  assert processes.any_of_us(number == 1) and not processes.any_of_us(False)
  processes.check_same("alike", "text")
  for unlike in (str(number), "x" * 9999 + str(number)):
    try:
      processes.check_same(unlike, "text")
    except ValueError as error:
      assert "text is not the same on all 2 processes" in str(error)
    else:
      raise AssertionError(unlike)

  def fail():
    assert number == 0
    raise OSError("no room, " + "é" * 3000)

  try:
    processes.first_does(fail)
  except (OSError, ValueError) as error:
    assert "no room, ééé" in str(error)
  else:
    raise AssertionError
  made = []
  processes.first_does(lambda: made.append(number))
  assert made == [0][number:]
  assert processes.first_then_others(lambda: number) == number

  # Four parts of the batch, on devices of both processes each.
  layout = "{'mesh_shape': (2, -1, 1), 'rules': {'batch': 'expert'}}"
  own = f"--config.layout={layout}"
  assert main.main(["moejax", "train", *flags, own]) == 1
  sys.argv[1:] = ["train", *flags, f"--config.seed={number}"]
  main.console()
"""


def test_multiprocess_agree_or_are_refused(environment, small_flags, tmp_path):
  flags = [*small_flags, f"--workdir={tmp_path / 'run'}"]
  processes = start_code(environment, AGREE, *flags)
  for output in program.end(processes):
    assert re.search(r"'own' wants rows . to . of a batch of 8 on a", output)
    assert "the config is not the same on all 2 processes" in output
    assert "Traceback" not in output
  assert [process.returncode for process in processes] == [1, 1]


def test_resume_on_another_mesh(environment, small_flags, whole, tmp_path):
  """Saved on one device, `expert`: the run goes on with the same loss."""
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  shutil.rmtree(workdir / run.CHECKPOINTS / "12")
  program.forget_the_end(workdir)
  four = environment | {"JAX_NUM_CPU_DEVICES": "4"}
  flag = "--config.layout=data_expert"
  started = program.start(four, small_flags, workdir, flag)
  (output,) = program.end_well(started)
  assert "layout data_expert on 4 cpu device(s)" in output
  assert "at step 9 of 12" in output
  program.assert_close(program.curve(workdir), program.curve(whole[0]))
