"""Command-line flags from a dataclass of settings: names, types, ranges and help stand in one place, the dataclass.

And how a script ends where the user has to do something first: `UserError`, `one_sentence`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import itertools
import types
import typing
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something that the user can put right; the message is one sentence for them."""


def one_sentence(main: Callable) -> Callable:
    """A script's main that ends with that sentence, or with the one about a file that cannot be read or written, not with a traceback."""

    @functools.wraps(main)
    def ended(*args: Any, **more: Any) -> Any:
        try:
            return main(*args, **more)
        except (UserError, OSError) as error:
            raise SystemExit(str(error)) from None

    return ended


# A value on the command line that means None: "not set, the recipe decides".
NONE = "none"


def Option(default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its help text and its range (both ends included) or its choices."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without forty of usage, and which flag may have been meant."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> typing.NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = [word for word in message.split() if word.startswith("--")] if message.startswith("unrecognized") else []
        near = [f"{word}: did you mean {found[0]}?" for word in wrong if (found := difflib.get_close_matches(word, known, 1))]
        self.exit(2, f"{self.prog}: {'; '.join([message, *near])} (--help lists all flags)\n")


def parse_grid(settings_class: type, description: str, argv: list[str] | None = None) -> list[Any]:
    """Parses flags into settings; a flag with several values makes a grid: one settings object per combination.

    The last flag's values vary fastest. A wrong flag or value ends the program with a sentence naming flag and range.
    """
    parser = Parser(description)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        default = NONE if field.default is None else field.default
        parser.add_argument(
            f"--{field.name}", nargs="+", default=None, metavar=field.name.upper(), type=_reader(field, hints[field.name]),
            help=f"{field.metadata['help']} [{_expected(field, hints[field.name])}; default {default}]".replace("%", "%%"),
        )  # fmt: skip
    given = {name: values for name, values in vars(parser.parse_args(argv)).items() if values is not None}
    return [settings_class(**dict(zip(given, values))) for values in itertools.product(*given.values())]


def _kind(hint: Any) -> tuple[type, bool]:
    """The plain type of a hint, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), True
    return hint, False


def _expected(field: dataclasses.Field, hint: Any) -> str:
    kind, optional = _kind(hint)
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        text = ", ".join(choices)
    elif kind is bool:
        text = "true or false"
    elif kind is str:
        text = "text"
    else:
        text = {int: "an integer", float: "a number"}[kind]
        text += f" from {low} to {high}" if None not in (low, high) else f" of at least {low}" if low is not None else ""
    return f"{text}, or {NONE}" if optional else text


def _reader(field: dataclasses.Field, hint: Any):
    kind, optional = _kind(hint)
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))

    def read(text: str) -> Any:
        try:
            if optional and text.lower() == NONE:
                return None
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            if choices and value not in choices:
                raise ValueError
            if kind in (int, float) and not (-float("inf") if low is None else low) <= value <= (float("inf") if high is None else high):
                raise ValueError
            if value == float("inf"):
                raise ValueError
            return value
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"must be {_expected(field, hint)}, got {text!r}") from None

    return read
