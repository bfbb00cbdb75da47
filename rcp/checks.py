"""Checks of arguments: every message names the argument, what was expected, what came, and the nearest valid name."""

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor, strided

# The least that a number may be, wherever a public function has an argument of this name.
LEAST = dict.fromkeys(("count", "k", "b", "m", "n", "draws", "projection", "batch", "side", "size", "patches"), 1)
LEAST |= dict.fromkeys(("seed", "ddof", "blur", "epoch", "seconds"), 0) | {"beta": 1e-9, "looks": 2}
# Of the numbers in a tensor, in size: beyond, float32 has no sums of squares.
LARGEST = 1e17


def nearest(name: str, valid) -> str:
    """`` Did you mean 'x'?`` for the valid name nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def require(name: str, holds: bool, expected: str, value: Any) -> None:
    """Raises ValueError "NAME: expected EXPECTED, got VALUE" where ``holds`` is false."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.400}")


def check_names(what: str, given, valid) -> None:
    """Raises ValueError for the first name given that is not a valid one; names the nearest."""
    for name in given:
        if name not in valid:
            raise ValueError(f"{what} {name!r}.{nearest(name, valid)} Valid: {', '.join(map(str, valid))}")


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
    value = value.item() if isinstance(value, np.generic) else value  # a number that numpy computed
    value = str(value) if kind is str and isinstance(value, Path) else value
    alternatives = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = tuple(get_origin(k) or k for k in alternatives if k is not Any)
    if isinstance(value, list | tuple) and tuple in kinds:
        value = tuple(v.item() if isinstance(v, np.generic) else v for v in value)
    if np.ndarray in kinds and value is not None:
        return _numbers(name, value)
    require(name, not isinstance(value, int) or -(2**63) <= value < 2**64, "a number of 64 bits", value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    items = get_args(kind)[:1] if get_origin(kind) is tuple else ()
    fits = isinstance(value, kinds or object) and (bool in kinds or not isinstance(value, bool))
    if not (fits and all(isinstance(v, items) and not isinstance(v, bool) for v in (value if items else ()))):
        words = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        words = f"a list of {getattr(items[0], '__name__', items[0])}" if items else words
        raise ValueError(f"{name}: expected {words}, got {value!r:.400} ({type(value).__name__})")
    if Path in kinds and isinstance(value, str | Path):
        short = all(len(part.encode(errors="surrogateescape")) < 256 for part in Path(value).parts)
        require(name, short and str(value) and "\0" not in str(value), "a path", value)
    if isinstance(value, Tensor) and Tensor in kinds:
        plain = value.layout is strided and not (value.is_meta or value.requires_grad)
        require(name, plain, "a dense tensor in memory, detached from autograd", (value.shape, value.layout))
        numbers = value.is_floating_point() and bool((value.float().abs() <= LARGEST).all())
        odd = ", some NaN or infinite, or larger" * value.is_floating_point()
        words, found = f"finite floating-point numbers of at most {LARGEST:g}", f"{tuple(value.shape)} of {value.dtype}"
        require(name, numbers or "bool" in str(value.dtype), words, found + odd)
    require(name, not isinstance(value, float) or math.isfinite(value), "a finite number", value)
    return value


def limited(default: Any, about: dict | None = None, *, above=None, least=None, most=2**31 - 1) -> Any:
    """A field of a dataclass whose values are greater than ``above``, at least ``least`` and at most ``most``, by :func:`check_fields`.

    about: further metadata.
    """
    return dataclasses.field(default=default, metadata=(about or {}) | {"above": above, "least": least, "most": most})


def _numbers(name: str, value: Any) -> Any:
    """``value`` as an array, if numpy takes it for numbers, and would not forget that some are masked."""
    require(name, not np.ma.is_masked(value), "an array without masked numbers", value)
    try:
        kind = np.asarray(value).dtype.kind
    except (TypeError, ValueError, RuntimeError):  # lists of different lengths, a tensor of a GPU or of autograd
        kind = ""
    require(name, kind in tuple("biuf"), "an array of numbers", value)
    return np.asanyarray(value)


def checked(function: Callable) -> Callable:
    """The function, each argument that it is called with held against its annotation (:func:`check_type`) and ``LEAST``."""
    kinds, names = get_type_hints(function), list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def called(*args, **given):
        for name, value in (*zip(names, args, strict=False), *given.items()):
            value = check_type(name, kinds.get(name, Any), value)
            if isinstance(value, int | float) and name in LEAST:
                require(name, value >= LEAST[name], f"{LEAST[name]} or more", value)
        return function(*args, **given)

    return called


def guard(owner, *names: str) -> None:
    """Has these functions of a module or class :func:`checked` where users find them: what rcp itself imported before is as it was."""
    for name in names:
        found = vars(owner)[name]
        setattr(owner, name, classmethod(checked(found.__func__)) if isinstance(found, classmethod) else checked(found))


def check_fields(instance) -> None:
    """Puts every field of a frozen dataclass through :func:`check_type`, and its numbers through the limits of :func:`limited`."""
    kinds = get_type_hints(type(instance))
    for f in dataclasses.fields(instance):
        value = check_type(f.name, kinds[f.name], getattr(instance, f.name))
        object.__setattr__(instance, f.name, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            above, least, most = (f.metadata.get(limit) for limit in ("above", "least", "most"))
            require(f.name, above is None or value > above, f"a number above {above}", value)
            require(f.name, least is None or value >= least, f"{least} or more", value)
            require(f.name, most is None or value <= most, f"at most {most}", value)
