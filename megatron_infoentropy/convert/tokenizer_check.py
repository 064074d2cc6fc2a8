"""Whether transformers cuts text as a tokenizer.json says.

transformers 5 has tokenizers of its own for some families, which take the vocabulary of the file
and leave its rules: in a Qwen2 folder always, elsewhere where tokenizer_config.json names another
class than the generic one, or none.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of transformers 5 and 4
_PROBE = "They've 1234 (or 5,678):\n\n\tx += '\xe9t\xe9'  # \u6f22\u5b57 e\u0301 IT'S <b>\r\n  end "


def cuts_as_qwen2(folder: Path) -> bool:
    """Say whether a tokenizer folder's rules are those that transformers has for Qwen2."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _first_cut_otherwise(tokenizer, _with_rules_of_qwen2(tokenizer)) is None


def tokenizer_differences(folder: Path) -> list[str]:
    """Load a folder's tokenizer as transformers does and compare it with tokenizer.json.

    Id by id, and by how text is cut: for some models transformers has rules of its own, and
    ignores those of the file. Returns one line for every kind of difference; none where there is
    no tokenizer.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return []
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    used = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    written, loaded = stored.get_vocab(with_added_tokens=True), used.get_vocab()
    other = [token for token in written if loaded.get(token) != written[token]]
    more = [token for token in loaded if token not in written]
    differences = [
        f"{len(tokens)} tokens {what}, first {tokens[0]!r}"
        for what, tokens in (("have another id in transformers", other), ("are not stored", more))
        if tokens
    ]
    text = None if differences else _first_cut_otherwise(stored, used.backend_tokenizer)
    if text is not None:
        differences.append(f"{text!r} is cut in another way than tokenizer.json says")
    if differences and type(used).__name__ not in _GENERIC:
        differences[-1] += f"; {_advice(type(used).__name__, folder)}"
    return differences


def _advice(name: str, folder: Path) -> str:
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model == "qwen2":  # whatever class the files name
        return f"for Qwen2 transformers takes its {name}: --family llama exports another class"
    return (
        f"transformers takes its {name}: for one that reads the file, put "
        '"tokenizer_class": "PreTrainedTokenizerFast" into the tokenizer\'s tokenizer_config.json'
    )


def _first_cut_otherwise(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return a text that two tokenizers of one vocabulary cut in different ways.

    Every token's own text is tried: one that the other's rules divide would show nowhere else.
    """
    for tokenizer in (one, other):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids = sorted(one.get_vocab(with_added_tokens=True).values())
    texts = [*one.decode_batch([[i] for i in ids], skip_special_tokens=False), _PROBE]
    cuts = (t.encode_batch_fast(texts, add_special_tokens=False) for t in (one, other))
    pairs = zip(texts, *cuts, strict=True)
    return next((text for text, a, b in pairs if a.ids != b.ids), None)


def _with_rules_of_qwen2(tokenizer: Tokenizer) -> Tokenizer:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.NFC()
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return other
