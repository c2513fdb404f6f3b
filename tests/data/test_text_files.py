"""Files as users name them."""

import pytest

from moejax.data import text_files


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  """A home folder in which all is that the tests name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "sub").mkdir()
  for name in ("b.txt", "a.txt", "c, d.txt", "e[1].txt", "e1.txt", "x=y.tsv"):
    (tmp_path / name).touch()
    (tmp_path / "sub" / name).touch()
  return tmp_path


ALL = ["a.txt", "b.txt", "c, d.txt", "e1.txt", "e[1].txt"]


@pytest.mark.parametrize(
  "words, paths",
  [
    (" , ", []),
    (" b.txt , a.txt,", ["b.txt", "a.txt"]),
    ("*.txt", ALL),
    ("[ab].txt, e1.txt", ["a.txt", "b.txt", "e1.txt"]),
    ("sub/[!c]*.txt", [f"sub/{n}" for n in ALL if n[0] != "c"]),
    ("**/a.txt", ["a.txt", "sub/a.txt"]),
    # A file of this name is meant by it.
    ("a.txt,c, d.txt,b.txt", ["a.txt", "c, d.txt", "b.txt"]),
    ("e[1].txt", ["e[1].txt"]),
    ("x=y.tsv", ["x=y.tsv"]),
    # What is not there is told by who reads it.
    ("no.txt,a.txt", ["no.txt", "a.txt"]),
    ("a-b=no.tsv", ["a-b=no.tsv"]),
    ("en-fr=a.txt, en-de=*.tsv", ["en-fr=a.txt", "en-de=x=y.tsv"]),
    ("en-fr=c, d.txt,en-de=b.txt", ["en-fr=c, d.txt", "en-de=b.txt"]),
    ("en-fr=[ab].txt", ["en-fr=a.txt", "en-fr=b.txt"]),
    (["a.txt", "c, d.txt,b.txt"], ["a.txt", "c, d.txt", "b.txt"]),
    (
      "~/a.txt,en-fr=~/?.txt,~/no.txt",
      ["{~}/a.txt", "en-fr={~}/a.txt", "en-fr={~}/b.txt", "{~}/no.txt"],
    ),
  ],
)
def test_a_list_of_files(folder, words, paths):
  paths = [path.replace("{~}", str(folder)) for path in paths]
  assert text_files.find(words) == paths
  # What was found may be looked for again.
  assert text_files.find(paths) == paths


@pytest.mark.parametrize("item", ["no*.txt", "en-fr=no?.tsv", "[xyz]/a.txt"])
def test_a_pattern_that_matches_nothing(item):
  with pytest.raises(FileNotFoundError) as caught:
    text_files.find(f"a.txt,{item}")
  assert str(caught.value).startswith(f"{item} matches no file; give")
