"""The folder given to `--save`: its checkpoints, the one Megatron's tracker names, which are ours.

A checkpoint without a manifest is unfinished where manifests are written, and as good as any
where Megatron alone has saved. `infoentropy_checkpoints.json` tells them apart.
"""

import json
import re
from pathlib import Path

from megatron_infoentropy.checkpoints.manifest import has_manifest, write_whole

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "infoentropy_checkpoints.json"
RELEASE = "release"
_FOLDER = re.compile(r"iter_(\d{7,18})", re.ASCII)
_NAME = re.compile(rf"{RELEASE}|\d{{1,18}}", re.ASCII)


def path_of(save: Path, name: str) -> Path:
    """Where the checkpoint is that the tracker calls `name`: an iteration, or "release"."""
    return save / (name if name == RELEASE else f"iter_{int(name):07d}")


def read_tracker(save: Path) -> str | None:
    """What the tracker names: an iteration, "release", "" if it is damaged, None without one."""
    try:
        words = (save / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    return words if _NAME.fullmatch(words) else ""


def point_tracker(save: Path, name: str | None) -> None:
    """Have the tracker name this checkpoint; None removes it: a training starts anew.

    Raises:
        OSError: the folder cannot be written to.
    """
    if name is None:
        (save / TRACKER).unlink(missing_ok=True)
    else:
        write_whole(save / TRACKER, name)


def iterations(save: Path) -> list[int]:
    """Those with a folder, in order."""
    found = (_FOLDER.fullmatch(path.name) for path in save.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def with_manifest(save: Path) -> list[int]:
    """Iterations that have a manifest, true or not, in order."""
    return [it for it in iterations(save) if has_manifest(path_of(save, str(it)))]


def begin_record(save: Path) -> None:
    """From now on a checkpoint without a manifest is unfinished, except for those here now.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not (save / RECORD).is_file():
        save.mkdir(parents=True, exist_ok=True)
        named = read_tracker(save)
        newest = int(named) if named and named != RELEASE else -1
        names = [RELEASE] * (save / RELEASE).is_dir()
        names += [str(it) for it in iterations(save) if it <= newest]
        write_whole(save / RECORD, json.dumps({"format": 1, "before": names}) + "\n")


def foreign(save: Path) -> list[str]:
    """Checkpoints that may lack a manifest, since Megatron alone saved them, the newest last."""
    try:
        names = json.loads((save / RECORD).read_bytes())["before"]
        return [name for name in names if _NAME.fullmatch(name) and path_of(save, name).is_dir()]
    except FileNotFoundError:
        named = read_tracker(save)
        return [named] if named and not with_manifest(save) else []
    except (ValueError, LookupError, TypeError):
        return []
