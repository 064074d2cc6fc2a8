"""What to train, on what: the flags of one training, checked before anything starts."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.blend import blend
from megatron_infoentropy.data.indexed import require_whole
from megatron_infoentropy.data.manifest import MANIFEST, load_manifest
from megatron_infoentropy.data.tokenizer import (
    TOKENIZER,
    load_with_transformers,
    tokenizer_digest,
)
from megatron_infoentropy.launch.recipe import (
    PREFIX,
    RecipeError,
    chosen_flags,
    last_value,
    load_plan,
    load_recipe,
    ranks_of_a_model,
    read_facts,
    to_command_line,
)
from megatron_infoentropy.runtime.device import Device

SPLITS = {"train": "train-data-path", "validation": "valid-data-path", "test": "test-data-path"}
CONVERSATIONS = "{}.jsonl"  # in a data folder, in place of a split's tokens


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, where.

    `settings` are flags given beside the recipe (names without dashes); what neither says has the
    published or usual value, see `DEFAULTS`. Of a flag said twice the last counts: default, recipe,
    settings, extra flags.
    """

    recipe: Path
    data: Path  # holds train/, validation/ and test/ token datasets
    tokenizer: Path
    run: Path
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: int | None = None  # on this machine; None is as many as it has use for
    extra_flags: tuple[str, ...] = ()
    switch: bool = False  # go on from a checkpoint of another loss or seed

    def flags(self, device: Device) -> list[str]:
        """Return the whole command line of every rank.

        Raises:
            ValueError: a recipe, a setting or a dataset that cannot be used.
        """
        places = {"data": self.data, "tokenizer": self.tokenizer, "run": self.run}
        return command_line(device, self.recipe, self.settings, self.extra_flags, **places)


def command_line(
    device: Device,
    recipe: Path,
    settings: dict[str, Any],
    extra_flags: tuple[str, ...],
    *,
    data: Path | None = None,
    tokenizer: Path | None = None,
    run: Path | None = None,
) -> list[str]:
    """Return the flags of a training; without data Megatron makes some up.

    Raises:
        ValueError: a recipe, a setting or a dataset that cannot be used.
    """
    chosen = chosen_flags(device, load_recipe(recipe), settings)
    words = [*chosen, *extra_flags]
    read_facts(words)  # what was mistyped, before any file is opened
    if tokenizer is not None:
        places = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": tokenizer}
        places |= _reading_flags(recipe, words, data, tokenizer)
    elif data is not None:
        raise ValueError("--data needs the --tokenizer it was made with")
    elif last_value(words, "vocab-size") is None:
        raise RecipeError(f"{recipe} does not say vocab-size: add it, or name a --tokenizer")
    else:
        places = {"tokenizer-type": "NullTokenizer", "mock-data": True}
    if run is not None:
        places |= dict.fromkeys(("save", "load"), run / "checkpoints")
    return [*chosen, *to_command_line(places), *extra_flags]


def _reading_flags(
    recipe: Path, words: list[str], data: Path | None, tokenizer: Path
) -> dict[str, Any]:
    """Return the flags of the data, blended as the recipe plans; without any, made-up ones.

    With --eval-iters 0 only training data are named: Megatron fails on others of which it wants no
    sample.
    """
    if data is None:
        require_tokenizer(tokenizer)
        return {"mock-data": True}
    if conversation_files(data):
        return _conversation_flags(recipe, words, data, tokenizer)
    made_with = load_manifest(data / "train").tokenizer
    _require_vocabulary(recipe, words, made_with.vocab_size)
    require_tokenizer(tokenizer, made_with.sha256)
    weights = {"train": load_plan(recipe).data_weights}
    splits = [s for s in SPLITS if s == "train" or last_value(words, "eval-iters") != "0"]
    return {
        **{SPLITS[split]: _blend(data / split, weights.get(split, "natural")) for split in splits},
        "data-cache-path": _index_cache(data, splits),
    }


def conversation_files(data: Path) -> dict[str, Path]:
    """Return the files of a data folder that holds conversations, by split; else none."""
    paths = {split: data / CONVERSATIONS.format(split) for split in SPLITS}
    there = {split: path for split, path in paths.items() if path.is_file()}
    return there if "train" in there else {}


def _conversation_flags(
    recipe: Path, words: list[str], data: Path, tokenizer: Path
) -> dict[str, Any]:
    """Return the flags of data that are conversations, a file a split."""
    require_tokenizer(tokenizer)
    used = load_with_transformers(tokenizer)
    _require_vocabulary(recipe, words, len(used))
    if not used.chat_template:
        raise ValueError(
            f"{tokenizer} has no chat template: put a chat_template.jinja into it, or name the "
            "folder of a model that was made for chats"
        )
    paths = conversation_files(data)
    if last_value(words, "eval-iters") == "0":
        paths = {"train": paths["train"]}
    elif "validation" not in paths:
        raise ValueError(
            f"{data / CONVERSATIONS.format('validation')} is not there: put conversations for "
            "validation there, or give --eval-iters 0"
        )
    by_split = {SPLITS[split]: path for split, path in paths.items()}
    return {f"{PREFIX}-conversations": True, **by_split}


def _index_cache(data: Path, splits: Iterable[str]) -> Path:
    """Return where Megatron keeps its indices of these very data.

    It knows an index again by the dataset's path alone, also where the data were made anew.
    """
    digest = hashlib.sha256()
    for split in splits:  # a manifest holds the checksums of the dataset's files
        digest.update((data / split / MANIFEST).read_bytes())
    return data / "cache" / digest.hexdigest()[:16]


def _require_vocabulary(recipe: Path, words: list[str], size: int) -> None:
    """Check that the vocabulary of the data's tokenizer is the recipe's.

    A model that comes from elsewhere may have more rows than its tokenizer has tokens.
    """
    wanted = load_recipe(recipe).get("vocab-size") or size
    has_more_rows = size < wanted and last_value(words, "pretrained-checkpoint")
    if wanted != size and not has_more_rows:
        raise RecipeError(
            f"{recipe} is for a vocabulary of {wanted}, the tokenizer of the training data has "
            f"{size}; use the tokenizer that the recipe is for, or change vocab-size in the recipe"
        )


def require_tokenizer(tokenizer: Path, sha256: str | None = None) -> None:
    """Check that there is one, which the ranks else look for on the Hugging Face Hub.

    sha256: the digest of the tokenizer that the training data were made with.

    Raises:
        ValueError: there is none, it is damaged, or it is another one.
    """
    if not (tokenizer / TOKENIZER).is_file():
        raise ValueError(
            f"{tokenizer} holds no {TOKENIZER}: give --tokenizer the folder that "
            "`infoentropy preprocess` was given, for conversations that of the model"
        )
    digest = tokenizer_digest(tokenizer)  # names a damaged file, which Megatron does not
    if sha256 not in (None, digest):
        raise ValueError(
            f"{tokenizer} is not the tokenizer that the training data were made with: its "
            f"{TOKENIZER}, special tokens or settings differ; name theirs, or preprocess the text "
            "again"
        )


def require_places(
    *, data: Path | None, tokenizer: Path | None, run: Path | None
) -> tuple[Path, Path, Path]:
    """Return the three folders that a training needs and a dry run does not.

    Raises:
        ValueError: names those that are missing.
    """
    if data is None or tokenizer is None or run is None:
        given = {"--data": data, "--tokenizer": tokenizer, "--run": run}
        missing = ", ".join(name for name, path in given.items() if path is None)
        raise ValueError(f"training needs {missing}; without them there is only --dry-run")
    return data, tokenizer, run


def require_layout(ranks: int, facts: dict[str, Any]) -> None:
    """Check that so many ranks can hold copies of the model, and that they can share the batch.

    Raises:
        ValueError: says which number to change.
    """
    model_ranks = ranks_of_a_model(facts)
    if ranks % model_ranks:
        axes = [f"{axis}-parallel {facts[f'{axis}_parallel']}" for axis in ("tensor", "pipeline")]
        if facts["context_parallel"] > 1:
            axes.append(f"context-parallel {facts['context_parallel']}")
        raise ValueError(
            f"{ranks} ranks cannot be split into {' x '.join(axes)}; use a multiple of "
            f"{model_ranks}"
        )
    batch, micro_batch = facts["global_batch_size"], facts["micro_batch_size"]
    copies = ranks // model_ranks
    if batch and micro_batch and batch % (micro_batch * copies):
        raise ValueError(
            f"a global batch of {batch} cannot be shared by {copies} data-parallel ranks in "
            f"micro-batches of {micro_batch}: make global-batch-size a multiple of "
            f"{micro_batch * copies}, or change micro-batch-size or the number of ranks"
        )


def _blend(dataset: Path, weights: str) -> list[Any]:
    """Return [weight, prefix, weight, prefix, ...]."""
    shares = blend(dataset, weights)
    for share in shares:
        require_whole(share.prefix, share.tokens)  # before any rank stumbles over a cut-off one
    return [word for share in shares for word in (share.weight, share.prefix)]
