"""The files of ``--config``: options of a command as TOML, by their names without the dashes in front.

    epochs = 20
    optimizer = "adamw"
    weight-decay = 0.1

An option that the command line gives takes the place of the file's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastmlp.base.names import did_you_mean

from . import common

#: Parameters that are about one call of the command, and so are no part of a file.
OF_THE_CALL = ("config", "print_config", "resume", "help")
#: The largest file that is read.
MOST = 1 << 20


def config_option(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The callback of ``--config``, which is eager: the file's values become the defaults of the other options."""
    if value is not None:
        ctx.default_map = read_config(Path(value), ctx.command)
    return value


def read_config(path: Path, command: click.Command) -> dict[str, Any]:
    """The values of a file by parameter; UserError for a file that is no TOML, an unknown name or another type."""
    from fastmlp.base.atomic import read_file

    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        content = tomllib.loads(read_file(path, MOST).decode())
    except OSError as error:
        raise common.UserError(f"--config: {error}") from error
    except ValueError as error:
        raise common.UserError(f"--config {path} is not TOML: {error}") from error
    options = {_key(option): option for option in _options(command)}
    values = {}
    for key, value in content.items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            raise common.UserError(
                f"--config {path} has {key!r}, which is no option{did_you_mean(key, options) or '; see --help'}"
            )
        values[str(option.name)] = _checked(path, key, value, option)
    return values


def _options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and p.name not in OF_THE_CALL]


def _key(option: click.Option) -> str:
    """The name of an option without the dashes in front."""
    return max(option.opts, key=len).removeprefix("--")


def _checked(path: Path, key: str, value: Any, option: click.Option) -> Any:
    """The value, if the type is the option's; click checks the rest."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if option.is_flag:
        expected, good = "true or false", isinstance(value, bool)
    elif isinstance(option.type, click.types.IntParamType):
        expected, good = "a whole number", is_number and isinstance(value, int)
    elif isinstance(option.type, common.Sizes):
        if isinstance(value, list) and value and all(isinstance(size, int) for size in value):
            value = "-".join(map(str, value))
        expected, good = 'sizes such as "784-512-512-10" or [784, 512, 512, 10]', isinstance(value, str)
    elif option.multiple:
        expected = "a list of texts in quotes"
        good = isinstance(value, list) and all(isinstance(text, str) for text in value)
    elif option.nargs > 1 or isinstance(option.type, common.Numbers):
        expected = f"a list of {option.nargs} numbers" if option.nargs > 1 else "a list of numbers"
        good = isinstance(value, list) and (option.nargs == 1 or len(value) == option.nargs)
        good = good and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    elif isinstance(option.type, common.Number):
        expected, good = "a number", is_number
    else:
        expected, good = "a text in quotes", isinstance(value, str)
    if not good:
        raise common.UserError(f"--config {path}: expected {key} to be {expected}, got {value!r}")
    return value


def config_text(ctx: click.Context) -> str:
    """The options of a call as a file of ``--config``; those that have no value are comments."""
    lines = [f"# fastmlp {ctx.info_name} --config FILE"]
    for option in _options(ctx.command):
        value = ctx.params[str(option.name)]
        if value is None or value == ():
            lines.append(f"# {_key(option)}")
        else:
            lines.append(f"{_key(option)} = {_toml(value)}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are among TOML's, which also asks for one of the character 0x7f.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def given(ctx: click.Context) -> dict[str, Any]:
    """The options that the command line or the file of ``--config`` gives."""
    sources = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)
    names = [str(option.name) for option in _options(ctx.command)]
    return {name: ctx.params[name] for name in names if ctx.get_parameter_source(name) in sources}
