"""The training data as one rank sees them: every file opened, its share of them read whole."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.data.indexed import IndexedReader, bin_path, idx_path
from megatron_infoentropy.data.manifest import MANIFEST, DomainFacts, load_manifest
from megatron_infoentropy.files import file_sha256
from megatron_infoentropy.progress import progress

READING = "checksums"  # what its progress is called
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Share:
    """Whose checksums to compare: every `of`-th file's from number `index` on, largest first."""

    index: int = 0
    of: int = 1


@dataclass
class DataFacts:
    """What was found; `problems` are sentences."""

    tokenizer: str  # SHA-256 in the manifest of the training data
    manifests: str  # one SHA-256 of all: ranks that differ in it read other data; "" with problems
    opened: int
    compared: int  # files whose checksum was computed
    compared_bytes: int
    problems: list[str]


def look(data: Path, share: Share) -> DataFacts:
    """Look at the datasets below `data`; nothing is raised, problems are told."""
    found = DataFacts("", "", 0, 0, 0, [])
    digest = hashlib.sha256()
    sums: dict[Path, str] = {}
    missing = [split for split in SPLITS if not (data / split / MANIFEST).is_file()]
    if missing:
        found.problems.append(
            f"{data} holds no datasets {', '.join(missing)} (no manifest.json in them): name "
            "another --data, or preprocess the text"
        )
    for split in (split for split in SPLITS if split not in missing):
        try:
            manifest = load_manifest(data / split)
            digest.update((data / split / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            found.problems.append(str(error))
            continue
        if split == "train":
            found.tokenizer = manifest.tokenizer.sha256
        for name, domain in manifest.domains.items():
            sums |= _open(manifest.prefix(name), domain, found)
    if not found.problems:
        found.manifests = digest.hexdigest()
    found.opened = len(sums)
    written = [path for path, sha256 in sums.items() if sha256]
    by_size = sorted(written, key=lambda path: path.stat().st_size, reverse=True)
    _compare({path: sums[path] for path in by_size[share.index :: share.of]}, share, found)
    return found


def _open(prefix: Path, domain: DomainFacts, found: DataFacts) -> dict[Path, str]:
    """The files with their checksums, if they are there and of the right sizes."""
    try:
        IndexedReader(prefix)
    except (OSError, ValueError) as error:
        found.problems.append(str(error))
        return {}
    return {bin_path(prefix): domain.bin_sha256, idx_path(prefix): domain.idx_sha256}


def _compare(sums: dict[Path, str], share: Share, found: DataFacts) -> None:
    sizes = {path: path.stat().st_size for path in sums}
    quiet = nullcontext(lambda work: None)
    told = share.index == 0 and sums
    with progress(READING, sum(sizes.values()), "bytes") if told else quiet as advance:
        for path, sha256 in sums.items():
            try:
                right = file_sha256(path) == sha256
            except OSError as error:
                found.problems.append(f"{path} cannot be read: {error}")
                continue
            if not right:
                found.problems.append(
                    f"{path} is not what was written, its checksum differs from the manifest's: "
                    "look with `infoentropy verify`, or preprocess it again"
                )
            found.compared_bytes += sizes[path]
            advance(sizes[path])
    found.compared = len(sums)
