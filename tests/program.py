"""Whole runs of the command line, in processes of their own."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moejax import files
from moejax import workdir as workdir_lib
from moejax.training import metrics, run

ROOT = pathlib.Path(__file__).parents[1]
# Programs that some test has compiled.
COMPILED = ROOT / ".pytest_cache" / "compiled"
FROM_CLOCK = {"words_per_second", "tflops_per_device"}
# Seconds, longer than any run here takes on a busy machine.
PATIENCE = 900


@contextlib.contextmanager
def first_devices(number):
  """Lets what runs in this process see so many alone: eight take longer."""
  first = jax.devices()[:number]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *platform: first)
    yield


# The program moejax, which sends itself a signal as it calls a function.
FAULTY = """
import os, pathlib, pkgutil, sys, threading
from moejax import __main__
owner, name, call, number, until = sys.argv.pop(1).split()
owner, calls = pkgutil.resolve_name(owner), []
function = getattr(owner, name)
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])

def strike():
  while until != "-" and not list(workdir.glob(until)):
    pass
  os.kill(os.getpid(), int(number))

def faulty(*args, **options):
  calls.append(1)
  if len(calls) == int(call):
    strike() if until == "-" else threading.Thread(target=strike).start()
  return function(*args, **options)

setattr(owner, name, faulty)
__main__.run()
"""


def fault(function, call, number=signal.SIGKILL, until="-"):
  """For `start`: sends a signal as a function is called.

  Args:
    function: as "moejax.training.processes vote".
    call: the first, second, ... one.
    number: of the signal.
    until: waits, after the call, until a file of this pattern is in the
      workdir.
  """
  return f"{function} {call} {int(number)} {until}"


def start(environment, flags, workdir, *more, fault=None):
  """Starts `moejax train`; its output is to be read by `communicate`."""
  program = ["-c", FAULTY, fault] if fault else ["-m", "moejax"]
  return subprocess.Popen(
    [sys.executable, *program, "train", *flags, *more, f"--workdir={workdir}"],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_several(
  environment, flags, workdir, count, devices, *more, faults=None
):
  """Starts a run of `count` processes with `devices` fake devices each.

  Args:
    environment, flags, workdir, more: as for `start`.
    count: processes.
    devices: of each.
    faults: of some, by their numbers.
  """
  address = free_address()
  many = environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
  several = (f"--coordinator_address={address}", f"--num_processes={count}")
  return [
    start(
      many,
      flags,
      workdir,
      *more,
      *several,
      f"--process_id={number}",
      fault=(faults or {}).get(number),
    )
    for number in range(count)
  ]


def free_address():
  """Returns localhost:port of a port that nobody listens on."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return f"localhost:{free.getsockname()[1]}"


def run_code(environment, code, flags, workdir=None, preexec=None):
  """Runs code with the flags of `moejax train`; returns how it ended."""
  flags = [*flags, f"--workdir={workdir}"] if workdir else flags
  return subprocess.run(
    [sys.executable, "-c", code, "train", *flags],
    env=environment,
    capture_output=True,
    text=True,
    timeout=PATIENCE,
    preexec_fn=preexec,
  )


def end(processes):
  """Waits for all of them; returns what they printed."""
  if isinstance(processes, subprocess.Popen):
    processes = [processes]
  outputs = []
  for process in processes:
    try:
      outputs.append(process.communicate(timeout=PATIENCE)[0])
    except subprocess.TimeoutExpired:
      for each in processes:
        each.kill()
      pytest.fail(f"still running: {process.communicate()[0]}")
  return outputs


def end_well(processes):
  """Waits for all of them; all must end without a complaint."""
  outputs = end(processes)
  every = [processes] if isinstance(processes, subprocess.Popen) else processes
  for process, output in zip(every, outputs, strict=True):
    assert process.returncode == 0, output
  return outputs


def wait_for_step(process, workdir, step):
  """Waits until a step is in the metrics."""
  path = workdir / metrics.METRICS_FILE
  while process.poll() is None:
    lines = metrics.read(path)
    if lines and lines[-1]["step"] >= step:
      return
    time.sleep(0.005)
  pytest.fail(f"ended before step {step}: {process.communicate()[0]}")


def curve(workdir):
  """The metrics of a run, but for those a clock makes."""
  return [
    {name: value for name, value in line.items() if name not in FROM_CLOCK}
    for line in metrics.read(workdir / metrics.METRICS_FILE)
  ]


def loads(workdir):
  """What a run keeps of its experts' loads, to the letter."""
  return files.read(workdir / metrics.LOADS_FILE)


def assert_close(got, want, rtol=2e-4):
  """Curves agree but for rounding; what is counted in words, exactly."""
  assert len(got) == len(want)
  for one, other in zip(got, want, strict=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
      if isinstance(value, str) or name in ("step", "words"):
        assert value == other[name], (one, other)
      else:
        np.testing.assert_allclose(value, other[name], rtol, 1e-5, err_msg=name)


def saved_steps(workdir):
  """The steps of the checkpoints of a run."""
  folder = workdir / run.CHECKPOINTS
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def forget_the_end(workdir):
  """Makes a finished run one that was killed after its last checkpoint."""
  (workdir / workdir_lib.RESULT_FILE).unlink()


def result(workdir):
  return json.loads((workdir / workdir_lib.RESULT_FILE).read_text())


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  files = [file for file in folder.rglob("*") if file.is_file()]
  return max(files, key=lambda file: file.stat().st_size)


def damage(path):
  """Flips a bit of a file."""
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def plain_environment():
  """What a user's shell has, but programs are compiled roughly, and once."""
  return os.environ | {
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
    "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # One process may read what another is just writing; it then compiles.
    "PYTHONWARNINGS": "ignore:Error reading persistent",
    "PYTHONPATH": str(ROOT),
  }
