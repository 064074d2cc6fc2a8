"""Tokenizer folders: a byte-level BPE trained on a corpus, and any of Hugging Face's loaded.

A folder is loaded by transformers, as by Megatron's own tool: some ids depend on other files than
tokenizer.json, and on rules that transformers has for a class or a model. What it makes of them is
taken over into `tokenizers` alone, which is faster. Where transformers would leave tokenizer.json
as it is, which can be told from the other files, it is not asked: it takes seconds to import.

A trained folder holds `tokenizer.json` and `tokenizer_config.json`, which is what Megatron's
HuggingFaceTokenizer and transformers' AutoTokenizer open, offline too.

`<|endoftext|>` is the only special token: end of document for Megatron (eos), start of an empty
prompt for generation (bos). It is deliberately no padding token: Megatron's GPT dataset takes the
padding id out of the loss, so a model would never learn where a document ends.

A document in which the characters `<|endoftext|>` stand gets the special id there, exactly as with
transformers and thus with Megatron's own tool.

An engine is a function from texts to their ids: all ids in a row, and how many each text has. What
is done per token besides encoding is kept to two passes in C: out of the library, into the array.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_infoentropy.data.blocks import Keys, require_readable
from megatron_infoentropy.data.indexed import Integers
from megatron_infoentropy.data.jsonl import read_documents
from megatron_infoentropy.files import new_folder
from megatron_infoentropy.progress import progress

END_OF_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS, _ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of transformers 5 and 4
_READ_BY_TRANSFORMERS = (CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS, "config.json")
_PROBES = (
    "",
    " cat",
    "\ncat",
    "They've 1234 (or 5,678):\n\n\tx += '\xe9t\xe9'  # \u6f22\u5b57 e\u0301 IT'S <b>\r\n  end ",
)
_TOKENS_IN_PROBE = 64
_LFS_POINTER = b"version https://git-lfs.github.com/"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
# Settings of tokenizer_config.json that change no id; one that is not known here may.
_CHANGE_NO_ID = {
    *("backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only"),
    *("max_length", "model_input_names", "model_max_length", "name_or_path", "pad_token_type_id"),
    *("pad_to_multiple_of", "padding", "padding_side", "processor_class", "return_token_type_ids"),
    *("special_tokens_map_file", "stride", "tokenizer_file", "truncation", "truncation_side"),
    *("truncation_strategy", "use_default_system_prompt"),
}
_SPECIAL_SETTINGS = {
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
}
_TRAINED_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}
_SMALLEST_VOCAB = 256 + 1  # every byte, so that any text has ids, and the special token


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what datasets record of it; `vocab_size` counts added tokens too.

    `sha256` is the folder's `tokenizer_digest`. With `as_text` the spelling of a special token is
    text like any other. It can be sent to other processes.
    """

    tokenizer: Tokenizer
    eod_id: int
    vocab_size: int
    sha256: str
    as_text: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = self.as_text  # which its own pickle leaves out

    def added_around(self) -> tuple[list[int], list[int]] | None:
        """Return the ids put before and behind a text; None where that changes the text's own."""
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return None


def train_tokenizer(
    corpus: Path | Sequence[Path],
    output: Path,
    *,
    vocab_size: int,
    text_key: str = "text",
    overwrite: bool = False,
) -> LoadedTokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens on files of texts.

    The same files give the same bytes. Domains are not looked at. Memory grows with the number of
    distinct words, not with the size of the corpus.

    Raises:
        ValueError: a broken line, a size below 257, a corpus with too few distinct words for the
            size, or an `output` folder that is not empty and may not be overwritten.
    """
    paths = [corpus] if isinstance(corpus, Path) else list(corpus)
    for path in paths:
        require_readable(path)
    if vocab_size < _SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size must be at least {_SMALLEST_VOCAB} (every byte and {END_OF_TEXT}), "
            f"got {vocab_size}"
        )
    with new_folder(output, replaceable=(TOKENIZER, CONFIG), overwrite=overwrite) as folder:
        total = sum(path.stat().st_size for path in paths)
        with progress("train tokenizer", total or None, "bytes") as advance:
            documents = chain.from_iterable(
                read_documents(path, Keys(text_key), advance) for path in paths
            )
            tokenizer = _train((document.text for document in documents), vocab_size)
        size = tokenizer.get_vocab_size()
        if size != vocab_size:
            raise ValueError(
                f"the corpus supports a vocabulary of {size} tokens, asked were {vocab_size}; "
                "use more text or a smaller vocabulary"
            )
        tokenizer.save(str(folder / TOKENIZER))
        config = json.dumps(_TRAINED_CONFIG, indent=2) + "\n"
        (folder / CONFIG).write_text(config, encoding="utf-8")
    return load_tokenizer(output)


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Open a Hugging Face tokenizer folder so that it encodes as transformers does.

    Raises:
        ValueError: a file is missing or damaged, transformers cannot load the folder, its ids are
            drawn at random, or it names no end-of-document (eos) token.
    """
    digest = tokenizer_digest(folder)
    tokenizer, end = _load_alone(folder) or _load_as_transformers(folder)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        eod_id=_eod_id(folder, tokenizer, end),
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
        sha256=digest,
        as_text=bool(tokenizer.encode_special_tokens),
    )


def _load_alone(folder: Path) -> tuple[Tokenizer, str | None] | None:
    """Open tokenizer.json and name the end token, where transformers would take it as it is.

    It does (`TokenizersBackend.__init__` in version 5) for its generic class, beside no model's
    configuration, where the settings name none but special tokens that tokenizer.json has. Else
    returns None, also for what it has to say no to.
    """
    settings, added = _settings(folder)
    is_generic = settings.pop("tokenizer_class", None) in GENERIC_CLASSES
    is_of_model = (folder / "config.json").exists()
    if added or is_of_model or not is_generic or not settings.keys() <= _SPECIAL_SETTINGS:
        return None
    described = settings.pop("added_tokens_decoder", {})
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        there = tokenizer.get_added_tokens_decoder()
        is_as_described = all(
            repr(AddedToken(**token)) == repr(there.get(int(number)))
            for number, token in described.items()
        )
    except Exception:  # the library has no narrower one
        return None
    texts = {token.content for token in there.values()}
    named = chain.from_iterable(
        value if isinstance(value, list) else [value] for value in settings.values()
    )
    if (
        version("transformers").partition(".")[0] != "5"
        or tokenizer.padding  # its token may be a new one
        or not is_as_described
        or not all(isinstance(name, str) and name in texts for name in named)
    ):
        return None
    _require_no_chance(folder, tokenizer)
    tokenizer.no_truncation()
    return tokenizer, settings.get("eos_token") or settings.get("sep_token")


def _load_as_transformers(folder: Path) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer that transformers makes of a folder, and its end token."""
    used = load_with_transformers(folder)
    tokenizer: Tokenizer = used.backend_tokenizer
    # A file saved with truncation or padding switched on would cut every document short;
    # transformers switches them off for a plain call too.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _require_same_ids(folder, tokenizer, used)
    return tokenizer, used.eos_token or used.sep_token  # which Megatron takes for want of an eos


def load_with_transformers(folder: Path) -> Any:
    """Return transformers' own tokenizer of a folder; nothing is fetched, no code in it is run.

    Raises:
        ValueError: a file is damaged, or transformers cannot load it, or only slowly.
    """
    for name in _READ_BY_TRANSFORMERS:
        _optional_json(folder / name)
    read_json(folder / TOKENIZER)
    from transformers import AutoTokenizer  # a second or more, so only where it is needed

    try:
        used = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the class that reads the files stumbles over
        raise ValueError(_why_not_loaded(folder, error)) from error
    if not isinstance(getattr(used, "backend_tokenizer", None), Tokenizer):
        raise ValueError(
            f"transformers has only a slow tokenizer for {folder}, a {type(used).__name__}: save a "
            f"fast one, or name another tokenizer_class in {folder / CONFIG}"
        )
    _require_no_chance(folder, used.backend_tokenizer)
    return used


def _require_no_chance(folder: Path, tokenizer: Tokenizer) -> None:
    model = tokenizer.model
    if getattr(model, "dropout", None) or getattr(model, "nbest_size", None) not in (None, 0, 1):
        raise ValueError(
            f"{folder / TOKENIZER} draws ids at random (dropout, or sampling): every run would "
            "give other data; remove that setting"
        )


def _why_not_loaded(folder: Path, error: Exception) -> str:
    path = folder / TOKENIZER
    try:
        Tokenizer.from_file(str(path))
    except Exception as cause:  # the library has no narrower one
        return (
            f"{path} is no tokenizer, a damaged one, or of a newer version of tokenizers: {cause}; "
            "copy or download it again"
        )
    return (
        f"transformers cannot load the tokenizer in {folder}, though its {TOKENIZER} is whole "
        f"({type(error).__name__}: {error}): look at {folder / CONFIG}, or save it anew"
    )


def _require_same_ids(folder: Path, tokenizer: Tokenizer, used: Any) -> None:
    """Compare the ids of a text that shows the usual rules with those of transformers.

    Raises:
        ValueError: they differ, so that something outside the fast tokenizer changes ids.
    """
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    spelled = "".join(f" x{token} y {token}z" for token in added[:_TOKENS_IN_PROBE])
    for text in (*_PROBES, _PROBES[-1] + spelled):
        for special in (True, False):
            ours = tokenizer.encode(text, add_special_tokens=special).ids
            if ours != used(text, add_special_tokens=special)["input_ids"]:
                raise ValueError(
                    f"the tokenizer in {folder} cannot be used: transformers' "
                    f"{type(used).__name__} gives other ids than its own fast tokenizer, first for "
                    f"{text[:40]!r}; save it as a PreTrainedTokenizerFast"
                )


def tokenizer_digest(folder: Path) -> str:
    """Return a digest of everything in a tokenizer folder that ids depend on.

    Those are tokenizer.json without its truncation and padding, and the settings of the other files
    that transformers reads beside it: special and added tokens, the end token, the class. How a
    file is spelled (spaces, order of keys) changes nothing.

    Raises:
        ValueError: a file is missing or damaged.
    """
    settings, added = _settings(folder)
    versions = settings.get("fast_tokenizer_files")  # from which transformers chooses by its own
    names = [TOKENIZER, *map(str, versions if isinstance(versions, list) else ())]
    rules = [
        read_json(folder / Path(name).name) | {"truncation": None, "padding": None}
        for name in names
    ]
    if settings.get("tokenizer_class") in GENERIC_CLASSES:
        del settings["tokenizer_class"]  # as if none were named
    content = json.dumps([rules, settings, added], sort_keys=True)
    return f"{hashlib.sha256(content.encode()).hexdigest()}:folder"


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings beside tokenizer.json that may change ids, and added tokens."""
    config, special, added = (
        _optional_json(folder / name) for name in (CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS)
    )
    settings = {key: value for key, value in config.items() if key not in _CHANGE_NO_ID}
    if "added_tokens_decoder" in config:  # transformers leaves the other files alone
        added = {}
    else:
        settings |= special
    return {key: value for key, value in settings.items() if value is not None}, added


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a tokenizer folder.

    Raises:
        ValueError: names the file, what is wrong with it and what to do.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.parent} is no tokenizer folder: it has no {path.name}; make one with "
            "`infoentropy tokenizer`, or save one of transformers there (save_pretrained)"
        )
    raw = path.read_bytes()
    if raw.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer and not the file itself: fetch it with `git lfs pull`, "
            "or download it again"
        )
    if raw.startswith(_BYTE_ORDER_MARKS):
        raise ValueError(
            f"{path} begins with a byte order mark, which transformers and Megatron cannot read: "
            "save it as UTF-8 without one"
        )
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        what = "is empty" if not raw.strip() else f"is no JSON in UTF-8 ({error})"
        raise ValueError(f"{path} {what}: copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {content!r:.40}: copy it again")
    return content


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _eod_id(folder: Path, tokenizer: Tokenizer, token: str | None) -> int:
    eod_id = None if token is None else tokenizer.token_to_id(str(token))
    if eod_id is None:
        raise ValueError(
            f"{folder / CONFIG} must name an eos_token, which ends documents; it names {token!r}. "
            "Add one, as Megatron needs it too"
        )
    return eod_id


Engine = Callable[[Sequence[str]], tuple[Integers, npt.NDArray[np.int64]]]

# Words whose ids are remembered. The library's own 10 000 are full of rare words after a few
# megabytes and are never replaced; ids do not depend on it.
_REMEMBERED_WORDS = 1 << 17
_TEXTS_AT_ONCE = 16  # an encoding takes some 150 bytes a token until its ids are taken out


def hf_engine(loaded: LoadedTokenizer, *, special_tokens: bool) -> Engine:
    """Encode as transformers and thus Megatron would, with or without start tokens and the like."""
    tokenizer = loaded.tokenizer
    if hasattr(tokenizer.model, "_resize_cache"):
        tokenizer.model._resize_cache(_REMEMBERED_WORDS)

    def encode(texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        ids = list(_ids(texts))
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
        return tokens, lengths

    def _ids(texts: Sequence[str]) -> Iterator[list[int]]:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first : first + _TEXTS_AT_ONCE]
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=special_tokens)
            yield from [encoding.ids for encoding in encodings]

    return encode


def end_documents(
    tokens: Integers, lengths: npt.NDArray[np.int64], eod_id: int
) -> tuple[Integers, npt.NDArray[np.int64]]:
    """Append `eod_id` to every document that has a token, as Megatron's tool does."""
    filled = lengths > 0
    ends = np.cumsum(lengths)[filled]
    return np.insert(tokens, ends, eod_id), lengths + filled
