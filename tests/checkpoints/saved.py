"""Folders as a training leaves them, with a few bytes in place of a model."""

from pathlib import Path

from megatron_infoentropy import checkpoints


def save(root: Path, iteration: int, *, complete: bool = True) -> Path:
    """One checkpoint; the tracker names it."""
    files = checkpoints.path_of(root, str(iteration))
    (files / "rank").mkdir(parents=True)
    (files / ".metadata").write_bytes(b"index")
    (files / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
    (files / "rank" / "0.pt").write_bytes(b"state")
    (root / checkpoints.TRACKER).write_text(str(iteration))
    if complete:
        checkpoints.write_manifest(files)
    return files


def ours(root: Path, *iterations: int) -> Path:
    """A --save folder that has had manifests from the first."""
    checkpoints.begin_record(root)
    for iteration in iterations:
        save(root, iteration)
    return root
