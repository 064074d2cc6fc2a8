"""Text to Megatron datasets: one pass over `.jsonl(.zst|.gz)` files, one dataset per domain.

    inputs --read, one process--> blocks of lines --parse and encode, `workers` processes-->
    ids by domain --append, in order--> .bin files --at the end--> .idx files, manifest

The output is the same, byte by byte, for any number of workers and any number of interruptions.
Ids are those of Megatron's own tool: special tokens the tokenizer adds to a text are added, and a
document without ids leaves a boundary in the index but no end-of-document id.
"""

import errno
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from megatron_infoentropy.data.blocks import Block, Position, UnfitDocumentsError, read_blocks
from megatron_infoentropy.data.compression import require_readable
from megatron_infoentropy.data.fast_engine import fast_engine
from megatron_infoentropy.data.finish import Written, finish
from megatron_infoentropy.data.folder import publish, require_free, work_folder
from megatron_infoentropy.data.journal import JOURNAL, Journal
from megatron_infoentropy.data.manifest import OUTPUT_FILES, REJECTED, Manifest, load_manifest
from megatron_infoentropy.data.options import DEFAULT_OPTIONS, Options
from megatron_infoentropy.data.run import Run
from megatron_infoentropy.data.shards import shard_inputs, shard_name, shards_digest
from megatron_infoentropy.data.split import decide_split
from megatron_infoentropy.data.task import Task, input_of
from megatron_infoentropy.data.tokenizer import load_tokenizer
from megatron_infoentropy.data.worker import Settings
from megatron_infoentropy.data.workers import encode_blocks
from megatron_infoentropy.progress import progress

ENGINES = ("hf", "gigatoken")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(RuntimeError):
    """There is no room for the output; what is finished is kept, nothing of it is visible."""


def preprocess(
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    *,
    options: Options = DEFAULT_OPTIONS,
    workers: int = 1,
    engine: str = "hf",
    max_errors: int = 0,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> Manifest:
    """Write `output/<slug>.bin/.idx` per domain, the token counts and the manifest.

    `tokenizer` is a Hugging Face tokenizer folder, `workers` the number of encoding processes,
    `engine` what encodes in them: both give the same bytes, gigatoken faster (an extra). Up
    to `max_errors` lines that hold no document are skipped, counted and listed. `shard` (i, n) does
    part i of n of the inputs into a folder of its own below `output`. `overwrite` replaces a
    dataset of other inputs or options. Given again after whatever ended it, the same call goes on
    (`restart`: begins anew); given again after it was done, it does nothing.

    Raises:
        BrokenLineError: a line that holds no document, by file and number.
        WorkerDied, DiskFull: with what to do.
        ValueError: inputs, tokenizer or output that can not be used; two domains with one slug.
            Whatever the error, `output` is left as it was.
    """
    _require_usable(inputs, workers, max_errors)
    if engine not in ENGINES:
        raise ValueError(f"the engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    asked, options = options, decide_split(options, inputs)
    named = options.split_by is not None or asked.split_by is None
    shards_of = "" if shard is None else shards_digest(inputs)
    if shard is not None:
        inputs, output = shard_inputs(inputs, shard), output / shard_name(shard)
    files = list(map(input_of, inputs))
    task = Task(files, output, load_tokenizer(tokenizer), options, shard, shards_of)
    settings = Settings(task.loaded, options, engine, named)
    if engine == "gigatoken":  # calibrates it, once for all workers, or refuses it
        fast_engine(task.loaded, special_tokens=options.special_tokens)
    if not task.is_done():
        require_free(output, OUTPUT_FILES, overwrite)
    with work_folder(output) as work:
        try:
            if restart:
                (work / JOURNAL).unlink(missing_ok=True)
            if not task.is_done():
                publish(_make(task, settings, work, workers, max_errors), output)
            (work / JOURNAL).unlink(missing_ok=True)
        except UnfitDocumentsError:
            (work / JOURNAL).unlink(missing_ok=True)
            raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise _disk_full(work, error) from error
        finally:
            if not (work / JOURNAL).exists():  # nothing to go on from
                shutil.rmtree(work)
    return load_manifest(output)


def _make(task: Task, settings: Settings, work: Path, workers: int, max_errors: int) -> Path:
    """Run from the journal's place to the end; returns the finished folder."""
    size = task.loaded.vocab_size
    run = Run(work, job=task.job(), vocab_size=size, max_errors=max_errors)
    with closing(run):
        total = sum(each.bytes for each in task.inputs)
        with progress("preprocess", total, "bytes", run.rates()) as advance:
            blocks = _read(task, run.journal, advance)
            for block, encoded in encode_blocks(settings, blocks, workers=workers):
                run.add(block, encoded)
                if not block.lines:
                    task.require_unchanged(run.journal.file - 1, block.sha256)
        if not run.journal.rejected:
            (run.dataset / REJECTED).unlink()
        journal = run.journal
        written = {
            name: Written(run.writers[name], tally, run.counts[name])
            for name, tally in journal.domains.items()
        }
        manifest = task.manifest(run.dataset, settings.engine, journal.lines, journal.inputs)
        finish(manifest, written)
        for number, facts in enumerate(manifest.inputs):
            task.require_unchanged(number, facts.sha256)
    return run.dataset


def _read(task: Task, journal: Journal, advance: Callable[[int], None]) -> Iterator[Block]:
    advance(sum(each.bytes for each in task.inputs[: journal.file]))
    start = journal.position
    for each in task.inputs[journal.file :]:
        yield from read_blocks(each.path, advance, start)
        start = Position()


def _require_usable(inputs: Sequence[Path], workers: int, max_errors: int) -> None:
    if not inputs:
        raise ValueError("expected at least one input file, got none")
    for path in inputs:
        require_readable(path)
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path in inputs:
        status = path.stat()
        names[status.st_dev, status.st_ino].append(str(path))
    for same in names.values():
        if len(same) > 1:
            raise ValueError(
                f"{' and '.join(dict.fromkeys(same))} is one file, given {len(same)} times, "
                "perhaps by two patterns or links; give it once, and raise the weight of a domain "
                "with `infoentropy blend`"
            )
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if max_errors < 0:
        raise ValueError(f"max_errors must be at least 0, got {max_errors}")


def _disk_full(work: Path, error: OSError) -> DiskFull:
    free = shutil.disk_usage(work).free
    return DiskFull(
        f"no room for the output below {work.parent} ({error.strerror}; {free / 1e6:.0f} MB are "
        "free): make room and give the same command again, it goes on from what is finished"
    )
