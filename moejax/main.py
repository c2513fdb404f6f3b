"""The command line: moejax train | eval | translate | plan."""

import contextlib
import difflib
import errno
import importlib.metadata
import logging as std_logging
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from moejax import bucket, files, limits, named, options, terminal

USAGE = """usage: moejax COMMAND [FLAGS]

  train  --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]
         trains, or goes on where the workdir left off; by several processes
         with --coordinator_address=HOST:PORT --num_processes=N --process_id=I
  eval   --workdir=DIR [--split=SPLIT | --data=FILE[,FILE...]] [--layout=NAME]
         perplexity of a run's best checkpoint; of translations also BLEU
  translate --workdir=DIR [--language=LANGUAGE] [--layout=NAME] < FILE > FILE
         translates line by line by a run's best checkpoint
  plan   --config=FILE [--topology=v5p:4x4x8,...] [--layout=NAME,...]
         [--suggest] [--config.FIELD=VALUE ...]
         what layouts cost on devices that need not be there: memory, exchanges,
         an estimate of the time; --suggest looks for the fastest that fits

moejax COMMAND --help lists the flags of a command, with --config=FILE also all
fields of the config, whether FILE has them or not; moejax --version."""


class UsageError(Exception):
  """The command line cannot be understood."""


def main(argv: Sequence[str]) -> int:
  """Runs a command.

  Args:
    argv: program name, command, flags.

  Returns:
    The exit status: 0, 1 where the command failed, 2 where it was not
    understood, 128 and the signal's number where one stopped it. What went
    wrong stands on stderr in one sentence.
  """
  # Orbax and TFDS warn of what is no trouble, and log every error that they
  # raise, from many threads: what counts comes as an exception.
  logging.set_verbosity(logging.FATAL)
  # As for tasks of Orbax that nobody asks how they failed.
  std_logging.getLogger("asyncio").disabled = True
  if len(argv) < 2 or argv[1] in ("help", "-h", "--help"):
    terminal.say(USAGE)
    return 0 if len(argv) > 1 else 2
  workdir = None
  try:
    if argv[1] in ("version", "--version"):
      # Of the package as it is installed: the number stands in setup.py.
      terminal.say(f"moejax {importlib.metadata.version('moejax')}")
      return 0
    values = _parse(argv)
    if values["help"].value:
      terminal.say(_help(values))
      return 0
    if "workdir" in values:
      if not values.workdir:
        raise UsageError("give --workdir=DIR, where the run lives.")
      workdir = files.path(values.workdir)
    limits.check()
    return COMMANDS[argv[1]](values) or 0
  except (UsageError, options.ReadError, flags.Error) as error:
    terminal.warn(f"moejax: {error}")
    return 2
  except (FloatingPointError, ImportError, OSError, ValueError) as error:
    # Nothing can be left where nothing is reached.
    lost = isinstance(error, bucket.Unreachable)
    return _failed(_sentence(error), None if lost else workdir)
  except RuntimeError as error:
    # JAX's own kind of error, which is not to be imported for its name.
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _failed(
      f"a device has no room left ({_sentence(error).splitlines()[0]});"
      " take more config.train.microbatches, or more devices.",
      workdir,
    )
  except KeyboardInterrupt:
    terminal.stop_waiting()
    terminal.warn("moejax: interrupted")
    return 128 + signal.SIGINT


def console() -> None:
  """The `moejax` program."""
  # As for the log: threads of libraries that fail print pages, before the one
  # sentence that says so, and after it.
  sys.unraisablehook = threading.excepthook = lambda about: None
  status = main(sys.argv)
  try:
    terminal.finish()
  except OSError as error:
    terminal.warn(f"moejax: {error}")
    status = status or 1
  processes = sys.modules.get("moejax.training.processes")
  if status and processes and processes.several():
    if status == 1:
      processes.fail_together()
    processes.leave(status)
  sys.exit(status)


def _train(values: flags.FlagValues) -> int:
  # Imported late: jax takes seconds, a misspelled flag should not.
  from moejax.training import processes

  processes.join(
    values.coordinator_address, values.num_processes, values.process_id
  )
  from moejax.training import loop

  result = loop.train(values.config, files.path(values.workdir))
  if "signal" not in result:
    return 0
  processes.part()
  # As of a program that the signal ended: `train && eval` stops there.
  return 128 + result["signal"]


def _eval(values: flags.FlagValues) -> None:
  from moejax.training import run

  if values.data and values["split"].present:
    raise UsageError("--split and --data exclude each other; give one.")
  result = run.evaluate_run(
    files.path(values.workdir), values.split, values.data, values.layout
  )
  for line in run.described(result):
    terminal.say(line)


def _translate(values: flags.FlagValues) -> None:
  import tqdm

  from moejax import workdir as workdir_lib
  from moejax.data import text_files
  from moejax.training import run

  workdir = files.path(values.workdir)
  # Before somebody writes lines for a run that is not there.
  workdir_lib.recall(workdir)
  # There is none where it was closed before the start.
  content = sys.stdin.buffer.read() if sys.stdin else b""
  live = terminal.Live()
  with tqdm.tqdm(unit="line", file=live, disable=not live.isatty()) as bar:
    translated = run.translate_run(
      workdir,
      text_files.of_stdin(content),
      values.language,
      bar.update,
      values.layout,
      beam=values.beam,
    )
  # UTF-8 as the lines that came in, whatever the terminal has.
  written = "".join(f"{line}\n" for line in translated)
  terminal.hand_over(written.encode())


def _plan(values: flags.FlagValues) -> None:
  from moejax.planning import command

  out = files.local(values.out) if values.out else None
  command.run(
    values.config, values.topology, values.layout, values.suggest, out
  )


COMMANDS = {
  "train": _train,
  "eval": _eval,
  "translate": _translate,
  "plan": _plan,
}


def _parse(argv: Sequence[str]) -> flags.FlagValues:
  command = argv[1]
  if command not in COMMANDS:
    nearest = difflib.get_close_matches(command, COMMANDS, 1, 0)[0]
    raise UsageError(
      f"unknown command {command!r}; the nearest is {nearest!r}.\n{USAGE}"
    )
  values = flags.FlagValues()
  flags.DEFINE_bool("help", False, "show the flags", flag_values=values)
  if command != "plan":
    flags.DEFINE_string(
      "workdir", "", "where the run lives", flag_values=values
    )
  own = {
    "train": _define_processes,
    "eval": _define_eval,
    "translate": _define_translate,
    "plan": _define_plan,
  }
  own[command](values)
  argv, changes = _part(argv[1:])
  if command in ("train", "plan"):
    _define_config(values)
  else:
    flags.DEFINE_string(
      "layout", "", "a name, in place of the run's own", flag_values=values
    )
    if changes:
      raise UsageError(
        f"what is --{changes[0][0]}? A run keeps the config that it was made"
        f" with; moejax {command} has --layout alone to change it."
      )
  try:
    rest = values(argv)
  except flags.UnrecognizedFlagError as error:
    if "config" in values:
      _refuse_field(values["config"].value, error.flagname)
    raise
  if rest[1:]:
    raise UsageError(
      f"what is {rest[1]!r}? Flags are written --name=value.\n{USAGE}"
    )
  if "config" in values and (values.config or not values.help):
    values.config = _load(values.config, changes)
  return values


def _part(
  argv: Sequence[str],
) -> tuple[list[str], list[tuple[str, list[str]]]]:
  """Parts flags that change the config from the others.

  A flag has the word after "=", or the words up to the next flag: files that a
  shell puts for a pattern are a list, here and for --data.

  Returns:
    The others; names of fields, each with its words.
  """
  others, changes, words = list(argv[:1]), [], None
  for word in argv[1:]:
    name, equals, value = word.lstrip("-").partition("=")
    if not re.match("--?[a-zA-Z]", word):
      if words is None:
        others.append(word)
      elif words is others:
        others.append(f"--data={word}")
      else:
        words.append(word)
    elif name.startswith("config."):
      words = [value] if equals else []
      changes.append((name, words))
    elif name == "data":
      words = others
      others += [word] if equals else []
    else:
      words = None
      others.append(word)
  return others, changes


def _load(path: str, changes: Sequence[tuple[str, Sequence[str]]]) -> Any:
  """Reads a config file, and what the command line changes of it."""
  if not path:
    raise UsageError("give --config=FILE, one of configs/ or your own.")
  # Imported late: jax takes seconds, a missing flag should not.
  from moejax import config as config_lib

  config = config_lib.load(path)
  config_lib.override(config, changes)
  return config


def _refuse_field(path: str, name: str) -> None:
  """Says which field is meant by a flag that there is not, if one is."""
  from moejax import config as config_lib

  # Without a file there still are the fields that every config has.
  config = config_lib.load(path) if path else config_lib.Config()
  fields = config_lib.fields(config)
  if meant := options.meant(fields, name.replace("-", "_")):
    raise UsageError(
      f"there is no flag --{name}; a field of the config is changed by"
      f" {' or '.join(f'--{each}=VALUE' for each in meant)}."
    )


def _define_processes(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of the first process, where several train",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_processes", None, "how many processes train", flag_values=values
  )
  flags.DEFINE_integer(
    "process_id", None, "which one this is, from 0", flag_values=values
  )


def _define_eval(values: flags.FlagValues) -> None:
  flags.DEFINE_enum(
    "split",
    "test",
    ["train", "validation", "test"],
    "which part of the run's own corpus to read",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "data",
    [],
    "files to read instead, of text or of pairs, parted by commas; * and ?"
    " match any letters",
    flag_values=values,
  )


def _define_translate(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "language",
    "",
    "to translate into, where the run has learnt several",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "beam", 8, "hypotheses kept at every step; 1 is greedy", flag_values=values
  )


def _define_plan(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    "topology",
    [],
    "devices, such as v5p:4x4x8, v5e:4x4 or cpu:8; those at hand by default",
    flag_values=values,
  )
  flags.DEFINE_list(
    "layout",
    [],
    "names of layouts; the config's own by default",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "suggest",
    False,
    "search all layouts, group sizes, capacities, microbatches and recompute",
    flag_values=values,
  )
  flags.DEFINE_string(
    "out", "", "a folder for plan.json and plan.png", flag_values=values
  )


def _define_config(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "config",
    "",
    "a file of configs/, or your own; FILE:TEXT gives its get_config a text;"
    " --config.FIELD=VALUE changes a field; with --help all fields are listed",
    flag_values=values,
  )


def _help(values: flags.FlagValues) -> str:
  ours = [n for n in values if n not in ("flagfile", "undefok", "help")]
  lines = [f"  --{name}: {values[name].help}" for name in sorted(ours)]
  if "config" in values and values.config:
    from moejax import config as config_lib

    lines += ["", _FIELDS, ""]
    lines += map(_listed, config_lib.fields(values.config))
  return "\n".join([USAGE, "", *lines])


_FIELDS = """\
Fields of the config, with what it holds or, where it leaves a field out, with
the default; `...` is for what then is missing. A section {...} is given as
Python writes a dict or, where it has kinds, by the name of one: then it keeps
the fields that this kind has too. Entries of a list are parted by commas."""


def _listed(field: options.Field) -> str:
  left_out = field.value is options.EMPTY
  value = field.default if left_out else field.value
  text = shlex.quote(options.written(value))
  if value is options.EMPTY:
    text = "..."
  elif hasattr(value, "keys"):
    text = "{...}"
  about = named.worded(field.annotation, fully=True)
  note = "; left out" if left_out else ""
  return f"  --{field.name}={text}\n      {field.line} ({about}{note})"


# What to do about what the system says, by its number.
_WAY_OUT = {
  errno.EACCES: "make it yours by chmod or chown, or give another path",
  errno.EDQUOT: "make room, and start again",
  errno.EFBIG: "allow larger files, see ulimit -f, and start again",
  errno.EMFILE: "allow more open files, by ulimit -n 1024, and start again",
  errno.ENAMETOOLONG: "give a shorter path",
  errno.ENOSPC: "make room, and start again",
  errno.EROFS: "give a path on a file system that can be written",
}


def _sentence(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror:
    where = "" if error.filename is None else f"{error.filename}: "
    way_out = _WAY_OUT.get(error.errno)
    return f"{where}{error.strerror}" + (f"; {way_out}." if way_out else "")
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return "\n".join(lines) or type(error).__name__


def _failed(said: str, workdir: files.Path | None) -> int:
  """Says it; leaves the details where a developer finds them, off the screen.

  To be called where an error is at hand. Returns the exit status.
  """
  terminal.warn(f"moejax: {said}")
  with contextlib.suppress(OSError):
    if workdir is not None and files.exists(workdir / "config.json"):
      details = traceback.format_exc().encode(errors="backslashreplace")
      files.write_whole(workdir / "traceback.txt", details)
  return 1
