"""What the scripts stand on. Nothing here imports a script."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Args = TypeVar("Args")


def fail(message: str) -> None:
    """Ends the program with one line on stderr: for what a user can mend. A bug keeps its traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def nearest(word: str, names: Sequence[str], what: str) -> str:
    """One line for an unknown name: the nearest valid ones, or all of them when none is near."""
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
    if close:
        return f"unknown {what} {word!r}; did you mean {', '.join(close)}?"
    return f"unknown {what} {word!r}; valid: {', '.join(names)}"


def parse(presets: dict[str, Args], arguments: list[str], doc: str) -> Args:
    """The flags of a script: a preset's dataclass, changed by the arguments. The first one may go unnamed."""
    import tyro

    preset = next(iter(presets.values()))
    if arguments and arguments[0] in presets:
        preset, arguments = presets[arguments[0]], arguments[1:]
    program = f"{Path(sys.argv[0]).name} [{'|'.join(presets)}]"
    return tyro.cli(type(preset), default=preset, args=arguments, description=doc, prog=program)


def at_least(bound: float, args: object, *names: str) -> None:
    """Refuses flags below a bound, of a tuple each value; nan is below any, and so is an empty tuple."""
    for name in names:
        value = getattr(args, name)
        if isinstance(value, tuple):
            value = min(value, default=float("nan"))
        if not value >= bound:
            fail(f"--{name.replace('_', '-')} must be at least {bound}")


def differences(there: dict, here: dict) -> str:
    """What a folder's stored values have otherwise than those of this command; empty if they agree."""
    changed = [key for key in here if there.get(key) != here[key]]
    return "; ".join(f"{key}: {there.get(key)} there, {here[key]} here" for key in changed)
