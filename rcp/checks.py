"""Checks of arguments: every message names the argument, what was expected, what came, and the nearest valid name."""

import dataclasses
import difflib
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints


def nearest(name: str, valid) -> str:
    """`` Did you mean 'x'?`` for the valid name nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def require(name: str, holds: bool, expected: str, value: Any) -> None:
    """Raises ValueError "NAME: expected EXPECTED, got VALUE" where ``holds`` is false."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_names(what: str, given, valid) -> None:
    """Raises ValueError for the first name given that is not a valid one; names the nearest."""
    for name in given:
        if name not in valid:
            raise ValueError(f"{what} {name!r}.{nearest(name, valid)} Valid: {', '.join(map(str, valid))}")


def drop_fixed(values: dict, fixed: dict[str, tuple[Any, str]], of: str = "") -> None:
    """Takes what is no option any more out of ``values``. fixed: name -> (the only value, why).

    Raises:
        ValueError: one that has another value; says why it is no option. of: before its name.
    """
    for name in [n for n in values if n in fixed]:
        (value, why), given = fixed[name], values.pop(name)
        require(f"{of}{name}", given == value, f"{value!r}, for it is no option: {why}", given)


def check_type(name: str, kind: Any, value: Any) -> Any:
    """``value`` if it fits the annotation ``kind`` (a whole number becomes a float where one is meant, a list a tuple).

    Raises:
        ValueError: names the argument, what was expected, what came, and the nearest choice.
    """
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            words = ", ".join(map(repr, choices))
            raise ValueError(f"{name}: expected one of {words}, got {value!r}.{nearest(value, choices)}")
        return value
    value = tuple(value) if isinstance(value, list) else value
    kinds = (tuple,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    items = get_args(kind)[:1] if get_origin(kind) is tuple else ()
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if items and fits:
        fits = all(isinstance(v, items) and not isinstance(v, bool) for v in value)
    if not fits:
        words = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        words = f"a list of {items[0].__name__}" if items else words
        raise ValueError(f"{name}: expected {words}, got {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


LIMITS = ("above", "least", "most")


def limited(default: Any, about: dict | None = None, **limits: float) -> Any:
    """A field of a dataclass whose values are greater than ``above``, at least ``least`` and at most ``most``, by :func:`check_fields`.

    about: further metadata.
    """
    check_names("unknown limit", limits, LIMITS)
    return dataclasses.field(default=default, metadata=(about or {}) | limits)


def check_fields(instance) -> None:
    """Puts every field of a frozen dataclass through :func:`check_type`, and its numbers through the limits of :func:`limited`."""
    kinds = get_type_hints(type(instance))
    for f in dataclasses.fields(instance):
        value = check_type(f.name, kinds[f.name], getattr(instance, f.name))
        object.__setattr__(instance, f.name, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            above, least, most = (f.metadata.get(limit) for limit in LIMITS)
            require(f.name, above is None or value > above, f"a number above {above}", value)
            require(f.name, least is None or value >= least, f"{least} or more", value)
            require(f.name, most is None or value <= most, f"at most {most}", value)
