"""Runs in a bucket: what is held, kept and refused there, and a whole life."""

import json
import subprocess
import sys
import threading

import pytest
import storage

from moejax import bucket

# Seconds of a lease: long enough for a busy machine to renew it.
LEASE = 2.0


@pytest.fixture(scope="module")
def served():
  """A bucket that this process, and those it starts, find on loopback."""
  with storage.serve() as found, pytest.MonkeyPatch.context() as patch:
    for name, value in found.environment().items():
      patch.setenv(name, value)
    yield found


@pytest.fixture
def lock(served, request):
  """The place of a lock, another one for every test."""
  del served
  return bucket.path(f"gs://{storage.NAME}/{request.node.name[:20]}/lock")


def put_lock(served, lock, **owner):
  served.put(f"{lock.parent.name}/lock", json.dumps(owner).encode())


def test_one_alone_holds_a_lock(served, lock):
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
  with bucket.alone(lock, LEASE):
    pass


def test_of_many_one_follows_a_dead_owner(served, lock):
  """One that was killed on this machine is followed at once."""
  dead = subprocess.Popen([sys.executable, "-c", ""])
  dead.wait()
  put_lock(
    served, lock, pid=dead.pid, began="1", machine=bucket._machine(), host="h"
  )
  held, refused, done = [], [], threading.Barrier(8)

  def start():
    try:
      with bucket.alone(lock, LEASE):
        held.append(1)
        done.wait()
    except BlockingIOError as error:
      refused.append(str(error))
      done.wait()

  threads = [threading.Thread(target=start) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(held) == 1 and len(refused) == 7


@pytest.mark.parametrize("content", [b"{}", b"", b"[]", b'{"pid": "../x"}'])
def test_a_silent_owner_elsewhere_is_followed_after_a_lease(
  served, lock, capsys, content
):
  served.put(f"{lock.parent.name}/lock", content)
  with bucket.alone(lock, 0.2):
    assert "looking for" in capsys.readouterr().err
    owner = json.loads(served.read(f"{lock.parent.name}/lock"))
    assert {"host", "pid", "renewed"} <= owner.keys()


@pytest.mark.parametrize("removed", [False, True])
def test_an_owner_that_was_followed_notices(served, lock, removed):
  name = f"{lock.parent.name}/lock"
  with bucket.alone(lock, 0.2) as check:
    if removed:
      del served.objects[name]
    else:
      put_lock(served, lock, pid=1, host="other")
    noticed = None
    while noticed is None:
      try:
        check()
      except OSError as error:
        noticed = error
  assert "taken over by another process" in str(noticed)
  # What is another's stays.
  assert (name in served.objects) != removed


@pytest.mark.parametrize(
  "text, said",
  [
    ("gs://", "names no bucket"),
    ("gs:///runs", "names no bucket"),
    ("gs://No_Such!/runs", "names no bucket"),
    ("gs://b/runs", "names no bucket"),
    ("gs://bucket/a#1", "holds '#'"),
    ("gs://bucket/a?b", "holds '?'"),
    ("gs://bucket/a[1]", r"holds '\['"),
    ("gs://bucket/*", r"holds '\*'"),
    ("gs://bucket/a/../b", r"holds '/\.\./'"),
    ("gs://bucket/..", r"holds '\.\.'"),
    ("gs://bucket/a\nb", "holds"),
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


def test_a_bucket_that_is_not_there_is_named(served):
  del served
  place = bucket.path("gs://no-such-bucket/runs/x")
  with (
    pytest.raises(OSError, match="gs://no-such-bucket/runs/lock cannot"),
    bucket.alone(place.with_name("lock"), LEASE),
  ):
    pass
  with pytest.raises(OSError, match="gs://no-such-bucket/runs/x"):
    bucket.write(place, b"")
  with pytest.raises(FileNotFoundError, match="gs://no-such-bucket/runs/x"):
    bucket.read(place)
