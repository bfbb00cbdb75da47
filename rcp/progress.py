"""A bar where a person waits."""

import os
import sys
from collections.abc import Callable, Iterable

Log = Callable[[str], None]  # what receives a line: print, or what else


def say(line: str) -> None:
    """Prints a line; of what the stream cannot write, such as ω in Latin-1, the number."""
    try:
        print(line)
    except UnicodeEncodeError:
        print(line.encode("ascii", "backslashreplace").decode())


def progress(items: Iterable, what: str) -> Iterable:
    """The items, with a bar after two seconds on a terminal or in a live notebook; ``TQDM_DISABLE=1`` turns it off, as a batch does."""
    from tqdm.auto import tqdm

    by_terminal = {} if "ipykernel" in sys.modules or "TQDM_DISABLE" in os.environ else {"disable": None}
    return tqdm(items, desc=what, delay=2, leave=False, **by_terminal)
