"""The command line: moejax train | eval | translate | plan."""

import ast
import contextlib
import difflib
import errno
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from moejax import files, limits, terminal

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

moejax COMMAND --help lists the flags of a command."""


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
  if len(argv) < 2 or argv[1] in ("help", "-h", "--help"):
    terminal.say(USAGE)
    return 0 if len(argv) > 1 else 2
  workdir = None
  try:
    values = _parse(argv)
    if values["help"].value:
      terminal.say(_help(values))
      return 0
    if "workdir" in values:
      if not values.workdir:
        raise UsageError("give --workdir=DIR, where the run lives.")
      workdir = pathlib.Path(values.workdir)
    limits.check()
    return COMMANDS[argv[1]](values) or 0
  except (UsageError, flags.Error) as error:
    terminal.warn(f"moejax: {error}")
    return 2
  except (FloatingPointError, ImportError, OSError, ValueError) as error:
    return _failed(_sentence(error), workdir)
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
    terminal.hurry()
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
    processes.leave(status)
  sys.exit(status)


def _train(values: flags.FlagValues) -> int:
  # Imported late: jax takes seconds, a misspelled flag should not.
  from moejax.training import processes

  processes.join(
    values.coordinator_address, values.num_processes, values.process_id
  )
  from moejax.training import loop

  result = loop.train(values.config, pathlib.Path(values.workdir))
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
    pathlib.Path(values.workdir), values.split, values.data, values.layout
  )
  for line in run.described(result):
    terminal.say(line)


def _translate(values: flags.FlagValues) -> None:
  import tqdm

  from moejax.training import run

  # There is none where it was closed before the start.
  lines = sys.stdin.buffer.read() if sys.stdin else b""
  live = terminal.Live()
  with tqdm.tqdm(unit="line", file=live, disable=not live.isatty()) as bar:
    translated = run.translate_run(
      pathlib.Path(values.workdir),
      _text_lines(lines),
      values.language,
      bar.update,
      values.layout,
      beam=values.beam,
    )
  # UTF-8 as the lines that came in, whatever the terminal has.
  written = "".join(f"{line}\n" for line in translated)
  terminal.hand_over(written.encode())


def _text_lines(content: bytes) -> list[str]:
  """Reads lines as they are counted everywhere: by line feeds alone."""
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    # Where it is in what follows the byte order mark, if one comes first.
    content = error.object
    number = content.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"standard input is not UTF-8: line {number} has the byte"
      f" 0x{content[error.start]:02x}; convert it, for example with iconv -f"
      " latin1 -t utf-8"
    ) from None
  return text.removesuffix("\n").split("\n") if text else []


def _plan(values: flags.FlagValues) -> None:
  from moejax.planning import command

  out = pathlib.Path(values.out) if values.out else None
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
  layout = []
  if command in ("train", "plan"):
    # A name or a section, whichever the config holds; absl takes its kind.
    layout = [flag for flag in argv if flag.startswith(_LAYOUT)]
    argv = [flag for flag in argv if flag not in layout]
    _define_config(values, argv)
  else:
    flags.DEFINE_string(
      "layout", "", "a name, in place of the run's own", flag_values=values
    )
  rest = values(argv[1:])
  if rest[1:]:
    raise UsageError(
      f"what is {rest[1]!r}? Flags are written --name=value.\n{USAGE}"
    )
  if layout and not values["help"].value:
    with values.config.unlocked(), values.config.ignore_type():
      values.config.layout = _layout(layout[-1].removeprefix(_LAYOUT))
  return values


_LAYOUT = "--config.layout="


def _layout(text: str) -> str | dict[str, Any]:
  """Reads a name, or a section as Python writes a dict."""
  if not text.startswith("{"):
    return text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, TypeError, ValueError) as error:
    raise UsageError(
      f"{_LAYOUT}{text} cannot be read ({_sentence(error)}); write a name, or"
      " {'mesh_shape': (2, -1, 1), 'rules': {}}."
    ) from error


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
  flags.DEFINE_list(
    "data",
    [],
    "files to read instead, of text or of pairs",
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


def _define_config(values: flags.FlagValues, argv: Sequence[str]) -> None:
  """Defines --config and its overrides, once the file and they are sound."""
  given = [
    flag.split("=")[0].lstrip("-")
    for flag in argv
    if flag.startswith(("--config.", "-config."))
  ]
  paths = _given(argv, "config")
  if "--help" not in argv:
    if not paths:
      raise UsageError("give --config=FILE, one of configs/ or your own.")
    known = _fields(_load(paths[-1]), "config")
    for name in given:
      if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, 0)[0]
        raise UsageError(
          f"the config has no field {name}; the nearest is {nearest}. One that"
          " the file leaves out has to be written there."
        )
  config_flags.DEFINE_config_file(
    "config",
    help_string="a file of configs/, or your own; any field FIELD of it is"
    " changed by --config.FIELD=VALUE",
    flag_values=values,
    sys_argv=list(argv),
  )


def _load(path: str) -> dict[str, Any]:
  """Reads a config file without overrides."""
  file, _, _ = path.partition(":")
  if not pathlib.Path(file).is_file():
    raise UsageError(
      f"--config={path}: there is no such file; give one of configs/ or your"
      " own."
    )
  alone = flags.FlagValues()
  plain = ["moejax", f"--config={path}"]
  config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=plain)
  try:
    alone(plain)
    return alone.config.to_dict()
  except Exception as error:  # Whatever the file's own code raises.
    raise UsageError(
      f"--config={path} cannot be read ({type(error).__name__}:"
      f" {_sentence(error)}); it must define get_config() -> ConfigDict."
    ) from error


def _given(argv: Sequence[str], name: str) -> list[str]:
  """Finds the values of a flag, written --name=value or --name value."""
  follows = zip(argv, [*argv[1:], ""], strict=True)
  return [
    next_one if flag.lstrip("-") == name else flag.partition("=")[2]
    for flag, next_one in follows
    if flag.startswith("-") and flag.lstrip("-").split("=")[0] == name
  ]


def _fields(values: Mapping[str, Any], name: str) -> list[str]:
  names = []
  for key, value in values.items():
    names.append(f"{name}.{key}")
    if isinstance(value, Mapping):
      names += _fields(value, names[-1])
  return names


def _help(values: flags.FlagValues) -> str:
  ours = [n for n in values if n not in ("flagfile", "undefok", "help")]
  lines = [f"  --{name}: {values[name].help}" for name in sorted(ours)]
  return "\n".join([USAGE, "", *lines])


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


def _failed(said: str, workdir: pathlib.Path | None) -> int:
  """Says it; leaves the details where a developer finds them, off the screen.

  To be called where an error is at hand. Returns the exit status.
  """
  terminal.warn(f"moejax: {said}")
  with contextlib.suppress(OSError):
    if workdir is not None and (workdir / "config.json").exists():
      details = traceback.format_exc().encode(errors="backslashreplace")
      files.write_whole(workdir / "traceback.txt", details)
  return 1
