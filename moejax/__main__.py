"""The program moejax, also as python -m moejax."""

from moejax import signals, terminal


def run() -> None:
  """Runs the command line."""
  terminal.occupy()
  signals.guard()
  # Imported late: Ctrl-C may come before.
  from moejax import main

  main.console()


if __name__ == "__main__":
  run()
