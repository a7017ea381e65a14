"""How the command line reads what a user typed: plain usage lines, and usage errors in one line like all others."""

import inspect
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from conversion.console.terminal import err, say
from conversion.errors import ConversionError, typed_as


# UsageError of the click inside typer, which typer itself exports only by this subclass.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
# What was typed: the program, the command, its arguments.
command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())
EXPECTED = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}
# In the words of click, by which typer below 0.29 reads values.
CLICK_EXPECTED = {"a valid integer": "a whole number", "a valid float": "a number"}


class PlainCommand(TyperCommand):
    """A command whose help shows SOURCE for `{source}` and no type for a flag, and whose errors name its options."""

    def __init__(self, name: str | None, *, callback: Callable[..., Any], **settings: Any) -> None:
        super().__init__(name, callback=callback, **settings)
        written = inspect.signature(callback).parameters
        for param in self.params:
            # typer below 0.26 loses it to click 8.5, which has a help of its own.
            if param.param_type_name == "argument" and not param.help:  # type: ignore[attr-defined]
                param.help = written[param.name].annotation.__metadata__[0].help  # type: ignore[attr-defined]

    def get_params(self, ctx: Any) -> list[Any]:
        """Returns all parameters, as `--help` is to show them."""
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.param_type_name == "argument" and param.metavar is None:
                param.metavar = param.name.upper()
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the usage line: required arguments plain, others in brackets."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(param.metavar if param.required else f"[{param.metavar}]" for param in arguments)]

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the arguments; whatever goes wrong is said in the words of the command line."""
        with typed_as(self._options(ctx)):
            try:
                return super().parse_args(ctx, args)
            except UnicodeEncodeError as error:  # typer below 0.29 looks for a file of that name
                raise UsageError(f"{error.object!r}: no name of a file ({error.reason})") from error

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; whatever goes wrong is said in the words of the command line."""
        with typed_as(self._options(ctx)):
            return super().invoke(ctx)

    def _options(self, ctx: Any) -> dict[str, str]:
        return {
            param.name: param.metavar if param.param_type_name == "argument" else param.opts[0]
            for param in self.get_params(ctx)
        }


class PlainGroup(TyperGroup):
    """The commands together: without arguments it prints its help, and a usage error is one line and exit code 2."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Returns all parameters, flags without a type."""
        params = super().get_params(ctx)
        for param in params:
            param.metavar = ""
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Remembers what was typed, for messages that name the command that continues."""
        command_line.set((ctx.info_name or "", *args))
        return super().parse_args(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line; exits with its code."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            result = super().main(given or ["--help"], prog_name, standalone_mode=False, **extra)
        except UsageError as error:
            if not standalone_mode:
                raise
            say(f"error: {usage_message(error)}", "red", err)
            result = 2
        except typer.Abort:
            result = 1
        if not standalone_mode:
            return result
        sys.exit(result or 0)


def usage_message(error: Any) -> str:
    """Returns the one line for a usage error: what was typed, what was expected, where help is."""
    where = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
    if not isinstance(error, typer.BadParameter) or error.param is None or not error.message:
        message = " ".join(error.format_message().split()).rstrip(".")
        return message[:1].lower() + message[1:] + where
    message = error.message.removeprefix("Value error, ").rstrip(".")
    cause: Any = error.__cause__
    if hasattr(cause, "errors"):  # pydantic's, by which typer reads values
        fault = cause.errors()[0]
        if expected := EXPECTED.get(fault["type"]):
            message = f"{fault['input']!r} is not {expected}"
    for said, expected in CLICK_EXPECTED.items():
        message = message.replace(f"is not {said}", f"is not {expected}")
    name = error.param.metavar if error.param.param_type_name == "argument" else error.param.opts[0]
    return f"{name}: {message}{where}"


def parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns `parse` for an option of the command line, where bad input is a usage error with the same message."""

    def parse_option(text: str) -> Any:
        try:
            return parse(text)
        except ConversionError as error:
            raise UsageError(str(error)) from error  # of BadParameter, typer would name the option again

    return parse_option
