"""What a user writes for a path is the path that is meant, or is refused."""

import pathlib
import pwd

import pytest

from moejax import files

HOME = pathlib.Path("/home/me")


@pytest.fixture(autouse=True)
def _home(monkeypatch):
  monkeypatch.setenv("HOME", str(HOME))


@pytest.mark.parametrize(
  "text, meant",
  [
    ("~", HOME),
    ("~/runs/x", HOME / "runs/x"),
    ("~root/x", pathlib.Path(pwd.getpwnam("root").pw_dir) / "x"),
    ("./~/runs", pathlib.Path("~/runs")),
    ("runs/~", pathlib.Path("runs/~")),
    ("runs/x~", pathlib.Path("runs/x~")),
    ("file:///srv/a%20b", pathlib.Path("/srv/a b")),
    ("FILE://localhost/srv/x", pathlib.Path("/srv/x")),
    ("file:/srv/x#1", pathlib.Path("/srv/x#1")),
    ("file:///~/x", pathlib.Path("/~/x")),
    ("a%20b", pathlib.Path("a%20b")),
    ("a:b", pathlib.Path("a:b")),
    ("./gs:/b", pathlib.Path("gs:/b")),
    ("/srv/gs://b", pathlib.Path("/srv/gs:/b")),
    ("", pathlib.Path("")),
  ],
)
def test_a_path_is_the_one_that_is_meant(text, meant):
  assert files.path(text) == meant
  assert files.local(text) == meant


@pytest.mark.parametrize(
  "text, said",
  [
    ("~nobody-of-this-name/x", "home folder that this machine does not know"),
    ("s3://bucket/x", r"no place that .* gs://BUCKET/FOLDER"),
    ("gs:/bucket/x", r"no place that .* \./gs:"),
    ("https://example.com/x", "no place that"),
    ("hf://datasets/x", "no place that"),
    ("file://host/x", "no place that"),
    ("file://~/x", "no place that"),
    ("file:///a%00b", "NUL"),
    ("a\0b", "NUL"),
  ],
)
def test_what_is_no_path_is_refused(text, said):
  with pytest.raises(ValueError, match=said):
    files.path(text)


@pytest.mark.parametrize("text", ["gs://bucket/x.txt", "GS://bucket/x.txt"])
def test_what_is_read_on_a_disk_alone_is_refused_in_a_bucket(text):
  with pytest.raises(ValueError, match="in a bucket, where a run can live"):
    files.local(text)


def test_a_bucket_is_one_however_its_scheme_is_written():
  for text in ("gs://bucket/x/", "GS://bucket//x"):
    assert str(files.path(text)) == "gs://bucket/x"
