"""`specx train`: parse, call `specx.training.run`, print."""

from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from specx import output
from specx.adapters.names import locate
from specx.cli_options import debug_option, options_of
from specx.config import LoadConfig
from specx.training.options import ClassicConfig, Eagle3Config, LongSpecConfig, TrainConfig

_LOADED = ("dtype", "device", "trust_remote_code")
_OTHERS = tuple(each.name for each in fields(LoadConfig) if each.name not in _LOADED)


@click.group()
def train() -> None:
    """Train a draft for a target: for targets that have none, or one that ends at 2K.

    \b
    specx train longspec --target DIR --data DIR --out DIR    killed, the same command goes on where it was
    accelerate launch --num_processes 8 -m specx train ...    one process a device; the batch is that of all
    """


def _command(own: Any) -> Callable[[Any], Any]:
    """Give a command what all kinds of training share, and the options of `own`."""
    decorators = (
        debug_option,
        click.option("--target", required=True, metavar="NAME|DIR", help="Known name, directory or hub id."),
        click.option("--data", required=True, metavar="DIR|FILE|NAME", help=_DATA),
        click.option("--out", required=True, metavar="DIR", help="Draft, log, states and encoded text."),
        click.option("--init", metavar="NAME|DIR", help="A draft to go on from."),
        options_of(own),
        options_of(TrainConfig),
        options_of(LoadConfig, without=_OTHERS),
    )

    def decorate(command: Any) -> Any:
        for each in reversed(decorators):
            command = each(command)
        return command

    return decorate


_DATA = 'Text: a folder, a file (.jsonl: "text" or "messages"), stdlib, or a dataset as owner/name:split.'


@train.command()
@_command(LongSpecConfig)
def longspec(**given: Any) -> None:
    """A LongSpec block: short windows teach it far positions, and its own cache never grows."""
    _train("longspec", LongSpecConfig, given)


@train.command()
@_command(Eagle3Config)
def eagle3(**given: Any) -> None:
    """An EAGLE-3 head, by its training-time test."""
    _train("eagle3", Eagle3Config, given)


@train.command()
@_command(ClassicConfig)
def classic(**given: Any) -> None:
    """A small language model on the target's tokenizer, from scratch or distilled."""
    _train("classic", ClassicConfig, given)


def _train(kind: str, own: Any, given: dict[str, Any]) -> None:
    locate(given["target"], "target")
    if given["init"] is not None:
        locate(given["init"], "draft")

    def chosen(config: Any, without: tuple[str, ...] = ()) -> Any:
        names = [each.name for each in fields(config) if each.name not in without]
        return config(**{name: given[name] for name in names if given[name] is not None})

    config, options, load = chosen(TrainConfig), chosen(own), chosen(LoadConfig, _OTHERS)
    if find_spec("accelerate") is None:
        raise click.UsageError("training needs accelerate: pip install accelerate")
    with output.quitting_at_ctrl_c():
        from specx.training.run import Job, train
    out = Path(given["out"]).expanduser()
    train(Job(kind, given["target"], given["data"], out, config, options, given["init"], load))
    click.echo(f"the draft is in {out / 'draft'}: specx run --target {given['target']} --draft {out / 'draft'}")
