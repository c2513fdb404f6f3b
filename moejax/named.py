"""Objects by name: checked calls with the fields of a section of a config."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def choose(
  table: Mapping[str, Callable[..., Any]],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls the entry that the section's `kind` names with its other fields."""
  fields = dict(section)
  kind = fields.pop("kind", "")
  return make(
    table[known(kind, table, f"{where}.kind")], fields, where, **given
  )


def make(
  factory: Callable[..., Any],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls `factory` with a section's fields, checked by name and type."""
  parameters = inspect.signature(factory).parameters
  # Every linen module also takes these two; a config has no use for them.
  hidden = {"parent", "name", *given}
  fields = [name for name in parameters if name not in hidden]
  refuse_unknown(section, fields, where)
  for name in fields:
    needed = parameters[name].default is inspect.Parameter.empty
    if needed and name not in section:
      raise ValueError(f"{where}.{name} is missing; give it a value.")
    if name in section:
      typed(section[name], parameters[name].annotation, f"{where}.{name}")
  return factory(**section, **given)


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
        f" {where}.{_nearest(name, known)}."
      )


def known(name: Any, table: Mapping[str, Any], where: str) -> str:
  """Returns the name, if the table has it.

  Raises:
    ValueError: it has not; lists all names, and says which is the nearest.
  """
  if not isinstance(name, str) or name not in table:
    raise ValueError(
      f"{where} is {name!r}; choose one of {', '.join(map(repr, table))}"
      f" (the nearest is {_nearest(name, table)!r})."
    )
  return name


def sizes(where: str, **fields: Any) -> None:
  """Lets no size pass that is not 1 or more; None is no size.

  Raises:
    ValueError: names the field and its value.
  """
  for name, value in fields.items():
    several = isinstance(value, (list, tuple))
    for size in value if several else (value,):
      typed(size, int | None, f"{where}.{name}")
      if size is not None and size < 1:
        raise ValueError(f"{where}.{name} is {value}; give 1 or more.")
    if several and not value:
      raise ValueError(f"{where}.{name} is {value}; give at least one.")


def shown(value: Any) -> str:
  """Returns in a few words what a value is, be it a module or an array."""
  if isinstance(value, type):
    return f"the class {value.__name__}"
  plain = isinstance(value, bool | int | float | str | None)
  return repr(value) if plain else f"of type {type(value).__name__}"


def typed(value: Any, annotation: Any, where: str) -> None:
  """Lets no value pass of another type than annotated, where a file holds such.

  That is bool, int, float (an int will do), str, None, sections and lists, and
  a choice of these; what sections and lists hold is not looked at.

  Raises:
    ValueError: names the field, its value and the type.
  """
  union = isinstance(annotation, types.UnionType)
  each = typing.get_args(annotation) if union else (annotation,)
  kinds = [typing.get_origin(kind) or kind for kind in each]
  plain = all(kind in _KINDS for kind in kinds)
  if plain and not any(_is(value, kind) for kind in kinds):
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    raise ValueError(f"{where} is {value!r}; give it as {wanted}.")


def _is(value: Any, kind: type) -> bool:
  if kind is Mapping:
    return hasattr(value, "keys")
  if kind in (Sequence, Iterable):
    return isinstance(value, (list, tuple))
  # By the type itself: True is an int otherwise.
  return type(value) is kind or (kind is float and type(value) is int)


_KINDS = {
  **{kind: kind.__name__ for kind in (bool, int, float, str)},
  types.NoneType: "None",
  Mapping: "dict",
  Sequence: "list",
  Iterable: "list",
}


def _nearest(name: Any, known: Iterable[str]) -> str:
  return difflib.get_close_matches(str(name), list(known), 1, 0)[0]
