"""The command line: parse, build configs, call, print. No algorithm, and no torch until a command runs."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import specx
from specx.adapters.names import DRAFTS, TARGETS
from specx.config import CacheConfig, LoadConfig, SamplingConfig, StopConfig, TreeConfig

if TYPE_CHECKING:
    from specx.api import SpeculativeModel
    from specx.decoding import Generation

_GENERATION = (StopConfig, SamplingConfig, CacheConfig, TreeConfig)


def options_of(*configs: Any) -> Callable[[Any], Any]:
    """Give a command one option for every field of the config classes; an option not given stays out of the call."""

    def decorate(command: Any) -> Any:
        for config in reversed(configs):
            for each in reversed(fields(config)):
                command = _option(each)(command)
        return command

    return decorate


def _option(each: Any) -> Callable[[Any], Any]:
    rule, name = each.metadata, "--" + each.name.replace("_", "-")
    default = () if each.default is MISSING else each.default
    shown = "" if default in (None, (), False) else f"  [default: {default}]"
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


class Group(click.Group):
    """Turns the library's errors into Click's: ValueError is a usage error (2), anything else known is runtime (1)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            if "--debug" in sys.argv:
                raise
            raise click.UsageError(str(error)) from error
        except (RuntimeError, OSError, MemoryError) as error:
            if "--debug" in sys.argv or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(str(error) or type(error).__name__) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(specx.__version__, prog_name="specx")
def main() -> None:
    """Speculative decoding that survives long prompts; the target's output is unchanged.

    \b
    specx run                                          the bundled pair on a long file
    specx run --draft vicuna-68m --use-specextend --input report.txt
    specx doctor --target DIR --draft DIR              what would happen, and why
    """


def _model_options(command: Any) -> Any:
    command = click.option("--debug", is_flag=True, help="Show tracebacks.")(command)
    command = options_of(LoadConfig)(command)
    command = click.option(
        "--use-specextend/--no-specextend", "specextend", default=True, show_default=True,
        help="Hybrid tree attention and a bounded draft cache.",
    )(command)  # fmt: skip
    command = click.option("--draft", metavar="NAME|DIR", help="Known name, directory or hub id.")(command)
    return click.option("--target", metavar="NAME|DIR", help="The same; default: the one the draft is for.")(command)


@main.command()
@_model_options
@click.option("--input", "source", metavar="FILE|-", help='Text, or JSONL with a "text" key; - is standard input.')
@click.option("--prompt", metavar="TEXT", help="The prompt itself.")
@click.option("--chat/--no-chat", default=None, help="Chat template. Default: on for --prompt where there is one.")
@click.option("--max-samples", type=click.IntRange(1), help="Read at most this many lines of a JSONL file.")
@options_of(*_GENERATION)
@click.option("--compare", is_flag=True, help="Also decode plainly with the same target and print the ratio.")
@click.option("--stats-json", metavar="FILE", help="Write the figures there: an object, or a list for several samples.")
@click.option("--verbose", is_flag=True, help="Colour drafted and target-chosen tokens; say what the draft kept.")
def run(**given: Any) -> None:
    """Generate text with a target and its draft. Text goes to stdout, everything else to stderr."""
    names = [each.name for config in _GENERATION for each in fields(config)]
    options = {name: given[name] for name in names if given[name] not in (None, ())}
    if given["prompt"] is not None and given["source"] is not None:
        raise click.UsageError("give --prompt or --input, not both")
    if given["prompt"] is not None and not given["prompt"].strip():
        raise click.UsageError("the prompt is empty; give --prompt some text")
    texts = _texts(given)
    if texts is None and {given["target"], given["draft"]} - {None, "demo"}:
        raise click.UsageError("nothing to complete: give --prompt TEXT or --input FILE (- for standard input)")
    with _stats_file(given["stats_json"]) as write_stats:
        model = _load(given, options)
        samples = [_demo(model)] if texts is None else [_encoded(model, text, given) for text in texts]
        results: list[dict[str, Any]] = []
        try:
            for number, sample in enumerate(samples, 1):
                if len(samples) > 1:
                    click.echo(f"[{number}/{len(samples)}]", err=True)
                results.append(_run_one(model, sample, given))
                if results[-1]["finish_reason"] == "interrupted":
                    raise SystemExit(130)
        finally:
            if results:
                write_stats(results[0] if len(samples) == 1 else results)


def _texts(given: dict[str, Any]) -> list[str] | None:
    if given["prompt"] is not None:
        return [given["prompt"]]
    if given["source"] is None:
        return None
    from specx.data.prompts import read_prompts

    return read_prompts(given["source"])[: given["max_samples"]]


def _load(given: dict[str, Any], options: dict[str, Any]) -> "SpeculativeModel":
    from specx.api import load

    wanted = {each.name: given[each.name] for each in fields(LoadConfig) if given[each.name] is not None}
    model = load(given["target"], given["draft"], specextend=given["specextend"], **wanted, **options)
    engine, draft = model.engine, model.draft
    drafting = f"draft {draft.name} (context {draft.draft_context}, {draft.context_source})" if draft else "no draft"
    dtype = str(engine.dtype).removeprefix("torch.")
    click.echo(
        f"target {type(model.target).__name__} {dtype} on {engine.device}, {drafting}; "
        f"attention {engine.backend}: {engine.backend_reason}",
        err=True,
    )
    return model


def _demo(model: "SpeculativeModel") -> list[int]:
    from specx.data.prompts import demo_prompt

    name, ids = demo_prompt(model.tokenizer)
    click.echo(f"completing {name} of the standard library (held out from training) after {len(ids)} tokens", err=True)
    return ids


def _encoded(model: "SpeculativeModel", text: str, given: dict[str, Any]) -> Any:
    template = getattr(model.tokenizer, "chat_template", None)
    chat = given["chat"] if given["chat"] is not None else given["prompt"] is not None and bool(template)
    if not chat:
        return text
    if not template:
        raise click.UsageError("--chat needs a tokenizer with a chat template; this one has none: use --no-chat")
    messages = [{"role": "user", "content": text}]
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return ids["input_ids"]


def _run_one(model: "SpeculativeModel", sample: Any, given: dict[str, Any]) -> dict[str, Any]:
    out, steps = model.start(sample, trace=given["verbose"])
    try:
        for segments in steps:
            for each in segments:
                colour = {"fg": "green" if each.drafted else "blue"} if given["verbose"] else {}
                click.secho(each.text, nl=False, **colour)
    except KeyboardInterrupt:
        steps.close()  # type: ignore[attr-defined]
    click.echo()
    for note in out.notes:
        click.echo(f"note: {note}", err=True)
    if given["verbose"]:
        _say_kept(model, out)
    click.echo(_summary(out), err=True)
    stats = out.stats
    if given["compare"] and out.finish_reason != "interrupted":
        stats["compare"] = _compare(model, sample, out)
    return stats


def _say_kept(model: "SpeculativeModel", out: "Generation") -> None:
    for number, record in enumerate(out.trace or []):
        if record["kept_chunks"] is not None:
            click.echo(f"step {number}: draft cache rebuilt, chunks kept {record['kept_chunks']}", err=True)


def _summary(out: "Generation") -> str:
    stats = out.stats
    speed = (
        f"{stats['decode_tokens_per_second']:.1f} tokens/s" if stats["decode_tokens_per_second"] else "no decode step"
    )
    tau = f"{stats['tau']:.2f}" if stats["tau"] else "-"
    return (
        f"{stats['new_tokens']} tokens after {stats['prompt_tokens']} ({stats['finish_reason']}), {speed}, tau {tau}, "
        f"first token {stats['ttft_seconds']:.2f} s; draft cache {stats['draft_kv_tokens']} tokens "
        f"(policy {stats['policy']})"
    )


def _compare(model: "SpeculativeModel", sample: Any, out: "Generation") -> dict[str, Any]:
    plain = model.generate(sample, plain=True)
    mine, other = out.stats["decode_tokens_per_second"], plain.stats["decode_tokens_per_second"]
    ratio = mine / other if mine and other else None
    same = plain.tokens == out.tokens
    click.echo(
        f"plain decoding of the same target: {other or 0:.1f} tokens/s; ratio {ratio or 0:.2f}; "
        f"output {'identical' if same else 'differs'}",
        err=True,
    )
    return {"plain_decode_tokens_per_second": other, "ratio": ratio, "identical": same}


@contextmanager
def _stats_file(name: str | None) -> Iterator[Callable[[Any], None]]:
    """Make sure before generating that the file can be written; it appears whole or not at all."""
    if name is None:
        yield lambda content: None
        return
    path = Path(name).expanduser()
    if path.is_dir():
        raise click.UsageError(f"--stats-json {name} is a directory; give a file name")
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise click.UsageError(f"--stats-json {name} cannot be written: {error.strerror}") from error

    def write(content: Any) -> None:
        Path(draft).write_text(json.dumps(content, indent=1) + "\n")
        Path(draft).chmod(0o644)
        Path(draft).replace(path)

    try:
        yield write
    finally:
        Path(draft).unlink(missing_ok=True)


@main.command()
def models() -> None:
    """List the names that --target and --draft know."""
    click.echo("drafts")
    for name, known in DRAFTS.items():
        click.echo(f"  {name:<14}{known.repo:<28}{known.kind}, context {known.draft_context}, for {known.target}")
    click.echo("targets")
    for name, repo in TARGETS.items():
        click.echo(f"  {name:<14}{repo}")


@main.command()
@_model_options
def doctor(**given: Any) -> None:
    """Say what would run here and why: versions, device, backend, self-check, tokenizers, draft context, a probe."""
    from specx.doctor import report

    wanted = {each.name: given[each.name] for each in fields(LoadConfig) if given[each.name] is not None}
    healthy = True
    for line, good in report(given["target"], given["draft"], given["specextend"], wanted):
        click.echo(line)
        healthy = healthy and good
    if not healthy:
        raise SystemExit(1)
