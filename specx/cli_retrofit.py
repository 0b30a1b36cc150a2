"""`specx retrofit-check`: parse, call `specx.retrofit_check`, print."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specx import output
from specx.adapters.names import locate
from specx.cli_options import debug_option, options_of
from specx.config import CacheConfig, RoundConfig, TreeConfig

if TYPE_CHECKING:
    from specx.retrofit_check import Way


@click.command("retrofit-check")
@debug_option
@click.option("--target", required=True, metavar="NAME|DIR", help="A Llama that eagle-llm loads.")
@click.option("--head", required=True, metavar="NAME|DIR", help="An EAGLE-1 head with its pytorch_model.bin.")
@click.option("--prompt", metavar="TEXT", help="Default: a long file of the standard library.")
@click.option("--input", "source", metavar="FILE|-", help="The prompt from a file; - is standard input.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens to generate.")
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of both models. Default: the checkpoint's."
)
@click.option("--fix-rope", is_flag=True, help="Let eagle-llm follow the target's rope_theta, which it ignores.")
@click.option("--use-specextend/--no-specextend", "specextend", default=True, show_default=True, help="As for run.")
@options_of(CacheConfig, TreeConfig, RoundConfig)
def retrofit_check(**given: Any) -> None:
    """Run a prompt through eagle-llm as it is and retrofitted, and say what changes: output, tau, speed, memory.

    Greedy decoding. Where the outputs differ, transformers' own decoding says which one is the target's. The exit
    status is 1 if specx fails, or gives another output in float32.
    """
    if given["prompt"] is not None and given["source"] is not None:
        raise click.UsageError("give --prompt or --input, not both")
    places = {"target": locate(given["target"], "target"), "head": locate(given["head"], "draft")}
    text = _text(given)
    with output.quitting_at_ctrl_c():
        from specx.retrofit_check import run_both

        job, tokenizer = _job(given, places, text)
        click.echo(f"{len(job['ids'])} tokens of prompt; running eagle-llm, then the retrofitted model", err=True)
        own, ours = run_both(job)
    _print(own, ours, tokenizer)
    if ours.failed or (ours.exact and ours.tokens != ours.plain):
        raise SystemExit(1)


def _text(given: dict[str, Any]) -> str | None:
    from specx.data.prompts import check_text, read_prompts

    if given["prompt"] is not None:
        return check_text(given["prompt"], "the prompt")
    return read_prompts(given["source"], 1)[0] if given["source"] is not None else None


def _job(given: dict[str, Any], places: dict[str, str], text: str | None) -> tuple[dict[str, Any], Any]:
    from specx.adapters.checkpoints import check_device, check_files, default_device, load_tokenizer
    from specx.adapters.eagle_llm import INSTALL, installed
    from specx.adapters.hub import fetch
    from specx.data.prompts import demo_prompt

    if not installed():
        raise RuntimeError(f"eagle-llm is not installed: {INSTALL}")
    device = given["device"] or default_device()
    check_device(device)
    target, head = fetch(places["target"], "target"), fetch(places["head"], "draft")
    check_files(target, "target")
    check_files(head, "draft")
    if not (Path(head) / "pytorch_model.bin").is_file():
        raise RuntimeError(f"draft directory {head} has no pytorch_model.bin, the only file that eagle-llm reads")
    tokenizer = load_tokenizer(target)
    if tokenizer is None:
        raise ValueError(f"target {given['target']} has no tokenizer files; save its tokenizer in that directory")
    ids = demo_prompt(tokenizer, 512)[1] if text is None else tokenizer(text, verbose=False)["input_ids"]
    names = [each.name for config in (CacheConfig, TreeConfig, RoundConfig) for each in fields(config)]
    options = {name: given[name] for name in names if given[name] is not None}
    rest = {"new": given["max_new_tokens"], "dtype": given["dtype"], "specextend": given["specextend"]}
    rest["fix_rope"] = given["fix_rope"]
    return {"target": target, "head": head, "ids": ids, "device": device, "options": options, **rest}, tokenizer


def _print(own: "Way", ours: "Way", tokenizer: Any) -> None:
    """Write the table, then what explains it."""
    from specx.retrofit_check import first_difference

    def row(name: str, one: str, two: str) -> None:
        click.echo(f"{name:<16}{one:<24}{two}")

    def figures(name: str, form: str, one: float | None, two: float | None) -> None:
        row(name, *("-" if each is None else form.format(each) for each in (one, two)))

    row("", "eagle-llm", "retrofitted")
    row(
        "output",
        "failed" if own.failed else f"{len(own.tokens)} tokens",
        "failed" if ours.failed else f"{len(ours.tokens)} tokens",
    )
    figures("tau", "{:.2f}", own.tau, ours.tau)
    figures("tokens/s", "{:.1f}", own.tokens_per_second, ours.tokens_per_second)
    figures("decode tokens/s", "{:.1f}", own.decode_tokens_per_second, ours.decode_tokens_per_second)
    figures("memory, MiB", "+{:.0f}", *(None if each.failed else each.memory_bytes / 2**20 for each in (own, ours)))
    at = first_difference(own.tokens, ours.tokens)
    if own.failed:
        click.echo(f"eagle-llm fails on this prompt: {own.failed}")
    if ours.failed:
        click.echo(f"the retrofitted model fails on this prompt: {ours.failed}")
    if at is None:
        click.echo("outputs: identical")
    elif not own.failed and not ours.failed:
        texts = [repr(tokenizer.decode(each.tokens[at : at + 8])) for each in (own, ours)]
        click.echo(f"outputs: differ from token {at} on: {texts[0]} by eagle-llm, {texts[1]} retrofitted")
    for note in ours.notes:
        click.echo(f"note: {note}")
    if ours.failed:
        return
    at = first_difference(ours.tokens, ours.plain or [])
    ties = "" if ours.exact or at is None else "; in half precision ties can fall either way"
    right = "identical to" if at is None else f"from token {at} on NOT"
    click.echo(f"retrofitted output: {right} transformers' own greedy decoding of this target{ties}")
