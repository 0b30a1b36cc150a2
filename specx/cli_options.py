"""Command line options, generated from the fields of `specx.config`."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import click

from specx.config import CacheConfig, LoadConfig, RoundConfig, SamplingConfig, StopConfig, TreeConfig

GENERATION = (StopConfig, SamplingConfig, RoundConfig, CacheConfig, TreeConfig)
DEBUG = "specx.debug"
SPECEXTEND = "Hybrid tree attention, flash prefill and a bounded draft cache."


def options_of(*configs: Any, without: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Give a command one option for every field of the config classes; an option not given stays out of the call.

    Args:
        without: Fields that the command does not offer.
    """

    def decorate(command: Any) -> Any:
        for config in reversed(configs):
            for each in reversed(fields(config)):
                if each.name not in without:
                    command = _option(each)(command)
        return command

    return decorate


def _option(each: Any) -> Callable[[Any], Any]:
    rule, name = each.metadata, "--" + each.name.replace("_", "-")
    default = () if each.default is MISSING else each.default
    shown = "" if default is None or default is False else f"  [default: {default}]"
    if "bool | None" in str(each.type):
        return click.option(f"{name}/--no{name[1:]}", default=None, help=rule["help"])
    if each.type in (bool, "bool"):
        return click.option(name, is_flag=True, help=rule["help"])
    if default == ():
        return click.option(name, multiple=True, metavar="TEXT", help=rule["help"])
    kind: Any = str
    if rule.get("choices"):
        kind = click.Choice(rule["choices"])
    elif isinstance(rule.get("low"), int):
        kind = click.IntRange(rule["low"], rule["high"])
    elif rule.get("low") is not None:
        kind = click.FloatRange(rule["low"], rule["high"])
    return click.option(name, type=kind, default=None, help=rule["help"] + shown)


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value


debug_option = click.option(
    "--debug", is_flag=True, is_eager=True, expose_value=False, callback=_set_debug, help="Show tracebacks."
)


def model_options(command: Any) -> Any:
    for decorate in (
        debug_option,
        options_of(LoadConfig),
        click.option(
            "--use-specextend/--no-specextend", "specextend", default=True, show_default=True, help=SPECEXTEND
        ),
        click.option("--draft", metavar="NAME|DIR", help="The same. With --target alone: plain decoding."),
        click.option("--target", metavar="NAME|DIR", help="Known name, directory or hub id; default: the draft's."),
    ):
        command = decorate(command)
    return command
