"""Runs in a bucket: what it holds and refuses, and a whole life."""

import contextlib
import functools
import hashlib
import json
import re
import signal
import threading
import time

import program
import pytest
import storage
from states import assert_is, fill, target

from moejax import bucket, files, main
from moejax.analysis import watch
from moejax.training.checkpoint import Checkpoints

# Seconds of a lease: long enough for a busy machine to renew it.
LEASE = 5.0


@pytest.fixture(scope="module")
def served():
  """A bucket that this process, and those it starts, find on loopback."""
  with storage.serve() as found, pytest.MonkeyPatch.context() as patch:
    for name, value in found.environment().items():
      patch.setenv(name, value)
    yield found


@pytest.fixture
def start_in(served, environment, small_flags):
  """start_in(workdir): `moejax train` in a process that finds the bucket."""
  here = environment | served.environment()
  return functools.partial(program.start, here, small_flags)


@pytest.fixture
def folder(served, request, monkeypatch):
  """A folder in the bucket, another one for every test."""
  monkeypatch.setattr(served, "refuses", served.refuses)
  name = re.sub(r"\W+", "-", request.node.name)
  return bucket.path(f"gs://{storage.NAME}/{name}")


@pytest.fixture
def lock(folder):
  return folder / "lock"


# -- the lock -----------------------------------------------------------------


def test_one_process_holds_a_lock(served, lock):
  name = f"{lock.parent.name}/lock"
  with bucket.alone(lock, LEASE) as check:
    with (
      pytest.raises(BlockingIOError, match="another process, process"),
      bucket.alone(lock, LEASE),
    ):
      pass
    check()
    assert name in served.objects
  assert name not in served.objects


def test_an_owner_that_ended_here_is_followed_at_once(served, lock, capsys):
  dead = {"pid": 2**22 + 1, "began": "1", "machine": bucket._machine()}
  served.put(f"{lock.parent.name}/lock", json.dumps(dead).encode())
  with bucket.alone(lock, 600.0):
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "../x"}'])
def test_one_of_many_follows_a_silent_owner(served, lock, content):
  name = f"{lock.parent.name}/lock"
  served.put(name, content)
  refused, done = [], threading.Barrier(4)

  def start():
    with contextlib.suppress(BlockingIOError), bucket.alone(lock, 2.0):
      done.wait()
      assert {"host", "pid", "renewed"} <= json.loads(served.read(name)).keys()
      return
    refused.append(1)
    done.wait()

  threads = [threading.Thread(target=start) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(refused) == 3


@pytest.mark.parametrize("removed", [False, True])
def test_an_owner_that_was_followed_notices(served, lock, removed):
  name = f"{lock.parent.name}/lock"
  with bucket.alone(lock, 0.2) as check:
    if removed:
      del served.objects[name]
    else:
      served.put(name, b'{"pid": 1, "host": "other"}')
    with pytest.raises(OSError, match="taken over by another process"):
      while True:
        check()
  # What is another's stays.
  assert (name in served.objects) != removed


# -- paths --------------------------------------------------------------------


@pytest.mark.parametrize(
  "text, said",
  [
    ("gs://", "names no bucket"),
    ("gs://No_Such!/runs", "names no bucket"),
    ("gs://bucket/a#1", "holds '#'"),
    ("gs://bucket/a[1]", r"holds '\['"),
    ("gs://bucket/..", r"holds '\.\.'"),
  ],
)
def test_what_cannot_lie_in_a_bucket_is_refused(text, said):
  with pytest.raises(ValueError, match=said):
    bucket.path(text)


def test_without_its_packages_a_bucket_is_refused_by_what_to_install(
  monkeypatch,
):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match="pip install gcsfs"):
    bucket.path("gs://bucket/runs")


@pytest.mark.usefixtures("served")
def test_a_bucket_that_is_not_there_is_named():
  path = bucket.path("gs://no-such-bucket/runs/x")
  with (
    pytest.raises(OSError, match="gs://no-such-bucket/runs/lock cannot"),
    bucket.alone(path.with_name("lock"), LEASE),
  ):
    pass
  with pytest.raises(OSError, match="gs://no-such-bucket/runs/x"):
    files.write_whole(path, b"")
  with pytest.raises(FileNotFoundError, match="gs://no-such-bucket/runs/x"):
    files.read(path)


# -- files that grow ----------------------------------------------------------


def test_what_grows_is_written_by_sync_and_at_the_end(served, folder):
  path = folder / "lines"
  files.write_whole(path, b"a\n")
  with files.open_regular(path, "ab") as file:
    file.write(b"b\n")
    file.flush()
    assert files.read(path) == b"a\n"
    files.sync(file)
    assert files.read(path) == b"a\nb\n"
    file.write(b"c\n")
  assert files.read(path) == b"a\nb\nc\n"
  # One that was suspended, and followed, must not come back and write.
  refused = pytest.raises(OSError, match="was written by another process")
  with refused, files.open_regular(path, "ab") as file:
    files.write_whole(path, b"another's")
    file.write(b"mine")
  assert files.read(path) == b"another's"


# -- checkpoints --------------------------------------------------------------


@pytest.fixture
def filled(folder):
  """A folder with checkpoints of the steps 1 and 2."""
  fill(folder, [(1, 1.0), (2, 2.0)]).close()
  return folder


def largest(served, filled, step):
  start = f"{filled.name}/{step}/state/"
  names = [start + name for name in served.names(start)]
  return max(names, key=lambda name: len(served.read(name)))


@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_checkpoint_is_set_aside(served, filled, lost, capfd):
  name = largest(served, filled, 2)
  if lost:
    del served.objects[name]
  else:
    served.put(name, served.read(name)[::-1])
  assert_is(Checkpoints(filled).latest(target()), 1)
  assert "checkpoint of step 2 cannot be read" in capfd.readouterr().err
  tops = {name.partition("/")[0] for name in served.names(f"{filled.name}/")}
  assert "2" not in tops and any(t.startswith("damaged-2-") for t in tops)


def test_a_bucket_that_does_not_answer_is_no_damage(served, filled):
  name, before = largest(served, filled, 2), dict(served.objects)
  served.refuses = lambda method, asked: asked == name
  with pytest.raises(OSError, match=f"gs://{storage.NAME}/.*cannot be re"):
    Checkpoints(filled).latest(target())
  assert served.objects.keys() == before.keys()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_checkpoint_moves_to_a_disk(served, filled, tmp_path, damaged):
  """Its digests are those of md5sum."""
  for name in served.names(f"{filled.name}/"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(served.read(f"{filled.name}/{name}"))
  lines = (tmp_path / "2" / "MD5SUMS").read_text().splitlines()
  for line in lines:
    digest, name = line.split("  ")
    content = (tmp_path / "2" / name).read_bytes()
    assert hashlib.md5(content).hexdigest() == digest
  assert len(lines) > 8
  if damaged:
    name = largest(served, filled, 2).removeprefix(f"{filled.name}/")
    (tmp_path / name).write_bytes(b"")
  assert_is(Checkpoints(filled).latest(target()), 2)
  found = Checkpoints(tmp_path).latest(target())
  assert_is(found, 1 if damaged else 2)


# -- a whole life -------------------------------------------------------------


def test_a_run_killed_while_it_saves_goes_on(
  served, start_in, folder, whole, capsys
):
  """Killed at the last moment of a save, it leaves a local run's curve."""
  process = start_in(folder)
  mark = f"{folder.name}/checkpoints/6/commit_success.txt"

  def kill(method, name):
    if method == "POST" and name == mark:
      process.kill()
      return True
    return False

  served.refuses = kill
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  names = served.names(f"{folder.name}/checkpoints/")
  assert "6/MD5SUMS" in names and "6/commit_success.txt" not in names
  assert f"{folder.name}/lock" in served.objects
  served.refuses = lambda method, name: False

  (output,) = program.end_well(start_in(folder))
  assert f"resuming {folder} at step 3 of 12" in output
  assert program.curve(folder) == program.curve(whole[0])
  assert program.loads(folder) == program.loads(whole[0])
  tops = {name.partition("/")[0] for name in served.names(f"{folder.name}/")}
  assert tops == {p.name for p in whole[0].iterdir()} - {"lock"}
  events = served.names(f"{folder.name}/tensorboard/")
  assert len(events) == 2

  assert main.main(["moejax", "eval", f"--workdir={folder}"]) == 0
  test = json.loads(served.read(f"{folder.name}/result.json"))["test"]
  said = capsys.readouterr().out
  assert f"perplexity {test['perplexity']:,.2f} per word" in said
  for command, more in (
    ("watch", f"ended: test perplexity {test['perplexity']:,.2f} per word"),
    ("plot", f"{folder.name}: validation perplexity per word"),
  ):
    assert main.main(["moejax", command, f"--workdir={folder}"]) == 0
    assert more in capsys.readouterr().out


def test_a_run_is_watched_as_long_as_its_lock_is_renewed(
  served, folder, lock, monkeypatch
):
  """And not where the lock was left behind by one that was killed."""
  # A lock tells seconds.
  monkeypatch.setattr(bucket, "LEASE", 2.5)
  served.put(f"{folder.name}/config.json", b'{"train": {"steps": 3}}')
  looks, sleep = [], time.sleep

  def later(seconds):
    looks.append(seconds)
    sleep(seconds)
    # More than a lease after the start.
    if len(looks) == 40:
      training.close()

  monkeypatch.setattr(time, "sleep", later)
  with contextlib.ExitStack() as training:
    training.enter_context(bucket.alone(lock, 2.5))
    with pytest.raises(ValueError, match="stopped at step 0 of 3"):
      watch.watch(folder, 0.1)
  assert len(looks) == 40
  served.put(f"{folder.name}/lock", b"{}")
  with pytest.raises(ValueError, match="stopped at step 0 of 3"):
    watch.watch(folder, 0.1)
