"""Commands that score models, put tasks to them, compare runs, and do a whole study."""

import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_infoentropy.commands import out

if TYPE_CHECKING:
    from megatron_infoentropy.evaluate.comparison import Comparison
    from megatron_infoentropy.evaluate.model import ModelSource

Device = Annotated[str, typer.Option(help="auto, cpu, cuda")]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or Megatron checkpoint")],
    token_counts: Annotated[
        Path, typer.Option(help="token_counts.npy of the training data: defines the buckets")
    ],
    output: Annotated[Path, typer.Option(help="folder for the result, e.g. the run's folder")],
    data: Annotated[Path | None, typer.Option(help="preprocessed dataset to score")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="in its place, folder of .jsonl files, each a domain of its name"),
    ] = None,
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
    device: Device = "auto",
    tokenizer: Annotated[
        Path | None, typer.Option(help="of a checkpoint, where it has moved since the training")
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="of a checkpoint; default: last")] = None,
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
    from megatron_infoentropy.evaluate.dataset import tokenise_folder
    from megatron_infoentropy.evaluate.perplexity import ScoringOptions, evaluate_model

    options = ScoringOptions(
        context_length, stride, packed, batch_tokens, max_tokens, domain_weights, dtype, device
    )
    source = _source(model, tokenizer, iteration)
    scored: Path | dict[str, Path]
    if data is not None and text is None:
        scored = data
    elif text is None or data is not None:
        raise ValueError("expected --data DATASET, or --text FOLDER of .jsonl files")
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "--text is for one process: for several, `infoentropy preprocess` the files first, "
            "with a key that names their domain (--split-by), and give --data"
        )
    else:
        scored = tokenise_folder(text, source.tokenizer, output / "text")
    result = evaluate_model(
        source,
        scored,
        options,
        token_counts=token_counts,
        output=output,
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
    output: Annotated[Path | None, typer.Option(help="folder for comparison.json")] = None,
) -> None:
    """Differences to the first setting, with intervals over documents and seeds: did it help?

    Answers to tasks are compared item by item in the same way, where there are some.
    """
    from megatron_infoentropy.evaluate.compare import compare_folders
    from megatron_infoentropy.evaluate.verdict import answers, chances, not_compared

    made = compare_folders(runs, output=output)
    for comparison in made:
        _show_comparison(comparison)
    for sentence in not_compared(made):
        out.print(sentence)
    for answer in answers(made):
        out.print(f"{answer['question']} {answer['short']} {answer['more']}".rstrip())
    if chance := chances(made):
        out.print(chance)


def _show_comparison(comparison: "Comparison") -> None:
    from megatron_infoentropy.evaluate.verdict import how_matched

    if comparison.refusal:
        return
    unit = "nats per token"
    if comparison.of_tasks:
        unit = "bits per byte of the right answers (accuracy: share of items)"
    out.print(f"{comparison.group} minus {comparison.baseline}, {unit}, {how_matched(comparison)}")
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
        what = "answers" if comparison.of_tasks else "evaluations"
        out.print(f"the {what} of {one} and {other} are identical")


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


def tasks(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder")],
    output: Annotated[Path, typer.Option(help="run folder: results go to tasks/ in it")],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="commonsense, closed-book, either with -5shot, mmlu or mmlu-texts; repeatable"
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a task or group of lm_eval by name; repeatable")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="examples in the prompt of --task; default: its own")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="task descriptions (YAML) of your own, on local data")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="questions of each task: to try it out")
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="prompts at a time")] = 8,
) -> None:
    """Put tasks of lm-evaluation-harness to an exported model; the report shows the results.

    Ended by whatever, the same command goes on with the next task.
    """
    from megatron_infoentropy.evaluate.model import load_hugging_face
    from megatron_infoentropy.tasks.ask import run_tasks

    results = run_tasks(
        model,
        output,
        load_hugging_face,
        suites=tuple(suite or ()),
        tasks=tuple(task or ()),
        shots=shots,
        task_folder=task_folder,
        limit=limit,
        device=device,
        batch_size=batch_size,
    )
    for name, result in results.items():
        for metric, number in result.metrics.items():
            error = "" if number.stderr is None else f" +- {number.stderr:.4f}"
            line = f"{name:28} {metric:28} {number.value:8.4f}{error}  ({result.samples} questions)"
            out.print(line)


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
    from megatron_infoentropy.study import runner
    from megatron_infoentropy.study.plan import load_study

    plan, output = load_study(study), output.resolve()
    if dry_run:
        for state in runner.find_states(plan, output):
            out.print(f"{state.number:3}  {state.member.name:36}  {state}")
    elif slurm:
        out.print(f"{runner.write_script(plan, output, jobs)}: see there how to submit it")
    else:
        with runner.terminated_as_interrupted():
            if only is not None:
                page = runner.do_part(plan, output, only)
            else:
                page = runner.run_study(plan, output, jobs=jobs, say=lambda line: out.print(line))
        if page is not None:
            out.print(f"report: {page.as_uri()}")
