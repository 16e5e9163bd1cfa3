"""Plain values to dataclasses: every key and every value is checked against the dataclass's annotations.

An error names the key, the value that was given, the value that is wanted and the nearest known key. ``config`` has the
dataclasses of a model, ``train.config`` those of a training run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A configuration that is refused. The message says what was given, what was wanted and what to do."""


@contextlib.contextmanager
def config_errors(where: str, more: str = "") -> Iterator[None]:
    """Turns a ValueError or an OSError of the block into a ConfigError: ``where``, the error, and ``more``."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}{more}") from error


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, for ``Annotated``. ``least`` and ``most`` are allowed themselves, the other two are not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def refusal(self, value: float) -> str | None:
        """Which numbers are wanted, if the value is out of range."""
        if value < self.least:
            return f"at least {self.least} wanted"
        if value > self.most:
            return f"at most {self.most} wanted"
        if value <= self.above:
            return f"a number above {self.above} wanted"
        return f"a number below {self.below} wanted" if value >= self.below else None


Count = Annotated[int, Range(1)]
Frames = Annotated[int, Range(1, 1024)]  # T of a view
Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]


def check(config: Any, where: str = "") -> None:
    """Checks the fields of a dataclass in its ``__post_init__`` and puts converted values in their place.

    Raises:
        ConfigError: for a value of a wrong type or out of range.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in _check_keys((type(config),), values, where).items():
        object.__setattr__(config, name, value)


def build(cls: Any, values: Any, where: str = "") -> Any:
    """A dataclass from plain values. Missing keys take their defaults.

    A field whose metadata has ``keys_of``, another dataclass, takes all keys that are not fields, as a dict. They are
    checked against that dataclass and not completed.

    Raises:
        ConfigError: for an unknown key, and for a value of a wrong type or out of range.
    """
    values = _mapping(values, where)
    fields = dataclasses.fields(cls)
    own = {field.name for field in fields if "keys_of" not in field.metadata}
    given: dict[str, Any] = {}
    for field in fields:
        if "keys_of" in field.metadata:
            extra = {key: values.pop(key) for key in list(values) if key not in own}
            given[field.name] = _check_keys((field.metadata["keys_of"],), extra, where, partial=True, also=own)
    return cls(**given, **_check_keys((cls,), values, where))


def _check_keys(
    classes: tuple[Any, ...], values: Any, where: str, *, partial: bool = False, also: Collection[str] = ()
) -> dict[str, Any]:
    """The values as the annotations of a dataclass want them, or those of several of which one is meant.

    ``partial``: nested dataclasses stay dicts of the given keys. ``also``: keys that the hint of an unknown key may
    name, too.
    """
    hints = {name: hint for cls in classes for name, hint in _hints(cls).items()}
    found = {}
    for key, value in _mapping(values, where).items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            known = [*hints, *also]
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{name}: unknown key; {hint}")
        nested = typing.get_args(hints[key]) or (hints[key],)
        if partial and all(map(dataclasses.is_dataclass, nested)):
            found[key] = _check_keys(nested, value, name, partial=True)
        else:
            found[key] = _convert(value, hints[key], name)
    return found


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    annotations = typing.get_type_hints(cls, include_extras=True)
    return {field.name: annotations[field.name] for field in dataclasses.fields(cls)}


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {reprlib.repr(values)}; keys and values wanted")
    return dict(values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """The value as the annotation wants it. Whole numbers pass as floats and lists as tuples; nothing else is bent."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    nested = [kind for kind in inner or (hint,) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    if nested:
        return value if isinstance(value, tuple(nested)) else build(nested[0], value, name)
    if origin is Annotated:
        value = _convert(value, inner[0], name)
        for bounds in inner[1:]:
            if refusal := bounds.refusal(value):
                raise ConfigError(f"{name} is {reprlib.repr(value)}; {refusal}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = (part for part in inner if part is not type(None))
        try:
            return _convert(value, hint, name)
        except ConfigError as error:
            raise ConfigError(f"{error}, or null") from error
    shown = reprlib.repr(value)
    if origin is dict:
        return {key: _convert(item, inner[1], f"{name}.{key}") for key, item in _mapping(value, name).items()}
    if origin is Literal:
        if value in inner and type(value) in {type(each) for each in inner}:
            return value
        names = [str(each) for each in inner]
        near = difflib.get_close_matches(shown.strip("'"), names, 1)
        raise ConfigError(
            f"{name} is {shown}; one of {', '.join(names)} wanted" + (f" (near: {near[0]})" if near else "")
        )
    if origin is tuple:
        many = len(inner) == 2 and inner[1] is Ellipsis
        if isinstance(value, (list, tuple)) and (many or len(value) == len(inner)):
            kinds = [inner[0]] * len(value) if many else inner
            return tuple(_convert(item, kind, name) for item, kind in zip(value, kinds, strict=True))
        raise ConfigError(f"{name} is {shown}; a list of {'' if many else f'{len(inner)} '}numbers wanted")
    if hint is float and not isinstance(value, bool):
        if isinstance(value, (int, float, str)):  # YAML 1.1 reads 8e-6, which has no point, as a string
            with contextlib.suppress(ValueError, OverflowError):
                if math.isfinite(number := float(value)):
                    return number
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a string"}
    raise ConfigError(f"{name} is {shown} ({type(value).__name__}); {wanted.get(hint, hint)} wanted")
