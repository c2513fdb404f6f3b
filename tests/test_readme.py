"""What README and docs show runs, and what they name is there."""

import pathlib
import re

import jax
import pytest

from moejax import main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
  page.name: page.read_text(encoding="utf-8")
  for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
COMMANDS = re.findall(
  r"moejax (?:train|eval|plan|translate) (?:[^\n`]|\\\n)*",
  README.replace("\\\n", " "),
)


@pytest.mark.parametrize("name", PAGES)
def test_python_runs(name, capsys):
  snippets = re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL)
  assert snippets
  # One after the other: the later ones use what the first has made. As users
  # run it: optax raises a float to an integer step count.
  with jax.numpy_dtype_promotion("standard"):
    exec("\n".join(snippets), {})
  printed = capsys.readouterr().out
  assert "max_over_mean_load" in printed or name != "README.md"
  for line in re.findall(r"print\(.*\) +# (\d.*)", "\n".join(snippets)):
    assert line in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  ran = []
  monkeypatch.setattr(
    main, "COMMANDS", {name: ran.append for name in main.COMMANDS}
  )
  assert main.main(command.split()) == 0
  assert ran[0]["config" if " plan " in command else "workdir"].value


def test_commands_were_found():
  assert len(COMMANDS) >= 3


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name):
  inside = re.findall(
    r"\b(?:moejax|configs|docs|experiments|notebooks|tests)/[\w./]*\w",
    PAGES[name],
  )
  assert inside
  assert [path for path in inside if not (ROOT / path).exists()] == []


def test_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
    assert f"\n{target}:" in makefile
