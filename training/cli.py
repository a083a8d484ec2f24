"""The command line: ``python -m training run RECIPE``, ``search RECIPE``, ``list``, ``reproduce TABLE``, ``report``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from training.config import TWIN, UserError, load

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


def check_file(path: Path) -> None:
    """Raises UserError where --out, the name of a file to write, is a folder."""
    if path.is_dir():
        raise UserError(f"--out must name a file, and {path} is a folder")


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
        from training.reproduce import resolve_start

        config = resolve_start(config, Path("runs"))
        try:
            result = engine.run(config, folder, resume=resume, show=True)
        except KeyboardInterrupt:
            fail(f"interrupted; the same command with --resume continues the run in {folder}", 130)
    if is_main_process():
        state = "was already finished" if result.already_finished else "is finished"
        print(f"the run in {folder} {state}: test accuracy {100 * result.accuracy:.2f} %")


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe with a table [algorithm.search].")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of the recipe."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The policy's file; where `run` looks if not given.")] = None,
) -> None:
    """Find the bits of every layer within a budget; `run` of the same recipe then trains with them."""
    with friendly_errors():
        config = load(recipe, settings or [])
        from training.reproduce import resolve_start
        from training.search.driver import indicators_folder
        from training.search.driver import search as find
        from training.search.policy import policy_path

        root = Path("runs")
        path = out or policy_path(root / config.run.name)
        check_file(path)
        policy = find(resolve_start(config, root), indicators_folder(config, root), print)
        policy.write(path)
    for name, (weight, activation) in policy.layers.items():
        print(f"{name:40} weights {weight}, activations {activation}")
    print(f"{path}: {', '.join(f'{key} {value}' for key, value in policy.about.items() if key != 'search')}")


@app.command("list")
def list_command() -> None:
    """Show the recipes, by paper and table."""
    from training.tables import PAPERS, all_recipes

    heading = ""
    for recipe in sorted(all_recipes(), key=lambda recipe: (recipe.folder not in PAPERS, recipe.name)):
        title = PAPERS.get(recipe.folder, recipe.folder)
        if title != heading:
            print(heading := title)
        print(f"  {'*' if recipe.has_twin else ' '} {recipe.name:50} {recipe.comment}")
    print(f"\n* has a small twin, NAME{TWIN}: minutes on two cores. `reproduce` runs all rows of a paper's table.")


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help='A paper\'s table, such as "DQA table 1" or dqa/table1.')],
    small: Annotated[bool, typer.Option("--small", help="Take the recipes' small twins.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs a row, with seeds 0, 1, ...")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of every recipe."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the runs' folders.")] = Path("runs"),
) -> None:
    """Run the rows of a paper's table, and print what they give beside the published figures.

    Finished runs in the folder are used as they are, unfinished ones are continued.
    """
    with friendly_errors():
        from training.tables import find_table

        title = find_table(table)
        from training.reproduce import Reproduction, side_by_side

        console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=not is_main_process())
        runs = Reproduction(out, small, settings or [], show=not small)
        try:
            outcomes = runs.run(title, seeds, lambda line: console.print(line, markup=False))
        except KeyboardInterrupt:
            fail(f"interrupted; the same command continues with the runs in {out}", 130)
    if is_main_process():
        ours = "ours: the small twins, other networks and data" if small else "ours: at full size"
        over = f", mean ± standard deviation of seeds 0 to {seeds - 1}" if seeds > 1 else ", seed 0"
        print(f"{title}; {ours}{over}\n")
        print(side_by_side(outcomes), end="")
    errors = sum(len(outcome.errors) for outcome in outcomes)
    if errors:
        fail(f"{errors} of {seeds * len(outcomes)} runs failed; the same command tries them again")


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
        check_file(out)
        from training.report import write_report

        write_report(runs, out)
    print(out)
