"""Files of folders that anybody made: what is opened, written and locked."""

import errno
import fcntl
import itertools
import os
import pathlib
import pwd
import stat
import subprocess
import sys

import pytest

from moejax import files


def odd(folder, kind):
  """Makes something odd, and the file that a link would lead to."""
  path, target = folder / "odd", folder / "precious"
  target.write_text("precious")
  try:
    {
      "link": lambda: path.symlink_to(target),
      "dangling": lambda: path.symlink_to(folder / "nowhere"),
      "pipe": lambda: os.mkfifo(path),
      "folder": path.mkdir,
      "device": lambda: os.mknod(path, stat.S_IFCHR, os.makedev(1, 5)),
    }[kind]()
  except PermissionError:
    pytest.skip("only root makes devices")
  return path, target


MODES = ["rb", "ab", "a+b", "xb"]
ODD = itertools.product(["pipe", "folder", "device"], MODES)
LINKS = itertools.product(["link", "dangling"], MODES[1:])


@pytest.mark.parametrize("kind, mode", [*ODD, *LINKS])
def test_only_regular_files_are_opened(kind, mode, tmp_path):
  path, target = odd(tmp_path, kind)
  kind = kind.replace("dangling", "link")
  with pytest.raises(OSError, match=f"{path} is a {kind} where a regular"):
    files.open_regular(path, mode)
  assert target.read_text() == "precious"
  assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_what_is_written_whole_replaces_what_was_there(kind, tmp_path):
  path, target = odd(tmp_path, kind)
  files.write_whole(path, "new")
  assert not path.is_symlink() and path.read_text() == "new"
  assert target.read_text() == "precious"
  assert len(list(tmp_path.iterdir())) == 2


def test_a_write_is_on_the_disk_before_its_name_or_leaves_the_old(
  monkeypatch, tmp_path
):
  path, done = tmp_path / "file", []
  path.write_text("old")
  replace = pathlib.Path.replace

  def fsync(number):
    done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
    if len(done) == 1:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def rename(self, target):
    done.append("rename")
    return replace(self, target)

  monkeypatch.setattr(os, "fsync", fsync)
  monkeypatch.setattr(pathlib.Path, "replace", rename)
  with pytest.raises(OSError, match=f"No space left.*{path}'"):
    files.write_whole(path, "new")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]
  files.write_whole(path, "new")
  assert done == ["file", "file", "rename", "folder"]


def test_drafts_of_a_kill_are_removed_and_nothing_else(monkeypatch, tmp_path):
  own = tmp_path / "paper.draft"
  own.touch()

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(os, "fsync", killed)
    patch.setattr(pathlib.Path, "unlink", killed)
    files.write_whole(tmp_path / "file", "new")
  assert len(list(tmp_path.iterdir())) == 2
  files.remove_drafts(tmp_path)
  assert list(tmp_path.iterdir()) == [own]


@pytest.mark.parametrize(
  "content, message",
  [
    (b" \n", "is empty"),
    (b'{"a": ', "is no JSON"),
    (b"[1]", "holds list, not an object"),
    (b"\xff", "is no JSON"),
    (b'{"a":' * 10**5, "is no JSON"),
    (b'{"a": ' + b"9" * 9999 + b"}", "is no JSON"),
  ],
)
def test_odd_json_is_told_with_its_file(content, message, tmp_path):
  path = tmp_path / "odd.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"{path} {message}"):
    files.read_json(path)


@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_odd_things_in_folders(kind, tmp_path):
  outer = tmp_path / "outer"
  (outer / "inner").mkdir(parents=True)
  path, _ = odd(outer / "inner", kind)
  # A link that goes around has an end.
  (outer / "inner" / "around").symlink_to(outer)
  with pytest.raises(OSError, match=r"(odd|around) is a .* where a regular"):
    files.refuse_odd_in(outer, True)
  if kind == "link":
    files.refuse_odd_in(outer, False)
    assert files.read(path) == b"precious"
  else:
    with pytest.raises(OSError, match=f"{path} is a {kind}"):
      files.refuse_odd_in(outer, False)
  (tmp_path / "link").symlink_to(outer)
  with pytest.raises(OSError, match="link is a link where a folder"):
    files.refuse_odd_in(tmp_path / "link", True)


# -- locks --------------------------------------------------------------------

ENTERS = """
import pathlib, sys
from moejax import files
path, inside = map(pathlib.Path, sys.argv[1:])
for _ in range(100):
  with files.locked(path):
    inside.mkdir()
    inside.rmdir()
    path.unlink()
"""


def test_a_lock_that_is_removed_and_made_anew_is_one(tmp_path):
  rest = (tmp_path / "new" / "lock", tmp_path / "inside")
  command = [sys.executable, "-c", ENTERS, *rest]
  several = [subprocess.Popen(command) for _ in range(3)]
  assert [process.wait() for process in several] == [0, 0, 0]


def test_a_lock_that_is_held_is_refused(tmp_path):
  for _ in range(2):
    with files.locked(tmp_path / "lock", wait=False):
      refused = pytest.raises(BlockingIOError)
      with refused, files.locked(tmp_path / "lock", wait=False):
        pass


def test_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
  def flock(*args):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", flock)
  refused = pytest.raises(OSError, match="lock'")
  with refused as caught, files.locked(tmp_path / "lock"):
    pass
  assert caught.value.errno == errno.ENOLCK


# -- what a user writes for a path --------------------------------------------


@pytest.mark.parametrize(
  "text, meant",
  [
    ("~", "/home/me"),
    ("~/runs/x", "/home/me/runs/x"),
    ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"),
    ("./~/runs", "~/runs"),
    ("runs/x~", "runs/x~"),
    ("a:b", "a:b"),
    ("./gs:/b", "gs:/b"),
    ("/srv/gs://b", "/srv/gs:/b"),
    ("", ""),
  ],
)
def test_a_path_is_the_one_that_is_meant(monkeypatch, text, meant):
  monkeypatch.setenv("HOME", "/home/me")
  assert files.path(text) == files.local(text) == pathlib.Path(meant)


@pytest.mark.parametrize(
  "text, said",
  [
    ("~nobody-of-this-name/x", "home folder that this machine does not know"),
    ("s3://bucket/x", r"no place that .* gs://BUCKET/FOLDER"),
    ("gs:/bucket/x", r"no place that .* \./gs:"),
    ("file:///home/x", "no place that"),
    ("a\0b", "NUL"),
  ],
)
def test_what_is_no_path_is_refused(text, said):
  with pytest.raises(ValueError, match=said):
    files.path(text)


@pytest.mark.parametrize("text", ["gs://bucket/x/", "GS://bucket//x"])
def test_a_bucket_is_one_however_its_scheme_is_written(text):
  assert str(files.path(text)) == "gs://bucket/x"
  with pytest.raises(ValueError, match="in a bucket, where a run can live"):
    files.local(text)


def test_who_looks_at_a_lock_takes_it_from_nobody(tmp_path):
  path = tmp_path / "lock"
  assert not files.is_locked(path) and not path.exists()
  with files.locked(path):
    assert files.is_locked(path)
  assert path.exists() and not files.is_locked(path)
  with files.locked(path, wait=False):
    pass
