"""The command line: ``python -m training run RECIPE``, ``list``, ``report RUN...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from training.config import UserError, list_recipes, load

app = typer.Typer(
    help="Train low-bit networks from recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def is_main_process() -> bool:
    """Whether this process speaks for all those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str, status: int = 1) -> NoReturn:
    """One sentence on stderr, and out."""
    who = "" if is_main_process() else f" (process {os.environ['RANK']})"
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error{who}: {message}", markup=False)
    raise typer.Exit(status)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Mistakes of the user as a sentence instead of a traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"{error}; pip install '.[training]' installs what training needs")
    except ImportError as error:  # such as a quantkernels whose native part was not built
        fail(str(error))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or a name that `list` shows.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of the recipe."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME if not given.")] = None,
) -> None:
    """Train a network; metrics, checkpoints and the model go to the run's folder."""
    with friendly_errors():
        config = load(recipe, settings or [])
        folder = out or Path("runs") / config.run.name
        from training import engine  # torch takes seconds to import: errors in a recipe come before

        try:
            result = engine.run(config, folder, resume=resume, show=True)
        except KeyboardInterrupt:
            fail(f"interrupted; the same command with --resume continues the run in {folder}", 130)
    if is_main_process():
        state = "was already finished" if result.already_finished else "is finished"
        print(f"the run in {folder} {state}: test accuracy {100 * result.accuracy:.2f} %")


@app.command("list")
def list_command() -> None:
    """Show the recipes, by folder."""
    for folder, recipes in list_recipes().items():
        print(folder)
        for name, comment in recipes:
            print(f"  {name:32} {comment}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page with the tables and plots of some runs."""
    with friendly_errors():
        for folder in runs:
            if not folder.is_dir():
                raise UserError(f"there is no run in {folder}")
        from training.report import write_report

        write_report(runs, out)
    print(out)
