"""Commands that score models and compare runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder")],
    data: Annotated[Path, typer.Option(help="preprocessed dataset to score")],
    token_counts: Annotated[
        Path, typer.Option(help="token_counts.npy of the training data: defines the buckets")
    ],
    output: Annotated[Path, typer.Option(help="folder for evaluation.json and .npz")],
    max_tokens: Annotated[int | None, typer.Option(help="score about this many only")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Perplexity by domain and by how frequent a token is."""
    from megatron_infoentropy.evaluate.perplexity import evaluate_model

    result = evaluate_model(
        model, data, token_counts=token_counts, max_tokens=max_tokens, device=device
    )
    result.save(output)
    for kind in ("domains", "buckets"):
        for name, values in result.summary[kind].items():
            line = f"{name:16} {values['tokens']:9} tokens"
            if values["tokens"]:
                line += f" {values['nats_per_token']:8.4f} nats/token"
                line += f" perplexity {values['perplexity']:10.3f}"
            out.print(line, markup=False)


def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders to compare")],
    output: Annotated[Path, typer.Option(help="HTML file to write; JSON goes beside it")],
    show: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
) -> None:
    """Write one self-contained page that compares runs, with the noise stated."""
    import webbrowser

    from megatron_infoentropy.evaluate.report import write_report

    page = write_report(runs, output)
    out.print(f"report: {page.resolve().as_uri()}")
    if show and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(page.resolve().as_uri())  # without a screen it might open in a terminal


COMMANDS = (evaluate, report)
