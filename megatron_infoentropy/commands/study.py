"""The command that does a whole study."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_infoentropy.console import make_console

out = make_console()


def study(
    study: Annotated[Path, typer.Argument(help="YAML file; see examples/studies/")],
    output: Annotated[Path, typer.Option(help="folder for data, runs and report")],
    jobs: Annotated[
        int, typer.Option(min=1, help="runs side by side, which share cores and GPUs")
    ] = 1,
    only: Annotated[
        str | None, typer.Option(help="data, report or the name of a run: do this part alone")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="write a job array script instead of running")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the runs and what is done already")
    ] = False,
) -> None:
    """Train a grid of objectives and seeds, export, evaluate and compare: one page at the end.

    Ended by whatever, the same command goes on where it was.
    """
    from megatron_infoentropy.study import runner, states
    from megatron_infoentropy.study.plan import load_study
    from megatron_infoentropy.study.states import write_script

    def say(line: str) -> None:
        out.print(line)

    plan, output = load_study(study), output.resolve()
    if dry_run:
        for state in states.find_states(plan, output):
            say(f"{state.number:3}  {state.member.name:36}  {state}")
    elif slurm:
        say(f"{write_script(plan, output, jobs)}: see there how to submit it")
    else:
        with runner.terminated_as_interrupted():
            if only is not None:
                page = states.do_part(plan, output, only)
            else:
                page = runner.run_study(plan, output, jobs=jobs, say=lambda line: out.print(line))
        if page is not None:
            say(f"report: {page.as_uri()}")


COMMANDS = (study,)
