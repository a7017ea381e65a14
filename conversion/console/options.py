"""Commands whose options are the fields of a config, so that each is written down once."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from conversion.console.display import one_line_errors
from conversion.console.usage import parsed


def with_options(**config_classes: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function that takes configs: one option for each of their fields but those of Python alone.

    The options stand between the function's arguments and its own options. A config that is refused ends the command
    in one line.

    Args:
        config_classes: By the name of the function's parameter, dataclasses whose fields are made by `option`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.name not in config_classes
        ]
        options = {name: options_of(config_class) for name, config_class in config_classes.items()}

        @wraps(function)
        def command(**values: Any) -> None:
            configs = {}
            with one_line_errors(values.get("verbose", False)):
                for name, config_class in config_classes.items():
                    configs[name] = config_class(**{option.name: values.pop(option.name) for option in options[name]})
                _hide_loading_bars()
            function(**configs, **values)

        required = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
        optional = [parameter for parameter in own if parameter.default is not inspect.Parameter.empty]
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*required, *chain.from_iterable(options.values()), *optional)
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def options_of(config_class: type) -> list[inspect.Parameter]:
    """Returns the options that the fields of a config make, in their order, as typer reads them."""
    hints = get_type_hints(config_class)
    return [
        _parameter(field, hints[field.name])
        for field in fields(config_class)
        if not field.metadata.get("python_only", False)
    ]


def _parameter(field: Field, hint: Any) -> inspect.Parameter:
    metadata = field.metadata
    flag = metadata.get("flag")
    shown: dict[str, Any] = {"help": metadata["help"], "metavar": metadata.get("metavar"), "case_sensitive": False}
    if parse := metadata.get("parse"):
        shown["parser"] = parsed(parse)
        hint = Any
    else:
        hint = _typed_once(hint)
    if hint is bool and flag is None and field.default is False:
        flag = f"--{field.name.replace('_', '-')}"  # not --no-..., which would say nothing
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, typer.Option(*([flag] if flag else []), **shown)],
    )


def _typed_once(hint: Any) -> Any:
    """Returns a type as the command line has it: what may be a text or a path from Python is a path there."""
    return Path | None if Path in get_args(hint) else hint


def _hide_loading_bars() -> None:
    """Hides bars of transformers. Called once the config is known to be good, as the import takes seconds."""
    from transformers.utils import logging

    logging.disable_progress_bar()
