"""What the README shows runs, and what it names is there."""

import pathlib
import re

import pytest

from moejax import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
  r"moejax (?:train|eval|plan|translate) (?:[^\n`]|\\\n)*",
  README.replace("\\\n", " "),
)


def test_python_runs(capsys):
  snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert snippets
  # One after the other: the later ones use what the first has made.
  exec("\n".join(snippets), {})
  assert "max_over_mean_load" in capsys.readouterr().out


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


def test_paths_exist():
  inside = re.findall(
    r"\b(?:moejax|configs|experiments|notebooks|tests)/[\w./]*\w", README
  )
  assert inside
  assert [path for path in inside if not (ROOT / path).exists()] == []


def test_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
    assert f"\n{target}:" in makefile
