"""Commands that score models and compare runs."""

import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_infoentropy.console import make_console

if TYPE_CHECKING:
    from megatron_infoentropy.evaluate.comparison import Comparison
    from megatron_infoentropy.evaluate.model import ModelSource

out = make_console()


def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or Megatron checkpoint")],
    data: Annotated[Path, typer.Option(help="preprocessed dataset to score")],
    token_counts: Annotated[
        Path, typer.Option(help="token_counts.npy of the training data: defines the buckets")
    ],
    output: Annotated[Path, typer.Option(help="folder for the result, e.g. the run's folder")],
    context_length: Annotated[
        int | None, typer.Option(help="tokens a window reads; default: the model's positions")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="tokens a window scores; default: all it reads")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="documents follow one another in a window")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(help="tokens read at once")] = 4096,
    max_tokens: Annotated[int | None, typer.Option(help="score about this many only")] = None,
    domain_weights: Annotated[
        str, typer.Option(help="of the weighted average: auto, scored, paper or a .json file")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    tokenizer: Annotated[
        Path | None, typer.Option(help="of a checkpoint, where it has moved since the training")
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="of a checkpoint; default: last")] = None,
    token_scores: Annotated[
        bool, typer.Option(help="keep every token's scores, 4 bytes each, for `compare`")
    ] = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="discard what an interrupted evaluation left")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a finished evaluation")
    ] = False,
) -> None:
    """Perplexity by domain, by how frequent and how hard a token is, and calibration.

    Runs on one process or, started by torchrun, on several. Interrupted, it resumes.
    Memory: the model, batch tokens x vocabulary x 4 bytes (bfloat16: 2) for logits, 900 bytes a
    document and 0.8 GB, however much text there is; docs/evaluate.md has the rest.
    """
    from megatron_infoentropy.evaluate.perplexity import ScoringOptions, evaluate_model

    options = ScoringOptions(
        context_length, stride, packed, batch_tokens, max_tokens, domain_weights, dtype, device
    )
    result = evaluate_model(
        _source(model, tokenizer, iteration),
        data,
        options,
        token_counts=token_counts,
        output=output,
        token_scores=token_scores,
        restart=restart,
        overwrite=overwrite,
    )
    if os.environ.get("RANK", "0") == "0":
        _show(result.summary)


def _source(model: Path, tokenizer: Path | None, iteration: int | None) -> "ModelSource":
    """Where the model comes from: this is where evaluation and conversion meet."""
    from megatron_infoentropy.convert import hf_model
    from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
    from megatron_infoentropy.evaluate.model import ModelSource, hugging_face

    if not hf_model.is_checkpoint(model):
        if tokenizer or iteration is not None:
            raise ValueError(f"--tokenizer and --iteration are for checkpoints; {model} is none")
        return hugging_face(model)
    opened = MegatronCheckpoint(model, iteration)
    folder = tokenizer or hf_model.tokenizer_of(opened)
    return ModelSource(
        kind="megatron",
        tokenizer=folder,
        load=partial(hf_model.network_of, opened, folder),
        facts={"iteration": opened.iteration},
        trained_on=hf_model.training_tokenizer_sha256(opened),
    )


def _windows(scoring: dict[str, Any]) -> str:
    length, stride = scoring["context_length"], scoring["stride"]
    words = f"separate windows of {length} tokens"
    if stride < length:
        words = f"windows of {length} tokens that slide by {stride}"
    return words + (", packed" if scoring["mode"] == "packed" else "")


def _show(summary: dict[str, Any]) -> None:
    scoring, data = summary["scoring"], summary["data"]
    out.print(
        f"{_windows(scoring)}; {data['documents']} documents"
        + ("" if data["complete"] else ", a sample of the data")
    )
    places = [("total", summary["total"])]
    for kind in ("domains", "buckets", "deciles"):
        places += [(f"{kind.removesuffix('s')} {k}", v) for k, v in summary[kind].items()]
    places += [(k, v) for k, v in summary["difficulty"]["buckets"].items()]
    for name, values in places:
        line = f"{name:32} {values['tokens']:10} tokens"
        if values["tokens"]:
            line += f" {values['nats_per_token']:8.4f} nats/token"
            line += f" perplexity {values['perplexity'] or math.inf:10.3f}"
        if values.get("bits_per_byte"):
            line += f" {values['bits_per_byte']:7.4f} bits/byte"
        if name in summary["difficulty"]["buckets"]:
            line += f" {values['tokens'] / summary['total']['tokens']:.1%} of all tokens"
        out.print(line)
    for name in ("weighted_average", "uniform_average", "worst_case"):
        values = summary[name]
        note = values.get("weights_are") or values.get("domain") or "over domains"
        out.print(
            f"{name.replace('_', ' '):32} {'':17} {values['nats_per_token']:8.4f} nats/token"
            f" perplexity {values['perplexity'] or math.inf:10.3f} ({note})"
        )
    calibration = summary["calibration"]
    out.print(
        f"calibration: top token right {calibration['accuracy']:.2%}, expected error "
        f"{calibration['expected_error']:.4f}; entropy off by "
        f"{calibration['entropy_error']:.4f} nats"
    )


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="run or evaluation folders; A1,A2: seeds of one setting"),
    ],
    difficulty_from: Annotated[
        Path | None,
        typer.Option(help="evaluation whose entropies say what is hard; default: all compared"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for comparison.json and comparison.csv")
    ] = None,
) -> None:
    """Differences to the first setting, with intervals over documents and seeds, and a verdict."""
    from megatron_infoentropy.evaluate.compare import compare_folders, verdict_line
    from megatron_infoentropy.evaluate.verdict import chances

    made = compare_folders(runs, difficulty_from=difficulty_from, output=output)
    for comparison in made:
        _show_comparison(comparison)
        out.print(verdict_line(comparison))
    if chance := chances(made):
        out.print(chance)


def _show_comparison(comparison: "Comparison") -> None:
    from megatron_infoentropy.evaluate.verdict import how_matched

    out.print(
        f"{comparison.group} minus {comparison.baseline}, nats per token, {how_matched(comparison)}"
    )
    out.print(f"{'':32} difference  {'95 % (single)':21} {'p (Holm)':8}  detectable  reading")
    for row in () if comparison.is_identical else comparison.rows:
        interval = p = detectable = "-"
        if row.low is not None and row.high is not None:
            interval, p = f"{row.low:+8.4f} to {row.high:+8.4f}", f"{row.p_adjusted:.4f}"
        if row.detectable is not None:
            detectable = f"{row.detectable:.4f}"
        out.print(
            f"{row.kind:10} {row.name:21} {row.difference:+10.4f}  {interval:21} {p:>8}  "
            f"{detectable:>10}  {row.reading}"
        )
    for clause in comparison.left_out:
        out.print(f"left out: {clause}")
    for one, other in comparison.identical:
        out.print(f"the evaluations of {one} and {other} are identical")


def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders to compare")],
    output: Annotated[Path, typer.Option(help="HTML file to write; JSON goes beside it")],
    show: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
    weighting: Annotated[
        list[str] | None,
        typer.Option(help="package.module:function that runs were trained with: draw its weights"),
    ] = None,
) -> None:
    """Write one self-contained page that compares runs, with the noise stated."""
    import webbrowser

    from megatron_infoentropy.evaluate.report import write_report

    page = write_report(runs, output, weightings=weighting or ())
    out.print(f"report: {page.resolve().as_uri()}")
    if show and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(page.resolve().as_uri())  # without a screen it might open in a terminal


COMMANDS = (evaluate, compare, report)
