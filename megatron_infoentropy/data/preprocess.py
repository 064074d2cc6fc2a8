"""Text to Megatron datasets: one pass over files of texts, one dataset per domain.

    inputs --read, one process--> blocks of lines --parse and encode, `workers` processes-->
    ids by domain --append, in order--> .bin files --at the end--> .idx files, manifest

The output is the same, byte by byte, for any number of workers and any number of interruptions.
Ids are those of Megatron's own tool: special tokens the tokenizer adds to a text are added, and a
document without ids leaves a boundary in the index but no end-of-document id.

A shard is a part of the inputs for an independent job: neighbouring files, about equally many
bytes. Shard i of n gets the same files in every job, and the shards joined in order are the whole.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from megatron_infoentropy import __version__
from megatron_infoentropy.data.blocks import (
    Block,
    Keys,
    Position,
    UnfitDocumentsError,
    read_blocks,
    require_readable,
)
from megatron_infoentropy.data.fast_engine import choose_engine
from megatron_infoentropy.data.indexed import require_whole, token_dtype
from megatron_infoentropy.data.journal import JOURNAL, JournalledRun
from megatron_infoentropy.data.manifest import (
    DEFAULT_OPTIONS,
    MANIFEST,
    OUTPUT_FILES,
    REJECTED,
    DataOptions,
    InputFacts,
    Manifest,
    TokenizerFacts,
    load_manifest,
)
from megatron_infoentropy.data.sources import UNDATED, StandardInput
from megatron_infoentropy.data.tokenizer import LoadedTokenizer, load_tokenizer
from megatron_infoentropy.data.workers import WorkerSettings, encode_blocks
from megatron_infoentropy.data.writer import finish, full_disk_is_said
from megatron_infoentropy.files import file_sha256, publish, require_free, work_folder
from megatron_infoentropy.progress import progress

_SAMPLES, _SAMPLE_BYTES = 8, 1 << 16


class Input(NamedTuple):
    """A file before any line of it is read, and when it was last written to."""

    path: Path
    facts: InputFacts
    modified_ns: int
    changed_ns: int  # also by a rename that keeps the time of modification


def input_of(path: Path) -> Input:
    """Look at a file as it is now; all of a small one, 64 KiB at eight places of a large one."""
    digest, status = hashlib.sha256(), path.stat()
    last = max(status.st_size - _SAMPLE_BYTES, (_SAMPLES - 1) * _SAMPLE_BYTES)
    if not isinstance(path, StandardInput):
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * last // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    facts = InputFacts(path.name, status.st_size, 0, 0, 0, 0, 0, samples=digest.hexdigest())
    return Input(path, facts, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Task:
    """Make `output` of `inputs`; `shard` is (i, n) where that is one part of n of `shards_of`.

    `engine` is what makes the ids, hf or gigatoken; a run that is done is done by either.
    """

    inputs: Sequence[Input]
    output: Path
    loaded: LoadedTokenizer
    options: DataOptions
    shard: tuple[int, int] | None
    shards_of: str
    engine: str = "hf"

    def job(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on where another ended; plain JSON."""
        return {
            "inputs": [
                [str(path.resolve()), facts.bytes, modified_ns, facts.samples]
                for path, facts, modified_ns, _ in self.inputs
            ],
            "tokenizer": self.loaded.sha256,
            "list of files": self.shards_of,
            "options": asdict(self.options),
            "versions": self.versions(),
            "engine": self.engine_version(),
        }

    def engine_version(self) -> str:
        """Return what the manifest says of the engine; the version of hf is that of tokenizers."""
        return self.engine if self.engine == "hf" else f"{self.engine} {version(self.engine)}"

    def can_go_on(self) -> bool:
        """Say whether what was read of the inputs can be read again."""
        return not any(isinstance(each.path, StandardInput) for each in self.inputs)

    def versions(self) -> dict[str, str]:
        """Return the versions that the ids depend on."""
        packages = ("tokenizers", "transformers")
        return {"megatron-infoentropy": __version__} | {name: version(name) for name in packages}

    def is_done(self) -> bool:
        """Say whether `output` is what this would make: of these inputs, tokenizer and options."""
        if not self.can_go_on():
            return False
        try:
            made = load_manifest(self.output)
            for name, facts in made.domains.items():
                require_whole(made.prefix(name), facts.tokens)
        except ValueError:
            return False
        made_ns = (self.output / MANIFEST).stat().st_mtime_ns
        return (
            len(made.inputs) == len(self.inputs)
            and made.tokenizer.sha256 == self.loaded.sha256
            and made.options == self.options
            and (made.shard, made.shards_of) == (self.shard, self.shards_of)
            and all(
                _is_that_of(facts, each, made_ns)
                for facts, each in zip(made.inputs, self.inputs, strict=True)
            )
        )

    def require_unchanged(self, number: int, sha256: str) -> None:
        """Check that an input still has the content that was read.

        Raises:
            UnfitDocumentsError: it was written to or replaced since the task began.
        """
        path, before, _, changed_ns = self.inputs[number]
        is_dated = changed_ns != UNDATED
        if is_dated and path.stat().st_ctime_ns == changed_ns:
            return
        now = input_of(path).facts
        same = (now.bytes, now.samples) == (before.bytes, before.samples)
        if not same or (is_dated and file_sha256(path) != sha256):
            raise UnfitDocumentsError(
                f"{path} changed while it was read (it had {before.bytes} bytes and has "
                f"{now.bytes}): give the command again when nothing writes to it any more"
            )

    def manifest(self, folder: Path, inputs: Sequence[InputFacts]) -> Manifest:
        """Return the manifest of the finished run, still without domains."""
        loaded = self.loaded
        added = loaded.added_around() if self.options.special_tokens else None
        start_ids = tuple(added[0]) if added else ()
        return Manifest(
            folder=folder,
            tokenizer=TokenizerFacts(loaded.sha256, loaded.vocab_size, loaded.eod_id, start_ids),
            dtype=token_dtype(loaded.vocab_size).name,
            append_eod=self.options.append_eod,
            domains={},
            options=self.options,
            versions=self.versions(),
            engine=self.engine_version(),
            inputs=tuple(inputs),
            shard=self.shard,
            shards_of=self.shards_of,
        )


def _is_that_of(facts: InputFacts, file: Input, made_ns: int) -> bool:
    """Say whether a file is the one in a manifest; all of it is read if it changed since then."""
    ours, theirs = file.facts, facts
    if (ours.name, ours.bytes, ours.samples) != (theirs.name, theirs.bytes, theirs.samples):
        return False
    return file.changed_ns < made_ns or file_sha256(file.path) == facts.sha256


def shard_inputs(inputs: Sequence[Path], shard: tuple[int, int]) -> list[Path]:
    """Return the inputs of shard (i, n), i from 0; none where a file is larger than a part.

    Raises:
        ValueError: i is not in 0..n-1, or there are fewer files than shards.
    """
    index, number = shard
    if not 0 <= index < number:
        raise ValueError(f"--shard i/n needs i in 0..n-1, got {index}/{number}")
    if number > len(inputs):
        raise ValueError(
            f"input files are not split: {len(inputs)} of them can not make {number} shards; "
            "ask for fewer, or give the text as more files"
        )
    sizes = [path.stat().st_size for path in inputs]
    total = max(sum(sizes), 1)
    chosen, before = [], 0
    for path, size in zip(inputs, sizes, strict=True):
        middle = 2 * before + size  # in half bytes, so that all jobs agree exactly
        if min(middle * number // (2 * total), number - 1) == index:
            chosen.append(path)
        before += size
    return chosen


def shards_digest(inputs: Sequence[Path]) -> str:
    """Return a digest of the list that is shared out: which shard has which file depends on it."""
    listed = [(path.name, path.stat().st_size) for path in inputs]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def shard_name(shard: tuple[int, int]) -> str:
    """Name the folder of one shard; names sort in order."""
    return f"shard-{shard[0]:05d}-of-{shard[1]:05d}"


def require_parts(inputs: Sequence[Path]) -> None:
    """Check that the inputs can be shared out.

    Raises:
        ValueError: standard input is one of them.
    """
    if any(isinstance(path, StandardInput) for path in inputs):
        raise ValueError(
            "standard input (-) can not be shared out among shards or tasks, as each would have to "
            "read all of it: write it to files and name those"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """Return (3, 10) for `3/10`.

    Raises:
        ValueError: it is not two numbers with a slash between.
    """
    index, slash, number = text.partition("/")
    if not (slash and index.isascii() and index.isdigit() and number.isdigit()):
        raise ValueError(f"--shard must be i/n with i in 0..n-1, such as 0/10, got {text!r}")
    return int(index), int(number)


def preprocess(
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    *,
    options: DataOptions = DEFAULT_OPTIONS,
    workers: int = 1,
    engine: str = "auto",
    max_errors: int = 0,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Write `output/<slug>.bin/.idx` per domain, the token counts and the manifest.

    `tokenizer` is a Hugging Face tokenizer folder, `workers` the number of encoding processes,
    `engine` what encodes in them, with the same ids: hf, gigatoken (many times as fast), or auto,
    which is gigatoken where it may be used; `say` is told which and why. Up to `max_errors` lines
    that hold no document are skipped, counted and listed. `shard` (i, n) does part i of n of the
    inputs into a folder of its own below `output`. `overwrite` replaces a dataset of other inputs
    or options. Given again after whatever ended it, the same call goes on (`restart`: begins anew);
    given again after it was done, it does nothing.

    Raises:
        BrokenLineError: a line that holds no document, by file and number.
        WorkerDied, DiskFull: with what to do.
        ValueError: inputs, tokenizer or output that can not be used; two domains with one slug.
            Whatever the error, `output` is left as it was.
    """
    require_usable(inputs, workers, max_errors)
    shards_of = "" if shard is None else shards_digest(inputs)
    if shard is not None:
        require_parts(inputs)
        inputs, output = shard_inputs(inputs, shard), output / shard_name(shard)
    files = list(map(input_of, inputs))
    task = Task(files, output, load_tokenizer(tokenizer), options, shard, shards_of)
    with work_folder(output) as work:
        try:
            if restart:
                (work / JOURNAL).unlink(missing_ok=True)
            if not task.is_done():
                require_free(output, OUTPUT_FILES, overwrite)
                task = replace(task, engine=engine_for(engine, task, say))
                settings = WorkerSettings(task.loaded, options, task.engine)
                with full_disk_is_said(work):
                    publish(_make(task, settings, work, workers, max_errors), output)
            (work / JOURNAL).unlink(missing_ok=True)
        except UnfitDocumentsError:
            (work / JOURNAL).unlink(missing_ok=True)
            raise
        finally:
            if not (work / JOURNAL).exists():  # nothing to go on from
                shutil.rmtree(work)
    return load_manifest(output)


def engine_for(asked: str, task: Task, say: Callable[[str], object]) -> str:
    """Return the engine to use; gigatoken is tried out here, once for all workers."""
    name, why = choose_engine(asked, task.loaded, special_tokens=task.options.special_tokens)
    if asked == "auto":
        say(f"engine {name}: {why}")
    return name


def _make(task: Task, settings: WorkerSettings, work: Path, workers: int, max_errors: int) -> Path:
    """Run from the journal's place to the end; returns the finished folder."""
    run = JournalledRun(
        work,
        job=task.job(),
        inputs=[replace(each.facts) for each in task.inputs],
        vocab_size=task.loaded.vocab_size,
        max_errors=max_errors,
        is_saved=task.can_go_on(),
    )
    with closing(run):
        sizes = [each.facts.bytes for each in task.inputs]
        before = sum(sizes[: run.state.file])
        with progress("preprocess", sum(sizes) or None, "bytes", before) as advance:
            blocks = _read(task, settings.keys, run, advance)
            for block, encoded in encode_blocks(settings, blocks, workers=workers):
                run.add(block, encoded)
                if not block.lines:
                    task.require_unchanged(run.state.file - 1, block.sha256)
        if not run.rejected:
            (run.dataset / REJECTED).unlink()
        finish(task.manifest(run.dataset, run.state.inputs), run.writers)
        for number, facts in enumerate(run.state.inputs):
            task.require_unchanged(number, facts.sha256)
    return run.dataset


def _read(
    task: Task, keys: Keys, run: JournalledRun, advance: Callable[[int], None]
) -> Iterator[Block]:
    file, start = run.state.file, run.position
    for each in task.inputs[file:]:
        yield from read_blocks(each.path, advance, start, keys)
        start = Position()


def require_usable(inputs: Sequence[Path], workers: int, max_errors: int) -> None:
    """Check what can be checked before anything is queued or begun.

    Raises:
        ValueError: no inputs, one that is no file or given twice, or a number that cannot be.
    """
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
