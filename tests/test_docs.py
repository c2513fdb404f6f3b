"""README and docs: snippets run, what they name is there, the site builds.

Pages are read as a user reads them: every Python snippet is executed, every
command parsed, every link followed, every number of a result looked up.
"""

import ast
import functools
import html.parser
import itertools
import pathlib
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
import yaml

import moejax
from experiments import figures
from moejax import config as config_lib
from moejax import dispatch, main
from moejax.training import evaluators

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
  path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
  for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
}


def blocks(page, language):
  return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def inline(page):
  """The code within the text of a page, each on one line."""
  text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
  return [" ".join(each.split()) for each in re.findall("`([^`]+)`", text)]


def found(pattern):
  """Finds a pattern in the commands of all pages, each once."""
  return sorted(
    {
      match
      for page in PAGES
      for text in (*blocks(page, "sh"), *inline(page))
      for line in text.replace("\\\n", " ").splitlines()
      for match in re.findall(pattern, line)
    }
  )


# -- snippets -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
  """A folder with the run in runs/tiny that pages speak of."""
  folder = tmp_path_factory.mktemp("reader")
  shutil.copytree(whole[0], folder / "runs" / "tiny")
  return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")])
def test_python_runs(page, request, capsys, monkeypatch):
  snippets = "\n".join(blocks(page, "python"))
  if "runs/" in snippets:
    monkeypatch.chdir(request.getfixturevalue("folder"))
  # What a page adds to a table is gone after it.
  monkeypatch.setattr(dispatch, "DISPATCH", dict(dispatch.DISPATCH))
  monkeypatch.setattr(evaluators, "AT_TEST", dict(evaluators.AT_TEST))
  capsys.readouterr()
  # As users run it: optax promotes, and so may they.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    exec(compile(snippets, page, "exec"), {"__name__": page})
  printed = capsys.readouterr().out.splitlines()
  assert "False" not in printed  # No check of a page fails.
  # A comment behind print, if it is no sentence, is what it prints.
  for line in re.findall(r"print\(.*\) +# (True|False|[\d\[(].*)", snippets):
    while printed and printed[0] != line:
      printed.pop(0)
    assert printed, f"{page} does not print {line}"
    printed.pop(0)


# -- commands -----------------------------------------------------------------

CALLS = found(rf"\bmoejax ({'|'.join(main.COMMANDS)})\b([^|<\"`#]*)")
EXPERIMENTS = found(r"python -m experiments\.([a-z]\w+)([^#`]*)")


@pytest.mark.parametrize("command, rest", CALLS)
def test_moejax_understands(command, rest, monkeypatch, capsys):
  """By --help every flag and field is read, and nothing runs."""
  monkeypatch.chdir(ROOT)
  # What a run was made with is a config like others.
  rest = re.sub(r"runs/\w+/config\.json", "tiny", rest)
  flags = [*shlex.split(rest), "--help"]
  assert main.main(["moejax", command, *flags]) == 0, capsys.readouterr().err
  # What is mentioned, as `moejax plan`, has no flags.
  if len(flags) > 1 and "--help" not in rest:
    assert command == "plan" or "--workdir=" in rest
    assert command not in ("train", "plan") or "--config=" in rest


@pytest.mark.parametrize("field", found(r"^(--config\.[a-z_.]+=[^.].*)$"))
def test_fields_are_understood(field, monkeypatch, capsys):
  """By one of these configs at least: not all have the same fields."""
  monkeypatch.chdir(ROOT)
  bases = ("tiny", "tiny --config.data.kind=text", "translate_tiny")
  assert any(
    main.main(shlex.split(f"moejax train --config={base} {field} --help")) == 0
    for base in bases
  ), capsys.readouterr().err


@pytest.mark.parametrize("name, rest", EXPERIMENTS)
def test_experiments_know_their_flags(name, rest, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [name, "--help"])
  with pytest.raises(SystemExit, match="0"):
    runpy.run_path(str(ROOT / f"experiments/{name}.py"), run_name="__main__")
  known = capsys.readouterr().out
  assert [f for f in re.findall(r"--\w+", rest) if f not in known] == []


def test_targets_and_extras_exist(monkeypatch):
  assert len(CALLS) > 20 and len(EXPERIMENTS) > 12
  assert {name for name, _ in CALLS} == set(main.COMMANDS)
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  described = set(re.findall(r"^([\w-]+):.*## ", makefile, re.MULTILINE))
  (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
  assert set(phony.split()) == described  # All are listed by `make help`.
  assert set(found(r"^make (\w+)")) <= described
  fields = {}
  monkeypatch.setattr("setuptools.setup", fields.update)
  monkeypatch.setattr(sys, "argv", ["setup.py"])
  runpy.run_path(str(ROOT / "setup.py"))
  named = found(r"^pip install.*\[(\w+)\]")
  assert named and set(named) <= set(fields["extras_require"])


# -- what is named, and numbers -----------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_exist(page):
  folders = "moejax|configs|docs|experiments|notebooks|tests"
  paths = re.findall(rf"(?<![\w/.])(?:{folders})/[\w./]*\w", PAGES[page])
  assert [path for path in paths if not (ROOT / path).exists()] == []
  # As they are followed in the repository; the site's are looked at below.
  for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", PAGES[page]):
    assert ((ROOT / page).parent / link).exists(), link


def test_public_names_are_listed():
  names = re.findall(r"`(\w+)`", PAGES["docs/api.md"].split("Every module")[0])
  assert set(moejax.__all__) == set(names) - {"moejax"}


def table_rows(page):
  """Yields every row of a page's tables, its cells by their headings."""
  headings = None
  for line in PAGES[page].splitlines():
    cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
    if not cells:
      headings = None
    elif headings is None:
      headings = cells
    elif not set(line) <= set("|-: "):
      yield dict(zip(headings, cells, strict=True))


def spans(cell):
  return re.findall("`([^`]+)`", cell)


def is_in_moejax(name):
  try:
    pkgutil.resolve_name(f"moejax.{name}")
  except (ImportError, AttributeError):
    return False
  return True


@functools.cache
def is_test(name):
  """Whether tests/ have a file::test, or a file::Class::test."""
  path, *within = name.split("::")
  node = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
  for part in within:
    named = (each for each in node.body if getattr(each, "name", "") == part)
    if not (node := next(named, None)):
      return False
  return bool(within) and within[-1].startswith("test_")


def test_sentences_of_the_paper_name_what_is_there():
  rows = [r for r in table_rows("docs/paper.md") if "the paper" in r]
  assert len(rows) > 100
  configs, commands = config_lib.packaged(), {"make", "moejax"}
  for row in rows:
    for name in spans(row["here"]):
      path = name.replace(".", "/") + ".py"
      known = (ROOT / name).exists() or (ROOT / path).exists()
      known = known or name in configs or name.split()[0] in commands
      assert known or (is_test if "::" in name else is_in_moejax)(name), name
    # Where nothing holds it, it says so.
    assert re.search("::|no test|a result|not built", row["here"]), row


def test_decisions_name_what_is_there():
  """Fields of configs, and what is in moejax; docstrings name theirs."""
  fields = {
    field.name.removeprefix("config.")
    for name in config_lib.packaged()
    for field in config_lib.fields(config_lib.load(name))
  }
  chosen = [row for row in table_rows("docs/decisions.md") if "" in row]
  assert [row[""] for row in chosen] == [str(i + 1) for i in range(len(chosen))]
  named = {row[""]: spans(row["to change"]) for row in chosen}
  assert len(named) > 50 and all(named.values())
  for name in {name for names in named.values() for name in names}:
    assert name in fields or is_in_moejax(name), name
  for text in PAGES.values():
    assert set(re.findall(r"decision (\d+)", text)) <= set(named)
  links = 0
  for path in (ROOT / "moejax").rglob("*.py"):
    module = path.relative_to(ROOT / "moejax").with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    for numbers in re.findall(r"docs/decisions\.md,\s+([\d, ]*\d)", text):
      for number in re.findall(r"\d+", numbers):
        links += 1
        assert f"{'.'.join(module)}." in " ".join(named[number]), number
  assert links > 10


def test_numbers_of_tables_are_results():
  """Each one is in the CSVs that are named above its table, but for digits."""
  table = r"<!-- numbers: (.*?) -->\n\n\|.*\n\|.*\n((?:\|.*\n)+)"
  tables = re.findall(table, "".join(PAGES.values()))
  assert len(tables) >= 12
  unknown = []
  for names, rows in tables:
    results = (figures.RESULTS / f"{name}.csv" for name in names.split())
    rows_of_results = itertools.chain(*map(figures.read, results))
    values = [x for row in rows_of_results for x in row.values()]
    values = [x for x in values if isinstance(x, (int, float))]
    for row in rows.splitlines():
      # The first cell names the row; what has a unit of its own is a share.
      cells = " ".join(row.split("|")[2:])
      number = r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?![\w.]| %)"
      for said in re.findall(number, cells):
        _, _, digits = said.partition(".")
        exact, half = float(said.replace(",", "")), 0.5 * 10 ** -len(digits)
        if not any(abs(value - exact) <= half * 1.001 for value in values):
          unknown.append((names, row, said))
  assert unknown == []


def test_files_at_the_front_door():
  assert len(PAGES["README.md"].splitlines()) <= 200
  assert "Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
  about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
  assert about["version"] == moejax.__version__
  assert f"## [{moejax.__version__}]" in PAGES["CHANGELOG.md"]


# -- the site -----------------------------------------------------------------


class Links(html.parser.HTMLParser):
  """Collects what a page links to, and the places in it that links lead to."""

  def __init__(self, path):
    super().__init__()
    self.links, self.ids = [], {""}
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    for name, value in attrs:
      if name in ("href", "src"):
        self.links.append(value)
      elif name == "id":
        self.ids.add(value)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
  pytest.importorskip("mkdocs")
  built = subprocess.run(
    # Not --quiet, which would let warnings pass.
    [sys.executable, "-m", "mkdocs", "build", "-d", tmp_path],
    cwd=ROOT,
    env={"PATH": "", "HOME": str(tmp_path), "NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert built.returncode == 0, built.stderr
  assert "WARNING" not in built.stderr
  pages = {path: Links(path) for path in tmp_path.rglob("*.html")}
  assert len(pages) > 60 and tmp_path / "api/moejax.moe/index.html" in pages
  broken = []
  for path, page in pages.items():
    if path.name == "404.html":
      continue  # Its links begin at the root of a server.
    for link in page.links:
      target, _, anchor = link.partition("#")
      if re.match(r"\w+:", link):
        continue
      to = (path.parent / target).resolve() if target else path
      to = to / "index.html" if to.is_dir() else to
      if not to.exists() or (to in pages and anchor not in pages[to].ids):
        broken.append((path.relative_to(tmp_path).as_posix(), link))
  assert broken == []
