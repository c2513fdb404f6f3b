"""Several processes train one model: the same curve; one dies, all resume."""

import re
import shutil
import signal
import subprocess
import sys
import time

import program
import pytest

from moejax.training import run


@pytest.fixture(scope="module")
def one_process(environment, small_flags, tmp_path_factory):
  """The curve of one process with 8 devices."""
  workdir = tmp_path_factory.mktemp("eight") / "run"
  eight = environment | {"JAX_NUM_CPU_DEVICES": "8"}
  (output,) = program.end_well(program.start(eight, small_flags, workdir))
  assert "on 8 cpu device(s)\n" in output
  return workdir


def test_multiprocess_one_device_and_eight_agree(one_process, whole):
  program.assert_close(program.curve(one_process), program.curve(whole[0]))


@pytest.mark.parametrize("count, devices", [(2, 4), (4, 2)])
def test_multiprocess_is_the_same_run(
  start_several, one_process, tmp_path, count, devices
):
  workdir = tmp_path / "run"
  first, *others = program.end_well(start_several(workdir, count, devices))
  assert f"on 8 cpu device(s) of {count} processes" in first
  assert "test perplexity" in first
  for output in others:
    said = [line for line in output.splitlines() if "[Gloo]" not in line]
    assert not said
  program.assert_close(program.curve(workdir), program.curve(one_process))


@pytest.mark.parametrize("victim", [0, 1])
def test_multiprocess_fault_one_dies(
  start_several, one_process, tmp_path, victim
):
  workdir = tmp_path / "run"
  processes = start_several(workdir, 2, 4)
  program.wait_for_step(processes[0], workdir, 5)
  processes[victim].kill()
  begin = time.monotonic()
  output = program.end(processes)[1 - victim]
  assert time.monotonic() - begin < 120
  assert processes[1 - victim].returncode != 0
  assert re.search("moejax: process . of 2 .*start all of them again", output)
  program.end_well(start_several(workdir, 2, 4))
  program.assert_close(program.curve(workdir), program.curve(one_process))


@pytest.mark.parametrize("asked", [0, 1])
def test_multiprocess_a_signal_to_one_stops_all(
  start_several, one_process, tmp_path, asked
):
  workdir = tmp_path / "run"
  processes = start_several(workdir, 2, 4)
  program.wait_for_step(processes[0], workdir, 3)
  processes[asked].send_signal(signal.SIGTERM)
  outputs = program.end(processes)
  assert [process.returncode for process in processes] == [143, 143], outputs
  assert "stopping after this step" in outputs[asked]
  step = int(outputs[0].split("stopped at step ")[1].split()[0])
  assert program.kept(workdir)[-1] == step < 12
  program.end_well(start_several(workdir, 2, 4))
  program.assert_close(program.curve(workdir), program.curve(one_process))


def test_multiprocess_ends_by_a_signal_before_it_trains(environment):
  code = (
    "import sys, time\nfrom moejax.training import processes\n"
    "processes.join(sys.argv[1], 2, int(sys.argv[2]))\n"
    "print('joined', flush=True)\ntime.sleep(600)"
  )
  address = program.free_address()
  several = [
    subprocess.Popen(
      [sys.executable, "-c", code, address, str(number)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(2)
  ]
  for process in several:
    assert process.stdout.readline() == "joined\n"
  for process in several:
    process.terminate()
  for process in several:
    assert process.wait(program.PATIENCE) == -signal.SIGTERM


@pytest.mark.parametrize("number", [0, 1])
def test_multiprocess_ends_in_a_sentence_where_one_does_not_come(
  environment, small_flags, tmp_path, number
):
  code = (
    "from moejax import main\nfrom moejax.training import meeting\n"
    "meeting.PATIENCE, meeting.WORD = 1, 0.1\nmain.console()"
  )
  flags = [
    f"--coordinator_address={program.free_address()}",
    "--num_processes=2",
    f"--process_id={number}",
  ]
  done = program.run_code(
    environment, code, [*small_flags, *flags], tmp_path / "run"
  )
  assert done.returncode == 1
  *said, last = done.stderr.splitlines()
  missing = f"process {1 - number}"
  assert all(line.startswith("moejax: ") and missing in line for line in said)
  assert last.startswith(f"moejax: the processes did not meet: {missing}")
  assert not done.stdout


def test_multiprocess_damaged_checkpoint_is_passed_over_by_all(
  start_several, one_process, tmp_path
):
  workdir = shutil.copytree(one_process, tmp_path / "run")
  newest = workdir / run.CHECKPOINTS / "12"
  damaged = program.largest_file(newest)
  content = damaged.read_bytes()
  damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  program.forget_the_end(workdir)
  first, _ = program.end_well(start_several(workdir, 2, 4))
  assert "checkpoint of step 12 cannot be read" in first
  assert "at step 9 of 12" in first
  program.assert_close(program.curve(workdir), program.curve(one_process))


def test_multiprocess_refuses_processes_started_unlike(start_several, tmp_path):
  unlike = ([], ["--config.seed=7"])
  processes = start_several(tmp_path / "run", 2, 4, each=unlike)
  for output in program.end(processes):
    assert "the config is not the same on all 2 processes" in output
  assert [process.returncode for process in processes] == [1, 1]


def test_multiprocess_refuses_rows_that_another_reads(start_several, tmp_path):
  """Four parts of the batch, on devices of both processes each."""
  own = (
    "--config.layout={'mesh_shape': (2, -1, 1), 'rules': {'batch': 'expert'}}"
  )
  processes = start_several(tmp_path / "run", 2, 4, own)
  for output in program.end(processes):
    assert re.search(r"'own' wants rows . to . of a batch of 8 on a", output)
  assert [process.returncode for process in processes] == [1, 1]


@pytest.mark.parametrize(
  "devices, processes, layout",
  [(4, 1, "data_expert"), (1, 1, "expert"), (8, 2, "replicated")],
)
def test_resume_on_another_mesh(
  environment, small_flags, one_process, tmp_path, devices, processes, layout
):
  """Saved on 8 devices, `expert`: the run goes on with the same loss."""
  workdir = shutil.copytree(one_process, tmp_path / "run")
  shutil.rmtree(workdir / run.CHECKPOINTS / "12")
  program.forget_the_end(workdir)
  flag = f"--config.layout={layout}"
  if processes == 1:
    those = environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
    started = program.start(those, small_flags, workdir, flag)
  else:
    started = program.start_several(
      environment, small_flags, workdir, processes, devices // processes, flag
    )
  output = program.end_well(started)[0]
  assert f"layout {layout} on {devices} cpu device(s)" in output
  assert "at step 9 of 12" in output
  program.assert_close(program.curve(workdir), program.curve(one_process))
