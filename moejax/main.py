"""The command line: moejax COMMAND [FLAGS]."""

import contextlib
import errno
import importlib.metadata
import inspect
import itertools
import logging as std_logging
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NoReturn

from absl import logging

from moejax import bucket, config_fields, files, limits, terminal
from moejax.config_fields import Names, Range, ReadError

USAGE = """usage: moejax COMMAND [FLAGS]

  train  --config=NAME --workdir=DIR [--config.FIELD=VALUE ...]
         trains, or goes on where the workdir left off; by several processes
         with --coordinator_address=HOST:PORT --num_processes=N --process_id=I
  eval   --workdir=DIR [--split=SPLIT | --data=FILE[,FILE...]] [--layout=NAME]
         perplexity and bits per byte of a run's best checkpoint, or BLEU
  report --workdir=DIR [--compare=DIR] [--out=FILE.html] [--split=SPLIT]
         [--data=FILE[,FILE...]] [--layers=NAME,...] [--sentences=N]
         what the experts do, as a page for a browser and as JSON
  translate --workdir=DIR [--language=LANGUAGE] [--layout=NAME] < FILE > FILE
         translates line by line by a run's best checkpoint
  sample --workdir=DIR [--prompt=TEXT] [--num=N] [--length=N] [--seed=N]
         [--temperature=X] [--top_k=N] [--top_p=X] [--show_experts]
         goes on with a text by a run's best checkpoint, token by token
  upcycle --from=DIR --config=NAME --workdir=DIR [--noise=X] [--drop=X]
         [--optimizer=reset|carry] [--config.FIELD=VALUE ...]
         a run with mixtures out of a dense one, to be trained on
  split  --from=DIR --workdir=DIR --parts=N
         a run with every expert cut in N, of which N times as many are active
  merge  --from=DIR --workdir=DIR --experts=N
         a run with fewer experts, means of those whose routers are alike
  prune  --from=DIR --workdir=DIR --experts=N [--by=load|reap]
         a run with the best experts alone
  plot   --workdir=DIR[,DIR...] [--metric=NAME] [--out=FILE.png|.svg|.pdf]
         [--x=steps|words|tokens|flops|hours]
         training curves of runs, in the terminal or as a picture
  watch  --workdir=DIR [--every=SECONDS]
         follows a run: loss, speed, time left, the load of every expert
  plan   --config=NAME [--topology=v5p:4x4x8,...] [--layout=NAME,...]
         [--suggest | --quality [--tokens=N]] [--config.FIELD=VALUE ...]
         what layouts cost on devices that need not be there: memory, exchanges,
         an estimate of the time; --suggest looks for the fastest that fits,
         --quality tells what experts are worth by scaling laws
  import --from=DIR --workdir=DIR [--config.FIELD=VALUE ...]
         makes a run of a model that transformers wrote, or of one of the hub
  export --workdir=DIR --to=DIR [--dtype=float32|bfloat16|float16]
         writes a run's best checkpoint as transformers and vLLM read it
  configs
         lists the configs that come with moejax, a line each

NAME is that of a config that comes with moejax, or a file of your own. moejax
COMMAND --help lists the flags of a command, with --config=NAME also all fields
of the config, whether the file has them or not; moejax --version."""


def main(argv: Sequence[str]) -> int:
  """Runs a command: program name, its own name, flags.

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
    if argv[1] not in COMMANDS:
      raise ReadError(
        f"unknown command {argv[1]!r}; the nearest is"
        f" {config_fields.nearest(argv[1], COMMANDS)!r}.\n{USAGE}"
      )
    command = COMMANDS[argv[1]]
    values = _parse(command, argv[2:])
    if values.pop("help", False):
      terminal.say(_help(command, values))
      return 0
    for flag in _flags(command):
      if flag.default is config_fields.EMPTY and not values.get(flag.name):
        raise ReadError(f"give --{flag.name}={_WANTED[flag.name]}.")
    # Who only looks leaves nothing in a run.
    if "workdir" in values and argv[1] not in ("plot", "watch"):
      workdir = files.path(values["workdir"])
    limits.check()
    # A word of Python's own cannot be a parameter.
    given = {f"{n}_" if n == "from" else n: v for n, v in values.items()}
    return command(**given) or 0
  except ReadError as error:
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
    processes.leave(status, alike=status == 1)
  sys.exit(status)


# -- commands, which import late: jax takes seconds, a wrong flag should not ---

# What is given for a flag that must be.
_WANTED = {
  "config": "NAME, one that `moejax configs` lists or a file of your own",
  "experts": "N, how many are to be left",
  "from": "DIR, where the run, or the model, lies that another is made of",
  "parts": "N, in how many every expert is cut",
  "workdir": "DIR, where the run lives",
  "to": "DIR, which is new or empty",
}


def _train(
  config: str,
  workdir: str,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  changes=(),
) -> int:
  """Trains.

  Args:
    config: name of a config, see `moejax configs`, or a file of your own;
      NAME:TEXT gives its get_config a text; --config.FIELD=VALUE changes a
      field; with --help all fields are listed.
    workdir: where the run lives.
    coordinator_address: host:port of the first process, where several train.
    num_processes: how many processes train.
    process_id: which one this is, from 0.
  """
  from moejax import config as config_lib
  from moejax.training import processes

  fields = config_lib.load(config, changes)
  processes.join(coordinator_address, num_processes, process_id)
  from moejax.training import loop

  result = loop.train(config_lib.parse(fields), files.path(workdir))
  if "signal" not in result:
    return 0
  processes.part()
  # As of a program that the signal ended: `train && eval` stops there.
  return 128 + result["signal"]


def _eval(
  workdir: str,
  split: Annotated[str, Names(("train", "validation", "test"))] | None = None,
  data: Sequence[str] = (),
  layout: str = "",
  record: str = "",
  replay: str = "",
  counterfactual: Sequence[str] = (),
) -> None:
  """Evaluates.

  Args:
    workdir: where the run lives.
    split: which part of the run's own corpus to read; the test by default.
    data: files to read instead, of text or of pairs, parted by commas; * and ?
      match any letters.
    layout: a name, in place of the run's own.
    record: a new folder, for a trace of what the mixtures decide.
    replay: a trace, whose decisions are taken in place of the model's.
    counterfactual: other decisions, parted by commas, and what they cost: k=N
      experts a token, "training" as there, "uniform", or the folder of a trace.
  """
  from moejax.training import run

  if data and split:
    raise ReadError("--split and --data exclude each other; give one.")
  if sum(map(bool, (record, replay, counterfactual))) > 1:
    raise ReadError(
      "--record, --replay and --counterfactual exclude each other; give one."
    )
  text = files.path(workdir), split or "test", data, layout
  if not (record or replay or counterfactual):
    run.evaluate_run(*text)
    return
  from moejax.analysis import trace
  from moejax.training import evaluators

  if record:
    about = trace.record(text[0], files.local(record), *text[1:])
    losses = {"recorded": about["loss"]}
  elif replay:
    loss = trace.replay(text[0], files.local(replay), *text[1:])
    losses = {"replayed": loss}
  else:
    losses = trace.counterfactual(text[0], counterfactual, *text[1:])
  first = next(iter(losses.values()))
  for choice, loss in losses.items():
    terminal.say(
      f"{choice}: {loss:.4f} nats a token, perplexity"
      f" {evaluators.exp(loss):,.2f}"
      + ("" if loss == first else f" ({loss - first:+.4f} nats)")
    )


def _report(
  workdir: str,
  compare: str = "",
  out: str = "report.html",
  split: Annotated[str, Names(("train", "validation", "test"))] | None = None,
  data: Sequence[str] = (),
  layout: str = "",
  layers: Sequence[str] = (),
  sentences: Annotated[int, Range(1)] = 200,
  without: Annotated[int, Range(0)] = 64,
) -> None:
  """Reports.

  Args:
    workdir: where the run lives.
    compare: where another one lives, to be shown beside it.
    out: the page, an .html; the same name with .json gets the numbers.
    split: which part of the run's own corpus to read; the test by default.
    data: files to read instead, as of eval.
    layout: a name, in place of the run's own.
    layers: names of the mixtures to tell of; all by default.
    sentences: how many of the text to show.
    without: how many experts to take away in turn, the busiest of each layer,
      to tell what the loss is without them.
  """
  from moejax.analysis import report

  if data and split:
    raise ReadError("--split and --data exclude each other; give one.")
  workdirs = [files.path(each) for each in (workdir, compare) if each]
  text = split or "test", data, layout
  to = files.local(out)
  told = report.write(workdirs, to, *text, layers, sentences, without)
  for run in told["runs"]:
    terminal.say(
      f"{run['workdir']}: {len(run['layers'])} mixture(s), {run['tokens']:,}"
      f" {run['unit']}s, loss {run['loss']} nats a token (checkpoint of step"
      f" {run['step']})"
    )
  terminal.say(f"{to} and {to.with_suffix('.json').name} are written.")


def _translate(
  workdir: str, language: str = "", beam: int = 8, layout: str = ""
) -> None:
  """Translates.

  Args:
    workdir: where the run lives.
    language: to translate into, where the run has learned several.
    beam: hypotheses kept at every step; 1 is greedy.
    layout: a name, in place of the run's own.
  """
  from moejax import workdir as workdir_lib
  from moejax.data import text_files
  from moejax.training import run

  folder = files.path(workdir)
  # Before somebody writes lines for a run that is not there.
  workdir_lib.recall(folder)
  # There is none where it was closed before the start.
  content = sys.stdin.buffer.read() if sys.stdin else b""
  with terminal.bar(None, "line") as bar:
    translated = run.translate_run(
      folder,
      text_files.of_stdin(content),
      language,
      bar.update,
      layout,
      beam=beam,
    )
  # UTF-8 as the lines that came in, whatever the terminal has.
  written = "".join(f"{line}\n" for line in translated)
  terminal.hand_over(written.encode())


def _sample(
  workdir: str,
  prompt: str = "",
  num: Annotated[int, Range(1)] = 1,
  length: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: Annotated[int, Range(0, 2**32)] = 0,
  show_experts: bool = False,
  layout: str = "",
) -> None:
  """Samples.

  Args:
    workdir: where the run lives, of a language model.
    prompt: what every text begins with.
    num: how many texts.
    length: tokens of a text at most, the prompt's counted; 0 is the length of
      the rows that the model was trained on.
    temperature: of p^(1/temperature); 0 takes the likeliest token.
    top_k: how many of the likeliest tokens there are to draw from; 0 is all.
    top_p: of those, as few as have this chance together.
    seed: of the draws.
    show_experts: a line for each token, with the experts that read it and their
      gates.
    layout: a name, in place of the run's own.
  """
  from moejax.training import run

  texts = run.sample_run(
    files.path(workdir),
    prompt,
    length,
    seed,
    layout,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    show_experts=show_experts,
  )
  for text in itertools.islice(texts, num):
    for said, mixtures in text:
      if show_experts:
        read_by = " | ".join(
          ", ".join(f"{expert} ({gate:.2f})" for expert, gate in experts)
          for experts in mixtures
        )
        terminal.say(f"{terminal.one_line(said):<20} {read_by}".rstrip())
      else:
        terminal.say(said, end="")
    terminal.say("")


def _upcycle(
  from_: str,
  config: str,
  workdir: str,
  noise: float = 0.0,
  drop: float = 0.0,
  optimizer: Annotated[str, Names(("reset", "carry"))] = "reset",
  changes=(),
) -> None:
  """Upcycles.

  Args:
    from_: where the dense run lives.
    config: as of `moejax train`, of what the new run trains.
    workdir: where the new run is to live.
    noise: standard deviation of what is added to experts, over that of their
      entries.
    drop: share of each expert's hidden units that is drawn anew.
    optimizer: reset begins again at step 0; carry goes on with the moments.
  """
  from moejax import config as config_lib
  from moejax.training import upcycle

  experiment = config_lib.parse(config_lib.load(config, changes))
  folders = files.path(from_), experiment, files.path(workdir)
  upcycle.upcycle(*folders, noise, drop, optimizer)


def _split(from_: str, workdir: str, parts: Annotated[int, Range(2)]) -> None:
  """Splits.

  Args:
    from_: where the run lives.
    workdir: where the new run is to live.
    parts: in how many every expert is cut.
  """
  from moejax.training import upcycle

  upcycle.split(files.path(from_), files.path(workdir), parts)


def _merge(from_: str, workdir: str, experts: Annotated[int, Range(1)]) -> None:
  """Merges.

  Args:
    from_: where the run lives.
    workdir: where the new run is to live.
    experts: how many of each mixture are left.
  """
  from moejax.training import upcycle

  upcycle.merge(files.path(from_), files.path(workdir), experts)


def _prune(
  from_: str,
  workdir: str,
  experts: Annotated[int, Range(1)],
  by: Annotated[str, Names(("load", "reap"))] = "load",
) -> None:
  """Prunes.

  Args:
    from_: where the run lives.
    workdir: where the new run is to live.
    experts: how many each mixture keeps.
    by: load keeps those that most tokens visit; reap those whose output, times
      its gate, is largest in the mean of these.
  """
  from moejax.training import upcycle

  upcycle.prune(files.path(from_), files.path(workdir), experts, by)


def _plot(
  workdir: Sequence[str],
  out: str = "",
  metric: str = "perplexity",
  x: str = "steps",
) -> None:
  """Plots.

  Args:
    workdir: where runs live, parted by commas.
    out: a file for a picture, by its suffix .png, .svg or .pdf; without it the
      curves are drawn in the terminal.
    metric: a name in metrics.jsonl; of language models perplexity is that of a
      word.
    x: what the curves go along: steps, words, tokens, flops or hours.
  """
  from moejax.analysis import plot

  plot.plot([files.path(each) for each in workdir], out, metric, x)


def _watch(
  workdir: str, every: Annotated[float, Range(0.1)] = 2.0
) -> int | None:
  """Watches.

  Args:
    workdir: where the run lives.
    every: seconds between two looks.
  """
  from moejax.analysis import watch

  return watch.watch(files.path(workdir), every)


def _plan(
  config: str,
  topology: Sequence[str] = (),
  layout: Sequence[str] = (),
  suggest: bool = False,
  trace: str = "",
  quality: bool = False,
  tokens: Annotated[float, Range(1)] | None = None,
  out: str = "",
  changes=(),
) -> None:
  """Plans.

  Args:
    config: as of `moejax train`.
    topology: devices, such as v5p:4x4x8, v5e:4x4, h100:8, h100:4x8 or cpu:8;
      those at hand by default.
    layout: names of layouts; the config's own by default.
    suggest: search all layouts, group sizes, capacities, microbatches and
      recompute.
    trace: a run, or a routing trace of one, whose experts' load is taken in
      place of an equal one.
    quality: say what the experts are worth and from how many tokens on, by
      scaling laws, in place of all else.
    tokens: that the model reads; by default those of the config's steps.
    out: a folder for plan.json and plan.png.
  """
  from moejax import config as config_lib
  from moejax.planning import load, search

  experiment = config_lib.parse(config_lib.load(config, changes))
  if quality or tokens:
    from moejax.planning import quality as quality_lib

    if topology or layout or suggest or trace or out:
      raise ValueError(
        "--quality stands in place of a plan; give it without --topology,"
        " --layout, --suggest, --trace and --out."
      )
    terminal.say(quality_lib.text(experiment, tokens))
    return
  busy = load.read(files.local(trace), experiment) if trace else None
  folder = files.local(out) if out else None
  search.run(experiment, topology, layout, suggest, folder, busy)


def _import(
  from_: str,
  workdir: str,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  changes=(),
) -> None:
  """Imports.

  Args:
    from_: a folder with config.json and safetensors, or the name of a model of
      the hub.
    workdir: where the run shall live; there is none yet.
    coordinator_address: host:port of the first process, where several import.
    num_processes: how many processes import.
    process_id: which one this is, from 0.
  """
  from moejax.training import processes

  processes.join(coordinator_address, num_processes, process_id)
  from moejax import huggingface

  huggingface.import_model(from_, files.path(workdir), changes)


def _export(
  workdir: str,
  to: str,
  dtype: Annotated[str, Names(("float32", "bfloat16", "float16"))] = "float32",
) -> None:
  """Exports.

  Args:
    workdir: where the run lives.
    to: a folder for config.json and safetensors, new or empty.
    dtype: type that parameters are rounded to.
  """
  from moejax import huggingface

  huggingface.export_model(files.path(workdir), files.local(to), dtype)


def _configs() -> None:
  from moejax import config as config_lib

  for line in config_lib.described():
    terminal.say(line)


COMMANDS = {
  "train": _train,
  "eval": _eval,
  "report": _report,
  "translate": _translate,
  "sample": _sample,
  "upcycle": _upcycle,
  "split": _split,
  "merge": _merge,
  "prune": _prune,
  "plot": _plot,
  "watch": _watch,
  "plan": _plan,
  "import": _import,
  "export": _export,
  "configs": _configs,
}

# -- flags --------------------------------------------------------------------


def _flags(command: Callable[..., Any]) -> list[config_fields.Field]:
  """Returns the flags of a command, which are its parameters."""
  section = Annotated[Any, config_fields.Section(command)]
  _, *flags = config_fields.fields(section, "", {})
  return [flag._replace(name=flag.name.strip("._")) for flag in flags]


def _parse(command: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
  """Reads a command's flags; under "changes", those that change its config.

  A flag has the word after "=", or the words up to the next flag: files that a
  shell puts for a pattern are a list.
  """
  flags = {flag.name: flag for flag in _flags(command)}
  given: list[tuple[str, list[str]]] = []
  for word in words:
    if re.match("--?[a-zA-Z]", word):
      name, equals, value = word.lstrip("-").partition("=")
      given.append((name, [value] if equals else []))
    elif given:
      given[-1][1].append(word)
    else:
      raise ReadError(
        f"what is {word!r}? Flags are written --name=value.\n{USAGE}"
      )
  values: dict[str, Any] = {}
  for name, said in given:
    if name == "help":
      values[name] = True
    elif name.startswith("config."):
      if "changes" not in inspect.signature(command).parameters:
        raise ReadError(
          f"what is --{name}? A run keeps the config that it was made with;"
          " --layout alone may differ."
        )
      values.setdefault("changes", []).append((name, said))
    elif name not in flags:
      _refuse(name, flags, dict(given).get("config", [""]))
    elif name == "data":
      values[name] = [*values.get(name, ()), *said]
    else:
      values[name] = config_fields.value_of(flags[name], said)
      try:
        config_fields.checked(values[name], flags[name].annotation, f"--{name}")
      except ValueError as error:
        raise ReadError(error) from None
  return values


def _refuse(
  name: str, flags: Mapping[str, config_fields.Field], config: Sequence[str]
) -> NoReturn:
  """Says which flag, or which field of the config, is meant by none."""
  said, meant = f"there is no flag --{name};", []
  if "config" in flags:
    from moejax import config as config_lib

    # Without a file there still are the fields that every config has.
    fields = config_lib.fields(config_lib.load(*config) if any(config) else {})
    end = f".{name.replace('-', '_')}"
    meant = [f"--{f.name}=VALUE" for f in fields if f.name.endswith(end)]
  if meant:
    ways = " or ".join(meant)
    raise ReadError(f"{said} a field of the config is changed by {ways}.")
  nearest = config_fields.nearest(name, [*flags, "help"])
  raise ReadError(f"{said} the nearest is --{nearest}.")


_FIELDS = """\
Fields of the config, with what it holds or, where it leaves a field out, with
the default; `...` is for what then is missing. A section {...} is given as
Python writes a dict or, where it has kinds, by the name of one: then it keeps
the fields that this kind has too. Entries of a list are parted by commas."""


def _help(command: Callable[..., Any], values: Mapping[str, Any]) -> str:
  lines = [USAGE, "", *(f"  --{f.name}: {f.line}" for f in _flags(command))]
  if "config" in values:
    from moejax import config as config_lib

    lines += ["", _FIELDS, ""]
    config = config_lib.load(values["config"], values.get("changes", ()))
    for field in config_lib.fields(config):
      left_out = field.value is config_fields.EMPTY
      value = field.default if left_out else field.value
      text = shlex.quote(config_fields.written(value))
      if value is config_fields.EMPTY:
        text = "..."
      elif hasattr(value, "keys"):
        text = "{...}"
      about = config_fields.worded(field.annotation)
      about += "; left out" * left_out
      lines.append(f"  --{field.name}={text}\n      {field.line} ({about})")
  return "\n".join(lines)


# -- what went wrong ----------------------------------------------------------

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
