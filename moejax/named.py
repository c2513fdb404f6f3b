"""Objects by name: checked calls with the fields of a section of a config.

The fields of a section are the parameters of what it builds, as far as a config
can hold what they are annotated with: bool, int, float, str, None, lists and
sections. So types, ranges, names to choose from, defaults, and a line of what a
field is, are written once, where it is read. `make` checks by them; a command
line lists and changes fields by them (`moejax.options`).
"""

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Mapping,
  Sequence,
)
from typing import Annotated, Any, NamedTuple

Factory = Callable[..., Any]
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


Size = Annotated[int, Range(1)]


def fields_of(
  *sources: Factory, **annotations: Any
) -> Callable[[Factory], Factory]:
  """Makes a factory's `**fields` stand for the parameters of others.

  A parameter that it names itself hides one of theirs. What they are is said in
  any of the docstrings.

  Args:
    *sources: factories whose parameters these are.
    **annotations: in place of theirs; of a name that they do not have, of a
      field that is None by default.
  """

  def decorate(factory):
    rest = {}
    for source in sources:
      rest |= inspect.signature(source).parameters
    for name, annotation in annotations.items():
      default = rest[name].default if name in rest else None
      rest[name] = inspect.Parameter(
        name, _KEYWORD, default=default, annotation=annotation
      )
    own = dict(inspect.signature(factory).parameters)
    (fields,) = [n for n, each in own.items() if each.kind is each.VAR_KEYWORD]
    del own[fields]
    rest = [p.replace(kind=_KEYWORD) for n, p in rest.items() if n not in own]
    factory.__signature__ = inspect.Signature([*own.values(), *rest])
    factory.fields_of = sources
    return factory

  return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY

# -- building -----------------------------------------------------------------


def make(
  factory: Factory | Mapping[str, Factory],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls `factory` with a section's fields, checked by name and type.

  Args:
    factory: or a table of such, see `Section`.
    section: fields and their values.
    where: the section's own name.
    **given: what no config can hold.

  Raises:
    ValueError: names the field, and what may be in its place.
  """
  about = Section(factory, given)
  _check(section, about, where)
  factory, parameters = chosen(about, section, where)
  arguments = {
    name: _built(section.get(name), parameter.annotation, f"{where}.{name}")
    for name, parameter in parameters.items()
    if name in section or section_of(parameter.annotation)
  }
  return factory(**arguments, **given)


def _built(value: Any, annotation: Any, where: str) -> Any:
  """Turns sections into functions that build; all else stays as it is."""
  section, entry = section_of(annotation), entry_of(annotation)
  if section and (value is None or is_a(value, Mapping)):
    return functools.partial(make, section.factory, value or {}, where)
  if entry and is_a(value, Sequence):
    return tuple(
      _built(each, entry, f"{where}[{i}]") for i, each in enumerate(value)
    )
  return value


def chosen(
  about: Section, section: Mapping[str, Any], where: str
) -> tuple[Factory, dict[str, inspect.Parameter]]:
  """Returns what builds a section, and the parameters that are its fields."""
  factory = about.factory
  if isinstance(factory, Mapping):
    factory = factory[known(section.get("kind", ""), factory, f"{where}.kind")]
  parameters = inspect.signature(factory).parameters
  # A linen module has a parent and a name, for which a config has no use.
  hidden = {*about.given, *(("name",) if "parent" in parameters else ())}
  return factory, {
    name: parameter
    for name, parameter in parameters.items()
    if name not in hidden and alternatives(parameter.annotation)
  }


# -- checking -----------------------------------------------------------------


class Alternative(NamedTuple):
  """One of the types that an annotation names.

  Attributes:
    kind: a key of `_KINDS`.
    about: what `Annotated` says of it: `Names`, `Range`, `Section`; or None.
    entry: annotation of the entries, of a list; or None.
    line: what the field is, where `Annotated` says that.
  """

  kind: type
  about: Any
  entry: Any
  line: str


def alternatives(annotation: Any) -> list[Alternative]:
  """Returns what an annotation names; nothing where no config can hold it."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  found = []
  for each in typing.get_args(annotation) if union else (annotation,):
    noted = typing.get_origin(each) is Annotated
    plain, *notes = typing.get_args(each) if noted else (each,)
    about = next((n for n in notes if not isinstance(n, str)), None)
    line = next((n for n in notes if isinstance(n, str)), "")
    kind = typing.get_origin(plain) or plain
    if isinstance(about, Section):
      kind = Mapping
    entry = None
    if kind in (Sequence, Iterable):
      kind, entry = Sequence, (*typing.get_args(plain), Any)[0]
    if kind not in _KINDS:
      return []
    found.append(Alternative(kind, about, entry, line))
  return found


def section_of(annotation: Any) -> Section | None:
  """Returns the section that a field may be; None where it may not."""
  found = (each.about for each in alternatives(annotation))
  return next((about for about in found if isinstance(about, Section)), None)


def entry_of(annotation: Any) -> Any:
  """Returns the annotation of a list's entries; None of what is no list."""
  found = (each.entry for each in alternatives(annotation))
  return next((entry for entry in found if entry), None)


def typed(value: Any, annotation: Any, where: str) -> None:
  """Lets no value pass that is not as annotated, where a config holds such.

  That is bool, int, float (an int will do), str, None, sections and lists, and
  a choice of these, as far as `Annotated` says with what is in them.

  Raises:
    ValueError: names the field, its value and what may be in its place.
  """
  each_kind = alternatives(annotation)
  found = next((each for each in each_kind if is_a(value, each.kind)), None)
  if each_kind and found is None:
    raise ValueError(f"{where} is {value!r}; give it as {worded(annotation)}.")
  about, entry = found[1:3] if found else (None, None)
  if isinstance(about, Names):
    known(value, about.known, where)
  elif isinstance(about, Range):
    if not about.least <= value < about.below:
      raise ValueError(f"{where} is {value}; give {about}.")
  elif isinstance(about, Section):
    _check(value, about, where)
  elif entry:
    several = section_of(entry)
    for i, each in enumerate(value):
      typed(each, entry, f"{where}[{i}]" if several else where)
    bounded = any(isinstance(a.about, Range) for a in alternatives(entry))
    if bounded and not value:
      raise ValueError(f"{where} is {value}; give at least one.")


def _check(section: Mapping[str, Any], about: Section, where: str) -> None:
  """Lets no section pass in which a field is unknown, missing or unsound."""
  _, parameters = chosen(about, section, where)
  by_kind = isinstance(about.factory, Mapping)
  values = {n: v for n, v in section.items() if not (by_kind and n == "kind")}
  refuse_unknown(values, parameters, where)
  for name, parameter in parameters.items():
    if name in values:
      typed(values[name], parameter.annotation, f"{where}.{name}")
    elif parameter.default is parameter.empty:
      raise ValueError(f"{where}.{name} is missing; give it a value.")


def refuse_unknown(
  section: Mapping[str, Any], known: Iterable[str], where: str
) -> None:
  """Lets no field pass that nobody reads.

  Raises:
    ValueError: names the field, and the nearest that exists.
  """
  known = list(known)
  for name in section:
    if not known:
      raise ValueError(
        f"{where}.{name} does not exist, nor any other field there; take it"
        " out of the config."
      )
    if name not in known:
      raise ValueError(
        f"{where}.{name} does not exist; the nearest is"
        f" {where}.{nearest(name, known)}."
      )


def known(name: Any, names: Collection[str], where: str) -> str:
  """Returns the name, if it is one of these.

  Raises:
    ValueError: it is not; lists all names, and says which is the nearest.
  """
  if not isinstance(name, str) or name not in names:
    raise ValueError(
      f"{where} is {name!r}; choose one of {', '.join(map(repr, names))}"
      f" (the nearest is {nearest(name, names)!r})."
    )
  return name


def nearest(name: Any, known: Iterable[str]) -> str:
  """Returns which of the names is most like this one."""
  return difflib.get_close_matches(str(name), list(known), 1, 0)[0]


def shown(value: Any) -> str:
  """Returns in a few words what a value is, be it a module or an array."""
  if isinstance(value, type):
    return f"the class {value.__name__}"
  plain = isinstance(value, bool | int | float | str | None)
  return repr(value) if plain else f"of type {type(value).__name__}"


def is_a(value: Any, kind: type) -> bool:
  """Returns whether a value is of a kind that an `Alternative` names."""
  if kind is Mapping:
    return hasattr(value, "keys")
  if kind is Sequence:
    return isinstance(value, (list, tuple))
  # By the type itself: True is an int otherwise.
  return type(value) is kind or (kind is float and type(value) is int)


def worded(annotation: Any, fully: bool = False) -> str:
  """Writes what a field may hold: "int or None".

  Args:
    annotation: of the field.
    fully: whether with names, ranges, and what lists hold.
  """
  return " or ".join(_worded(a, fully) for a in alternatives(annotation))


def _worded(each: Alternative, fully: bool) -> str:
  word, about = _KINDS[each.kind], each.about
  if not fully:
    return word
  if each.entry and alternatives(each.entry):
    return f"{word} of ({worded(each.entry, fully)})"
  if isinstance(about, Names):
    return " | ".join(about.known)
  if isinstance(about, Range):
    return f"{word}, {about}"
  return word


_KINDS = {
  **{kind: kind.__name__ for kind in (bool, int, float, str)},
  types.NoneType: "None",
  Mapping: "dict",
  Sequence: "list",
}
