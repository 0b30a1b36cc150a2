"""The command line: parse, build configs, call, print. No algorithm, and no torch until a command runs."""

import sys
import traceback
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

import specx
from specx import cli_ranks, output
from specx.adapters.names import DRAFTS, TARGETS, locate
from specx.cli_bench import bench
from specx.cli_controller import controller
from specx.cli_eval import evaluate
from specx.cli_options import DEBUG, GENERATION, model_options, options_of
from specx.cli_report import report as report_command
from specx.cli_retrofit import retrofit_check
from specx.cli_train import train
from specx.cli_tune import tune
from specx.config import LoadConfig

if TYPE_CHECKING:
    from specx.api import Prompt, SpeculativeModel
    from specx.ranks import Ranks


class Group(click.Group):
    """Turns the library's errors into Click's: ValueError is a usage error (2), anything else a runtime error (1)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # Click's own; it also ends quietly where the reader of a pipe has gone
        except output.Terminated:
            click.echo("terminated", err=True)
            ctx.exit(output.TERMINATED)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(output.INTERRUPTED)
        except Exception as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            raise _as_click(error) from error


def _as_click(error: Exception) -> click.ClickException:
    if isinstance(error, ValueError):
        return click.UsageError(str(error))
    if isinstance(error, RuntimeError | OSError) and str(error):
        return click.ClickException(str(error))
    if isinstance(error, MemoryError):
        return click.ClickException("out of memory")
    return click.ClickException(f"unexpected {type(error).__name__}: {error}; --debug shows where")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(specx.__version__, prog_name="specx")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Speculative decoding that survives long prompts; the target's output is unchanged.

    \b
    specx run                                          the bundled pair on a long file
    specx run --draft vicuna-68m --use-specextend --input report.txt
    specx doctor --target DIR --draft DIR              what would happen, and why
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, to their developers; specx has none
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end a generation
    cli_ranks.begin(ctx.invoked_subcommand)


@main.command()
@model_options
@click.option("--input", "source", metavar="FILE|-", help='Text, or JSONL with a "text" key; - is standard input.')
@click.option("--prompt", metavar="TEXT", help="The prompt itself.")
@click.option("--chat/--no-chat", default=None, help="Chat template. Default: on for --prompt where there is one.")
@click.option("--max-samples", type=click.IntRange(1), help="Read at most this many lines of a JSONL file.")
@options_of(*GENERATION)
@click.option("--compare", is_flag=True, help="Also decode plainly with the same target and print the ratio.")
@click.option("--stats-json", metavar="FILE", help="Write the figures there: an object, or a list for several samples.")
@click.option(
    "--verbose",
    is_flag=True,
    help="Colour tokens by who proposed them: draft (green), context (yellow), both (cyan), target (blue); say where "
    "each came from and what the draft kept.",
)
@click.option("--explain", is_flag=True, help="Say what the controller turned to, and why.")
def run(**given: Any) -> None:
    """Generate text with a target and its draft. Text goes to stdout, everything else to stderr.

    \b
    torchrun --nproc-per-node 2 -m specx run ...    the target's layers are split over the processes
    """
    first = cli_ranks.leads()
    texts = _texts(given) if first else None
    if first and given["stats_json"] is not None:
        output.check_writable(given["stats_json"])
    with cli_ranks.joined() as ranks:
        with output.quitting_at_ctrl_c():
            model = _load(given, ranks)
        if not first:
            return cli_ranks.follow(model)
        samples: list[Prompt] = [_demo(model)] if texts is None else [_encoded(model, text, given) for text in texts]
        _generate_all(model, samples, given)


def _texts(given: dict[str, Any]) -> list[str] | None:
    """Read what is to be completed, None for the demonstration; find mistakes before torch is imported."""
    for role in ("target", "draft"):
        if given[role] is not None:
            locate(given[role], role)
    prompt, source = given["prompt"], given["source"]
    if prompt is not None and source is not None:
        raise click.UsageError("give --prompt or --input, not both")
    from specx.data.prompts import check_text, read_prompts

    if prompt is not None:
        return [check_text(prompt, "the prompt")]
    if source is not None:
        return read_prompts(source, given["max_samples"])
    bundled = {name for name, known in DRAFTS.items() if known.target == "demo"}
    if not {given["target"], given["draft"]} <= {None, "demo", *bundled} or given["chat"]:
        raise click.UsageError("nothing to complete: give --prompt TEXT or --input FILE (- for standard input)")
    return None


def _load(given: dict[str, Any], ranks: "Ranks | None" = None) -> "SpeculativeModel":
    from specx.api import load

    asked = [given[role] for role in ("target", "draft") if given[role] is not None]
    click.echo(f"loading {' and '.join(asked) or 'the bundled pair'}", err=True)
    names = [each.name for config in (LoadConfig, *GENERATION) for each in fields(config)]
    options = {name: given[name] for name in names if given[name] not in (None, ())}
    model = load(given["target"], given["draft"], specextend=given["specextend"], ranks=ranks, **options)
    if model.tokenizer is None:
        raise click.UsageError(f"target {given['target']} has no tokenizer files; save its tokenizer in that directory")
    engine, draft = model.engine, model.draft
    drafting = f"draft {draft.name} (context {draft.draft_context}, {draft.context_source})" if draft else "no draft"
    dtype = str(engine.dtype).removeprefix("torch.")
    split = f" in {ranks.size} processes" if ranks else ""
    click.echo(
        f"target {type(model.target).__name__} {dtype} on {engine.device}{split}, {drafting}; "
        f"attention {engine.backend}: {engine.backend_reason}",
        err=True,
    )
    return model


def _demo(model: "SpeculativeModel") -> list[int]:
    from specx.data.prompts import demo_prompt

    name, ids = demo_prompt(model.tokenizer)
    click.echo(f"completing {name} of the standard library (held out from training) after {len(ids)} tokens", err=True)
    return ids


def _encoded(model: "SpeculativeModel", text: str, given: dict[str, Any]) -> "Prompt":
    from specx.data.prompts import chat_ids

    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    chat = given["chat"] if given["chat"] is not None else given["prompt"] is not None and has_template
    return chat_ids(model.tokenizer, text) if chat else text


def _generate_all(model: "SpeculativeModel", samples: "list[Prompt]", given: dict[str, Any]) -> None:
    """Check every sample, then generate them in order; the figures of what was done are written whatever happens."""
    checked, many = [], len(samples) > 1
    for number, sample in enumerate(samples, 1):
        try:
            checked.append(model.start(sample, trace=given["verbose"], explain=given["explain"]))
        except ValueError as error:
            raise ValueError(f"sample {number} of {len(samples)}: {error}" if many else str(error)) from error
    results: list[dict[str, Any]] = []
    try:
        for number, (out, steps) in enumerate(checked, 1):
            if many:
                click.echo(f"[{number}/{len(samples)}]", err=True)
            try:
                interrupted = output.stream(steps, given["verbose"])
            except Exception:
                results += [out.stats] if out.tokens else []
                raise
            results.append(out.stats)
            output.report(out, given["verbose"])
            if interrupted:
                click.get_current_context().exit(output.INTERRUPTED)
            if given["compare"]:
                plain = model.generate(samples[number - 1], plain=True)
                results[-1]["compare"] = output.compare(out, plain, model.settings.sampling.temperature == 0)
    finally:
        if results and given["stats_json"] is not None:
            output.write_json(given["stats_json"], results if many else results[0])


@main.command()
def models() -> None:
    """List the names that --target and --draft know."""
    click.echo("drafts")
    for name, known in DRAFTS.items():
        if known.kind == "lookup":
            click.echo(f"  {name:<29}{'(no model: the context itself)':<45}for every target, by default {known.target}")
            continue
        repo = known.repo if "/" in known.repo else "(bundled)"
        context = known.draft_context or "by its config"
        click.echo(f"  {name:<29}{repo:<45}{known.kind}, context {context}, for {known.target}")
    click.echo("targets")
    for name, repo in TARGETS.items():
        click.echo(f"  {name:<29}{repo if '/' in repo else '(bundled)'}")


main.add_command(evaluate)
main.add_command(report_command)
main.add_command(bench)
bench.add_command(controller)
main.add_command(retrofit_check)
main.add_command(tune)
main.add_command(train)


@main.command()
@model_options
def doctor(**given: Any) -> None:
    """Say what would run here and why: versions, device, backend, self-check, tokenizers, draft context, a probe."""
    healthy = True
    with output.quitting_at_ctrl_c():
        from specx.doctor import report

        wanted = {each.name: given[each.name] for each in fields(LoadConfig) if given[each.name] is not None}
        for line, good in report(given["target"], given["draft"], given["specextend"], wanted):
            click.echo(line)
            healthy = healthy and good
    if not healthy:
        raise SystemExit(1)
