"""The command line: parse, call, print. Each command is one call into the package.

Progress and messages go to stderr; results to stdout. Heavy modules are imported inside the commands, so that help
answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from compress import __version__
from compress.errors import CompressError, StartError

GOAL_MISSED = 3
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="compress")
def commands() -> None:
    """Makes transformers models smaller and faster, and proves what it cost."""


def _recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that change a recipe from outside."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads to compute with."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="Change a key of the recipe, as in passes.gptq.bits=3. May be given several times.",
        ),
        click.option("--output", metavar="DIR", help="Folder for the results."),
        click.option("--model", metavar="M", help="Model to use in place of the recipe's."),
    ):  # fmt: skip
        command = option(command)
    return command


@commands.command()
@click.argument("recipe")
@_recipe_options
@click.option("--fresh", is_flag=True, help="Start over in the output folder instead of continuing.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def run(
    recipe: str, model: str | None, output: str | None, overrides: Sequence[str], device: str | None,
    threads: int | None, debug: bool, fresh: bool, quiet: bool,
) -> None:  # fmt: skip
    """Apply RECIPE and write the smaller model and its report. The same command continues a run that was stopped."""
    _set_threads(threads)
    from compress.pipeline import run as run_recipe
    from compress.processes import process_rank
    from compress.recipe import Recipe
    from compress.reports.table import print_report

    loaded = Recipe.load(recipe, overrides, model=model, output=output, device=device)
    with _progress(quiet or process_rank() > 0) as progress:
        report = run_recipe(loaded, fresh=fresh, progress=progress)
    if process_rank():
        return  # the first process reports
    folder = Path(str(loaded.output)).resolve()
    if not quiet:
        print_report(report)
        click.echo(f"Report: {folder / 'report.html'}", err=True)
    click.echo(folder / "report.json")
    sys.exit(0 if report.goals_met else GOAL_MISSED)


@commands.command()
@click.argument("recipe")
@_recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    recipe: str, model: str | None, output: str | None, overrides: Sequence[str], device: str | None,
    threads: int | None, debug: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say what RECIPE will need and what will come out, without reading a weight."""
    _set_threads(threads)
    import json

    from compress.planning import plan as plan_recipe
    from compress.planning import refuse
    from compress.recipe import Recipe
    from compress.reports.table import print_plan

    loaded = Recipe.load(recipe, overrides, model=model, output=output, device=device)
    result = plan_recipe(loaded)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_plan(result)
    refuse(result, loaded)


@commands.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL [MODEL ...]")
@click.option("--output", metavar="DIR", help="Folder for report.json, report.md and report.html.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="As in data.evaluation=FILE or benchmark.tasks=[FILE, ...].",
)  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads to compute with.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def benchmark(
    models: Sequence[str], output: str | None, overrides: Sequence[str], device: str, threads: int | None,
    quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Measure models against the first of them, the original."""
    _set_threads(threads)
    from compress.comparing import benchmark as compare_models
    from compress.reports.table import print_report

    with _progress(quiet) as progress:
        report = compare_models(models, overrides=overrides, output=output, device=device, progress=progress)
    print_report(report)
    if output is not None:
        click.echo(Path(output).resolve() / "report.json")
    sys.exit(0 if report.goals_met else GOAL_MISSED)


@commands.command()
@click.argument("folder", metavar="DIR")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="New tokens at most.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads to compute with.")
@click.option(
    "--activations", type=click.Choice(["float", "int8"]), help="What packed weights are multiplied with on the CPU."
)
@click.option("--prepack", is_flag=True, help="Put plain bfloat16 layers into the order that oneDNN is fastest with.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def generate(
    folder: str, prompt: str, tokens: int, device: str, threads: int | None,
    activations: Literal["float", "int8"] | None, prepack: bool, debug: bool,
) -> None:  # fmt: skip
    """Continue a text with the model in DIR, straight from its packed weights."""
    _set_threads(threads)
    from compress.generation import stream_text

    speed = stream_text(
        folder, prompt, tokens, device=device, write=lambda text: click.echo(text, nl=False),
        activations=activations, prepack=prepack or None,
    )  # fmt: skip
    click.echo()
    click.echo(f"{speed:.1f} tokens/s", err=True)


@commands.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR [DIR ...]")
@click.option("--output", metavar="FILE", help="File of the page, as in comparison.html.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(folders: Sequence[str], output: str | None, debug: bool) -> None:
    """Make the report pages of finished runs again; of several runs, one page that compares them."""
    from compress.reports import render

    click.echo(render([Path(folder) for folder in folders], output))


@commands.command()
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def doctor(folder: str | None, debug: bool) -> None:
    """Say what this machine has, and what would compute which layers: of any model, or of the one in DIR."""
    from compress.doctor import findings, layers_of

    for line in findings() if folder is None else layers_of(folder):
        click.echo(line)


@commands.command()
@click.argument("name", required=False)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def passes(name: str | None, debug: bool) -> None:
    """List the passes, or say what the options of pass NAME are."""
    from compress.describe import describe_pass, list_passes

    click.echo(describe_pass(name) if name else list_passes())


@commands.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def schema(debug: bool) -> None:
    """Print the JSON Schema of a recipe, for editors and checks."""
    import json

    from compress.recipe import Recipe

    click.echo(json.dumps(Recipe.json_schema(), indent=2))


@commands.command()
@click.argument("model")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def init(model: str, debug: bool) -> None:
    """Print a commented starter recipe for MODEL."""
    from compress.starter import starter_recipe

    click.echo(starter_recipe(model), nl=False)


def _set_threads(threads: int | None) -> None:
    """Before torch is imported, so that its pools are made with this size."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


@contextmanager
def _progress(quiet: bool) -> Any:
    from compress.progress import LiveProgress, Progress

    if quiet:
        yield Progress()
        return
    with LiveProgress() as progress:
        yield progress


def _quiet_libraries() -> None:
    """What others print (progress bars of loading, advice) would hide what we have to say."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # transformers' Trainer imports it where it is installed


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `compress`. Exit codes: 0 done, 1 failed, 2 could not start, 3 a goal missed, 130 interrupted."""
    _quiet_libraries()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        commands.main(args=arguments, prog_name="compress", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted. The same command continues where it stopped.", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(StartError.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if "--debug" in arguments:
            raise
        _explain(error)
        sys.exit(error.exit_code if isinstance(error, CompressError) else 1)


def _explain(error: Exception) -> None:
    if isinstance(error, CompressError):
        click.echo(f"compress: {error}", err=True)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        click.echo(
            "compress: out of memory. `compress plan` says what the recipe needs; residency: disk needs least. "
            "The same command continues where it stopped.", err=True,
        )  # fmt: skip
    else:
        first = (str(error).splitlines() or [""])[0]
        click.echo(
            f"compress: an error that should not happen: {type(error).__name__}: {first}. Run again with --debug for "
            "the traceback, and please report it.", err=True,
        )  # fmt: skip
