"""Commands that make datasets: text, tokenizer, `.bin/.idx`."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from megatron_infoentropy.commands import Overwrite, err, out

if TYPE_CHECKING:
    from megatron_infoentropy.data.manifest import Manifest
TextKey = Annotated[
    str, typer.Option("--text-key", "--text-column", help="key or column that holds the text")
]


def corpus(
    output: Annotated[Path, typer.Argument(help="folder to write the three files into")],
    megabytes: Annotated[float, typer.Option(min=0.01, help="about how much text")] = 20.0,
    overwrite: Overwrite = False,
) -> None:
    """Make a small corpus in the Pile's format from Python's standard library (for trying out)."""
    from megatron_infoentropy.data.corpus import build_corpus

    sizes = build_corpus(output, megabytes=megabytes, overwrite=overwrite)
    for (split, domain), size in sizes.items():
        out.print(f"{split:10} {domain:14} {size.documents:6} documents {size.bytes:10} bytes")


def tokenizer(
    inputs: Annotated[list[str], typer.Argument(help="files, as for preprocess --input")],
    output: Annotated[Path, typer.Option(help="folder to write, in Hugging Face format")],
    vocab_size: Annotated[int, typer.Option(help="entries, <|endoftext|> included")] = 8192,
    text_key: TextKey = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    from megatron_infoentropy.data.sources import find_inputs
    from megatron_infoentropy.data.tokenizer import train_tokenizer

    loaded = train_tokenizer(
        find_inputs(inputs), output, vocab_size=vocab_size, text_key=text_key, overwrite=overwrite
    )
    out.print(f"{output}: {loaded.vocab_size} entries, end of document is {loaded.eod_id}")


def preprocess(
    input: Annotated[
        list[str],
        typer.Option(
            help=".jsonl, .jsonl.zst, .jsonl.gz, .parquet or .arrow file, a quoted pattern, a "
            "folder that `datasets` saved or of .parquet files, an address such as s3://..., or - "
            "for lines on standard input; repeatable"
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder")],
    output: Annotated[Path, typer.Option(help="folder to write")],
    workers: Annotated[int, typer.Option(min=1, help="encoding processes, one a core")] = 1,
    split_by: Annotated[
        str,
        typer.Option(
            "--split-by",
            "--domain-column",
            help="key or column that names a document's domain, such as meta.pile_set_name; '' for "
            "one dataset; auto: meta.pile_set_name, and 'all' for documents that name none there",
        ),
    ] = "auto",
    text_key: TextKey = "text",
    append_eod: Annotated[bool, typer.Option(help="end every document with the eos token")] = True,
    special_tokens: Annotated[
        bool, typer.Option(help="keep what the tokenizer adds itself, such as a start token")
    ] = True,
    engine: Annotated[
        str,
        typer.Option(
            help="hf, or gigatoken: the same ids, many times faster; auto: gigatoken where it is "
            "installed and shown to give the same ids for the tokenizer"
        ),
    ] = "auto",
    on_error: Annotated[
        str, typer.Option(help="stop, or skip lines that hold no document, counted and listed")
    ] = "stop",
    max_errors: Annotated[
        int, typer.Option(min=1, help="with --on-error skip: no more than these")
    ] = 1000,
    shard: Annotated[
        str | None, typer.Option(help="i/n: do part i (from 0) of n; merge joins the parts")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="local, slurm or ray: make and merge --tasks shards as tasks of datatrove "
            '(pip install "megatron-infoentropy[cluster]")'
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(help="with --executor: shards, at most one a file")
    ] = None,
    executor_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for datatrove's executor, such as time=12:00:00; repeatable"),
    ] = None,
    overwrite: Overwrite = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="throw away what an unfinished run has done")
    ] = False,
) -> None:
    """Turn text into Megatron's .bin/.idx datasets, one a domain, with token counts.

    Killed or failed, the same command goes on where it was.
    """
    from megatron_infoentropy.data.manifest import DataOptions
    from megatron_infoentropy.data.preprocess import parse_shard
    from megatron_infoentropy.data.preprocess import preprocess as run
    from megatron_infoentropy.data.sources import find_inputs

    if on_error not in ("stop", "skip"):
        raise ValueError(f"--on-error must be stop or skip, got {on_error!r}")
    asked: dict[str, Any] = {
        "inputs": find_inputs(input),
        "tokenizer": tokenizer,
        "output": output,
        "options": DataOptions(append_eod, special_tokens, text_key, split_by or None),
        "workers": workers,
        "engine": engine,
        "max_errors": max_errors if on_error == "skip" else 0,
        "overwrite": overwrite,
        "say": err.print,
    }
    if executor is None:
        if tasks is not None or executor_option:
            raise ValueError("--tasks and --executor-option need --executor local, slurm or ray")
        _print_domains(
            run(**asked, shard=None if shard is None else parse_shard(shard), restart=restart)
        )
        return
    if shard is not None or restart or tasks is None:
        raise ValueError(
            "--executor needs --tasks N, the number of shards, and makes them all: give neither "
            f"--shard nor --restart (to begin anew, remove {output}.shards)"
        )
    from megatron_infoentropy.data.executors import run_tasks

    made = run_tasks(executor, tasks, executor_option or (), **asked)
    if made is None:
        out.print(f"queued: {output} appears when the last job has merged {output}.shards")
    else:
        _print_domains(made)


def _print_domains(manifest: "Manifest") -> None:
    """One row a domain, and what was not written."""
    table = Table("domain", "documents", "tokens", "bytes", "bytes/token", "empty", "rejected")
    for name, facts in manifest.domains.items():
        ratio = f"{facts.bytes / facts.tokens:.2f}" if facts.tokens else ""
        sizes = (facts.documents, facts.tokens, facts.bytes)
        row = (*map(str, sizes), ratio, str(facts.empty), str(facts.rejected))
        table.add_row(name, *row)
    out.print(table)
    for name, documents in manifest.left_out.items():
        out.print(f"left out: {name}, whose {documents} documents have no token")
    rejected = sum(facts.rejected for facts in manifest.inputs)
    if rejected:
        out.print(f"skipped: {rejected} lines, listed in {manifest.folder}/rejected.tsv")


def merge(
    datasets: Annotated[
        list[Path], typer.Argument(help="dataset folders, or one that holds shards")
    ],
    output: Annotated[Path, typer.Option(help="folder to write")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="parts copied at a time; default: one a core")
    ] = None,
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="join datasets that hold the same documents")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Join the shards of a dataset, or datasets of one kind, domain by domain."""
    from megatron_infoentropy.data.rewrite import merge as run

    merged = run(
        datasets, output, workers=workers, allow_duplicates=allow_duplicates, overwrite=overwrite
    )
    _print_domains(merged)


def pack(
    dataset: Annotated[Path, typer.Argument(help="preprocessed dataset folder")],
    output: Annotated[Path, typer.Option(help="folder to write")],
    length: Annotated[int, typer.Option(min=1, help="tokens of a piece: --seq-length")] = 1024,
    documents: Annotated[
        int, typer.Option(min=1, help="so many in a row are joined; what they leave is dropped")
    ] = 1000,
    overwrite: Overwrite = False,
) -> None:
    """Cut a dataset into pieces of one length, as the loss's authors did.

    Train on it with --infoentropy-whole-pieces.
    """
    from megatron_infoentropy.data.rewrite import pack as run

    packed, dropped = run(dataset, output, length=length, documents=documents, overwrite=overwrite)
    table = Table("domain", "pieces", "tokens", "dropped")
    for name, facts in packed.domains.items():
        share = dropped[name] / (facts.tokens + dropped[name])
        table.add_row(name, str(facts.documents), str(facts.tokens), f"{share:.2%}")
    out.print(table)
    for name in packed.left_out:
        out.print(f"left out: {name}, which fills no piece")


def blend(
    dataset: Annotated[Path, typer.Argument(help="preprocessed dataset folder")],
    weights: Annotated[
        str, typer.Option(help="natural, paper, temperature:T, or a .json file of domain: weight")
    ] = "natural",
    tokens: Annotated[
        float | None,
        typer.Option(min=1, help="of the training run: tells the epochs of each domain"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="file for --data-args-path; default: print it")
    ] = None,
) -> None:
    """Weigh the domains: writes Megatron's list for --data-path or --data-args-path."""
    from megatron_infoentropy.data.blend import blend as run
    from megatron_infoentropy.data.blend import data_path

    if tokens is not None and not math.isfinite(tokens):
        raise ValueError(f"--tokens must be a number of tokens, got {tokens}")
    shares = run(dataset, weights)
    table = Table("domain", "share", "tokens", *(("epochs",) if tokens else ()))
    for share in shares:
        epochs = (f"{share.epochs(tokens):.2f}",) if tokens else ()
        table.add_row(share.domain, f"{share.weight:.2%}", str(share.tokens), *epochs)
    listed = os.fsencode(data_path(shares))  # byte for byte the paths, also where not UTF-8
    if output is None:
        typer.echo(listed, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(listed)
    err.print(table)  # beside the list, which may be piped


def inspect(
    dataset: Annotated[Path, typer.Argument(help="dataset folder, or prefix of a .bin and .idx")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer folder: show text")] = None,
    document: Annotated[
        list[int] | None, typer.Option(help="number of one to show; repeatable")
    ] = None,
) -> None:
    """Show a dataset: documents, lengths, and how some documents begin."""
    from megatron_infoentropy.data.verify import inspect as run

    for line in run(dataset, tokenizer=tokenizer, documents=document):
        out.print(line)


def verify(
    dataset: Annotated[
        Path,
        typer.Argument(help="dataset folder, prefix of a .bin and .idx, or folder of checkpoints"),
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="that it must have been made with")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(help="file, or quoted pattern, that it must have been made of; repeatable"),
    ] = None,
) -> None:
    """Check every byte of a dataset or of checkpoints; exit code 1 if something is wrong."""
    from megatron_infoentropy.checkpoints import folders_with_manifest
    from megatron_infoentropy.data.sources import find_inputs
    from megatron_infoentropy.data.verify import verify as run

    if saved := folders_with_manifest(dataset):
        _verify_checkpoints(saved)
        return
    findings = run(dataset, tokenizer=tokenizer, inputs=find_inputs(inputs or []))
    for finding in findings:
        out.print(f"{finding.path}: {finding.problem}")
    if findings:
        raise ValueError(
            f"{dataset} is not what it should be ({len(findings)} above): copy it again, or delete "
            "it and make it again (`infoentropy preprocess` writes the same bytes)"
        )
    out.print(f"{dataset}: ok")


def _verify_checkpoints(folders: list[Path]) -> None:
    from megatron_infoentropy.checkpoints import find_damage, has_checksums

    problems = {folder: find_damage(folder) for folder in folders}
    for folder, damage in problems.items():
        is_whole = "ok" if damage or has_checksums(folder) else "the sizes are right; no checksums"
        out.print(f"{folder}: {damage or is_whole}")
    damaged = sum(map(bool, problems.values()))
    if damaged:
        raise ValueError(f"{damaged} of {len(folders)} checkpoints are damaged: copy them again")
