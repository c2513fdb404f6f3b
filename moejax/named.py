"""Fields of a config: checked, built from, listed, read and set by name.

The fields of a section are the parameters of what it builds, as far as a config
can hold what they are annotated with: bool, int, float, str, None, lists and
sections. So the type, the range, the default and the meaning of a field are
written once, where it is read.
"""

import ast
import collections
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Annotated, Any, NamedTuple

Factory = Callable[..., Any]
# Of a field: there is no such value.
EMPTY = inspect.Parameter.empty

# -- annotations --------------------------------------------------------------


# Compared by identity: what is in a union of annotations must have a hash.
@dataclasses.dataclass(frozen=True, eq=False)
class Names:
  """In `Annotated`: a str that is one of these names."""

  known: Collection[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
  """In `Annotated`: a number of at least `least`, and less than `below`."""

  least: int | float
  below: int | float = math.inf

  def __str__(self) -> str:
    below = f", and less than {self.below}" if self.below < math.inf else ""
    return f"{self.least} or more{below}"


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
  """In `Annotated`: a section of a config, out of which something is built.

  The factory whose parameter this is gets a function: of what is `given`, to
  what the section builds.

  Attributes:
    factory: takes the section's fields; or a table of such by name, of which
      the section's field `kind` names one.
    given: parameters that code gives, and no config.
  """

  factory: Factory | Mapping[str, Factory]
  given: Collection[str] = ()

  @property
  def kinds(self) -> Mapping[str, Factory]:
    """The factories by name; none where there is only one."""
    return self.factory if isinstance(self.factory, Mapping) else {}


Size = Annotated[int, Range(1)]
# A field of files; its words are joined.
Paths = Annotated[str, "parted by commas; * and ? match any letters"]

_KINDS = {
  **{kind: kind.__name__ for kind in (bool, int, float, str)},
  types.NoneType: "None",
  Mapping: "dict",
  Sequence: "list",
}


class Alternative(NamedTuple):
  """One of the types that an annotation names."""

  kind: type  # A key of `_KINDS`.
  about: Any  # `Names`, `Range` or `Section`, if `Annotated` has one.
  entry: Any  # Annotation of the entries, of a list.
  line: str  # What the field is, where `Annotated` says that.


def alternatives(annotation: Any) -> list[Alternative]:
  """Returns what an annotation names; nothing where no config can hold it."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  found = []
  for each in typing.get_args(annotation) if union else (annotation,):
    noted = typing.get_origin(each) is Annotated
    plain, *notes = typing.get_args(each) if noted else (each,)
    about = next((n for n in notes if not isinstance(n, str)), None)
    line = next((n for n in notes if isinstance(n, str)), "")
    kind, entry = typing.get_origin(plain) or plain, None
    if isinstance(about, Section):
      kind = Mapping
    elif kind in (Sequence, Iterable):
      kind, entry = Sequence, (*typing.get_args(plain), Any)[0]
    if kind not in _KINDS:
      return []
    found.append(Alternative(kind, about, entry, line))
  return found


def section_of(annotation: Any) -> Section | None:
  """Returns the section that a field may be; None where it may not."""
  found = (each.about for each in alternatives(annotation))
  return next((about for about in found if isinstance(about, Section)), None)


def _is_a(value: Any, kind: type) -> bool:
  if kind is Mapping:
    return hasattr(value, "keys")
  if kind is Sequence:
    return isinstance(value, (list, tuple))
  # By the type itself: True is an int otherwise.
  return type(value) is kind or (kind is float and type(value) is int)


def worded(annotation: Any, fully: bool = False) -> str:
  """Writes what a field may hold: "int or None"; fully, with all bounds."""
  words = []
  for each in alternatives(annotation):
    word, about = _KINDS[each.kind], each.about
    if fully and isinstance(about, Names):
      word = " | ".join(about.known)
    elif fully and isinstance(about, Range):
      word = f"{word}, {about}"
    elif fully and each.entry and alternatives(each.entry):
      word = f"{word} of ({worded(each.entry, fully)})"
    words.append(word)
  return " or ".join(words)


def fields_of(
  *sources: Factory | Mapping[str, inspect.Parameter], **annotations: Any
) -> Callable[[Factory], Factory]:
  """Makes a factory's `**fields` stand for the parameters of others.

  A parameter that it names itself hides one of theirs. Annotations given here
  stand in place of theirs, or make a field that is None by default. What a
  field is may be said in any of the docstrings.
  """
  keyword = inspect.Parameter.KEYWORD_ONLY

  def decorate(factory):
    rest = {}
    for source in sources:
      is_table = isinstance(source, Mapping)
      rest |= source if is_table else inspect.signature(source).parameters
    for name, annotation in annotations.items():
      default = rest[name].default if name in rest else None
      rest[name] = inspect.Parameter(
        name, keyword, default=default, annotation=annotation
      )
    own = dict(inspect.signature(factory).parameters)
    own.popitem()  # **fields
    rest = [p.replace(kind=keyword) for n, p in rest.items() if n not in own]
    factory.__signature__ = inspect.Signature([*own.values(), *rest])
    factory.fields_of = [s for s in sources if not isinstance(s, Mapping)]
    return factory

  return decorate


def limited(factory: Factory, **annotations: Any) -> Factory:
  """Returns a factory of the same, with other annotations of some fields."""

  @fields_of(factory, **annotations)
  def make(**fields):
    return factory(**fields)

  return make


# -- checking and building ----------------------------------------------------


def build(
  factory: Factory | Mapping[str, Factory],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls `factory`, of a table or alone, with a section's checked fields.

  ValueError names the field, and what may be in its place.
  """
  factory, arguments = _arguments(section, Section(factory, given), where)
  return factory(**arguments, **given)


def checked(value: Any, annotation: Any, where: str) -> Any:
  """Returns what a factory gets: for a section, a function that builds it.

  An int will do for a float. ValueError names the field, its value and what may
  be in its place.
  """
  each_kind = alternatives(annotation)
  if not each_kind:
    return value
  found = next((each for each in each_kind if _is_a(value, each.kind)), None)
  if found is None:
    raise ValueError(f"{where} is {value!r}; give it as {worded(annotation)}.")
  about, entry = found.about, found.entry
  if isinstance(about, Section):
    factory, arguments = _arguments(value, about, where)
    return functools.partial(factory, **arguments)
  if entry:
    bounded = any(isinstance(a.about, Range) for a in alternatives(entry))
    if bounded and not value:
      raise ValueError(f"{where} is {value}; give at least one.")
    # Of sections it matters which one it is; of numbers the value tells.
    place = "{}[{}]" if section_of(entry) else "{}"
    return tuple(
      checked(each, entry, place.format(where, i))
      for i, each in enumerate(value)
    )
  if isinstance(about, Names):
    one_of(value, about.known, where)
  elif isinstance(about, Range):
    if not about.least <= value < about.below:
      raise ValueError(f"{where} is {value}; give {about}.")
  elif isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError:
      raise ValueError(
        f"{where} is {value!r}, which is not UTF-8; rename what it names."
      ) from None
  return value


def _arguments(
  section: Mapping[str, Any], about: Section, where: str
) -> tuple[Factory, dict[str, Any]]:
  """Returns what builds a section, and what it gets of the checked fields."""
  factory, parameters = chosen(about, section, where)
  for name in section:
    if name in parameters or (about.kinds and name == "kind"):
      continue
    if not parameters:
      raise ValueError(
        f"{where}.{name} does not exist, nor any other field there; take it"
        " out of the config."
      )
    raise ValueError(
      f"{where}.{name} does not exist; the nearest is"
      f" {where}.{nearest(name, parameters)}."
    )
  arguments = {}
  for name, parameter in parameters.items():
    annotation, there = parameter.annotation, f"{where}.{name}"
    if name in section:
      arguments[name] = checked(section[name], annotation, there)
    elif parameter.default is EMPTY:
      raise ValueError(f"{there} is missing; give it a value.")
    inner = section_of(annotation)
    if inner and section.get(name) is None:
      # One that is left out has no fields, which matters if it is built.
      arguments[name] = functools.partial(build, inner.factory, {}, there)
  return factory, arguments


def chosen(
  about: Section, section: Mapping[str, Any], where: str
) -> tuple[Factory, dict[str, inspect.Parameter]]:
  """Returns what builds a section, and the parameters that are its fields."""
  factory = about.factory
  if about.kinds:
    kind = one_of(section.get("kind", ""), about.kinds, f"{where}.kind")
    factory = about.kinds[kind]
  parameters = inspect.signature(factory).parameters
  # A linen module has a parent and a name, for which a config has no use.
  hidden = {*about.given, *(("name",) if "parent" in parameters else ())}
  return factory, {
    name: parameter
    for name, parameter in parameters.items()
    if name not in hidden and alternatives(parameter.annotation)
  }


def one_of(name: Any, names: Collection[str], where: str) -> str:
  """Returns the name; ValueError lists these, and the nearest, if not one."""
  if not isinstance(name, str) or name not in names:
    raise ValueError(
      f"{where} is {name!r}; choose one of {', '.join(map(repr, names))}"
      f" (the nearest is {nearest(name, names)!r})."
    )
  return name


def nearest(name: Any, known: Iterable[str]) -> str:
  """Returns which of the names is most like this one."""
  return difflib.get_close_matches(str(name), list(known), 1, 0)[0]


# -- listing ------------------------------------------------------------------


class Field(NamedTuple):
  """A field of a config, or a section of it."""

  name: str  # With those of the sections that it is in: "config.seed".
  annotation: Any
  value: Any  # `EMPTY` where the config leaves it out.
  default: Any  # What that means; `EMPTY` where it must not be left out.
  line: str  # What it is.


def fields(
  annotation: Any, where: str, value: Any, default: Any = None, line: str = ""
) -> Iterator[Field]:
  """Yields a field, see `Field`, and of a section all within, left out or not.

  ValueError where a section is of an unknown kind.
  """
  each_kind = alternatives(annotation)
  said = [line, *(each.line for each in each_kind)]
  line = "; ".join(filter(None, said))
  yield Field(where, annotation, value, default, line)
  entry = next((each.entry for each in each_kind if each.entry), None)
  if section_of(entry) and _is_a(value, Sequence):
    for i, each in enumerate(value):
      yield from fields(entry, f"{where}[{i}]", each)
  about = section_of(annotation)
  if about is None:
    return
  section = value if _is_a(value, Mapping) else {}
  if about.kinds:
    kind = section.get("kind", EMPTY)
    names = Annotated[str, Names(about.kinds)]
    yield Field(f"{where}.kind", names, kind, EMPTY, "which of these it is")
    if kind is EMPTY:
      return
  factory, parameters = chosen(about, section, where)
  # What kinds have in common need be said of one alone; its own line counts.
  lines = collections.ChainMap(*map(_lines, (factory, *about.kinds.values())))
  for name, each in parameters.items():
    yield from fields(
      each.annotation,
      f"{where}.{name}",
      section.get(name, EMPTY),
      each.default,
      lines.get(name, ""),
    )


@functools.cache
def _lines(factory: Factory) -> dict[str, str]:
  """Finds the first sentence about each parameter in docstrings."""
  if isinstance(factory, functools.partial):
    factory = factory.func
  found = {}
  for source in getattr(factory, "fields_of", ()):
    found |= _lines(source)
  for each in factory.__mro__[::-1] if isinstance(factory, type) else [factory]:
    doc = inspect.cleandoc(each.__doc__ or "") + "\n"
    for part in re.findall(
      r"^(?:Args|Attributes):\n((?: .*\n|\n)+)", doc, re.M
    ):
      about = re.findall(r"^  (\w+): (.*(?:\n {4}.*)*)", part, re.M)
      found |= {name: sentence(text) for name, text in about}
  return found


def sentence(text: str | None) -> str:
  """Returns the first sentence of a docstring, or of a part, without its end.

  A dot within one, as in "(app. B)", is followed by no word.
  """
  line = " ".join((text or "").split())
  return re.split(r"\.(?= (?:A |[A-Z][a-z]))|\.$", line)[0]


# -- reading and setting ------------------------------------------------------


class ReadError(ValueError):
  """A command line cannot be understood."""


def written(value: Any) -> str:
  """Writes a value as `read` takes it."""
  if isinstance(value, (list, tuple)):
    words = [written(each) for each in value]
    if words and all(re.fullmatch(r"[\w.+-]+", word) for word in words):
      return ",".join(words) + ("," if len(words) == 1 else "")
  return value if isinstance(value, str) else repr(value)


def read(text: Any, annotation: Any, where: str) -> Any:
  """Reads a value, as annotated, from a command line.

  None, True, False and numbers are written as Python does (1e3 is a whole one),
  a str as it is. A list is parted by commas, with brackets or without; a
  section is a dict as Python writes it or, where it has kinds, the name of one.
  What stands within these may have been read before. `ReadError` says what the
  field can hold, ValueError which kinds there are.
  """
  about = section_of(annotation)
  by_kind = {each.kind: each for each in alternatives(annotation)}
  # In the order in which what is written could be meant.
  order = (types.NoneType, bool, int, float, Mapping, Sequence, str)
  for kind in filter(by_kind.__contains__, order):
    if kind is Mapping and about.kinds and str(text).isidentifier():
      return {"kind": one_of(text, about.kinds, where)}
    # What could be either: no str begins like a dict, a list has a comma.
    if kind is str and about and str(text).startswith("{"):
      break
    is_word = isinstance(text, str) and not re.search(r"[,(\[]", text)
    if kind is Sequence and str in by_kind and is_word:
      continue
    errors = ArithmeticError, KeyError, SyntaxError, TypeError, ValueError
    with contextlib.suppress(*errors):
      return _read_as(text, by_kind[kind], where)
  wanted = worded(annotation)
  if about:
    first = "kind" if about.kinds else next(iter(chosen(about, {}, "")[1]))
    wanted += f", as in {{{first!r}: ...}}"
  raise ReadError(f"--{where}={text} cannot be read; give it as {wanted}.")


_WORDS = {
  types.NoneType: {"none": None, "null": None},
  bool: {
    **dict.fromkeys(("true", "t", "1"), True),
    **dict.fromkeys(("false", "f", "0"), False),
  },
}


def _read_as(text: Any, each: Alternative, where: str) -> Any:
  """Reads a value of one type; raises some error where it is none."""

  def within(value, annotation, name):
    # What cannot be read is refused when it is built.
    with contextlib.suppress(ValueError):
      return read(value, annotation, name)
    return value

  kind = each.kind
  if kind in _WORDS:
    return _WORDS[kind][str(text).lower()]
  if kind is int:
    with contextlib.suppress(ValueError):
      return int(str(text))
    number = float(str(text))
    if not number.is_integer():
      raise ValueError
    return int(number)
  if kind is float:
    return float(str(text))
  if kind is Mapping:
    section = ast.literal_eval(text) if isinstance(text, str) else text
    section = dict(section.items() if _is_a(section, Mapping) else None)
    parameters = {}
    with contextlib.suppress(ValueError):
      parameters = chosen(each.about, section, where)[1]
    return section | {
      name: within(section[name], parameter.annotation, f"{where}.{name}")
      for name, parameter in parameters.items()
      if name in section
    }
  if kind is Sequence and isinstance(text, str):
    # Without brackets and the comma that may come last.
    inner = re.sub(r"^[\[(]|[\])]$", "", text.strip()).strip().removesuffix(",")
    try:
      text = ast.literal_eval(f"({inner},)") if inner else ()
    except (SyntaxError, ValueError):
      text = [word.strip() for word in inner.split(",")]
  if not _is_a(text, kind):
    raise TypeError
  return (
    text
    if kind is str
    else tuple(within(one, each.entry, where) for one in text)
  )


def override(
  config: Any,
  changes: Iterable[tuple[str, Sequence[str]]],
  fields_of_config: Callable[[Any], Iterable[Field]],
) -> None:
  """Sets fields to what a command line says, whether the file has them or not.

  A section is set before what is in it, and its kind before its other fields,
  in whatever order they come. By the name of a kind, of its own or as "kind", a
  section keeps those of its fields that this kind has as well. A field without
  words becomes True; several are a list, or paths. Errors as of `read`.
  """
  found = {}
  for name, words in sorted(
    changes, key=lambda change: len(_steps(change[0].removesuffix(".kind")))
  ):
    found = found or {field.name: field for field in fields_of_config(config)}
    if name not in found:
      raise ReadError(_unknown(name, found))
    value = value_of(found[name], words)
    section = name.removesuffix(".kind")
    if section != name and found[section].value is not EMPTY:
      name, value = section, value_of(found[section], [value])
    set_field(config, name, value)
    # By another kind there are other fields.
    if section_of(found[name].annotation):
      found = {}


def _unknown(name: str, found: Mapping[str, Field]) -> str:
  section, _, last = name.rpartition(".")
  about = section_of(found[section].annotation) if section in found else None
  for kind in about.kinds if about else ():
    if last in chosen(about, {"kind": kind}, section)[1]:
      now = found[f"{section}.kind"].value
      now = "of no kind" if now is EMPTY else f"of the kind {now!r}"
      return (
        f"{section}, which is {now}, has no field {last}; it has by"
        f" --{section}={kind}."
      )
  tail = name.removeprefix("config")
  likely = [each for each in found if tail.strip(".") and each.endswith(tail)]
  return (
    f"the config has no field {name}; the nearest is"
    f" {' or '.join(likely) or nearest(name, found)}."
  )


def value_of(field: Field, words: Sequence[str]) -> Any:
  """Reads the value of a field from the words that follow its name."""
  name, annotation, old, *_ = field
  wanted = worded(annotation)
  kinds = [each.kind for each in alternatives(annotation)]
  if not words and bool not in kinds:
    raise ReadError(f"--{name} is without a value; give it as {wanted}.")
  if len(words) > 1 and Sequence not in kinds and annotation != Paths:
    raise ReadError(
      f"what is {words[1]!r}? --{name} takes one value; give it as {wanted}."
    )
  text = ",".join(words) if words else "True"
  value = read(text, annotation, name)
  if value == {"kind": text} and _is_a(old, Mapping):
    fitting = chosen(section_of(annotation), value, name)[1]
    return {n: v for n, v in old.items() if n in fitting} | value
  return value


def set_field(config: Any, name: str, value: Any) -> None:
  """Sets a field, such as "config.a.b[0].c", and makes its sections."""

  def set_in(section, steps):
    if not steps:
      return value
    first, *rest = steps
    if _is_a(section, Sequence):
      i = int(first)
      inner = set_in(dict(section[i]), rest)
      return (*section[:i], inner, *section[i + 1 :])
    inner = section.get(first)
    if rest and not any(_is_a(inner, kind) for kind in (Mapping, Sequence)):
      inner = {}
    section[first] = set_in(inner, rest)
    return section

  set_in(config, _steps(name))


def _steps(name: str) -> list[str]:
  """Parts "config.a.b[0].c" into a, b, 0, c."""
  return re.findall(r"[^.\[\]]+", name)[1:]
