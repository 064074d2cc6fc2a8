"""The choices that decide which bytes preprocessing writes; the manifest records them."""

from dataclasses import dataclass

PILE_DOMAIN = "meta.pile_set_name"
AUTO = "auto"


@dataclass(frozen=True)
class Options:
    """Megatron's own choices are the defaults.

    Attributes:
        append_eod: end every document that has a token with the end-of-document token.
        special_tokens: keep what the tokenizer adds itself, such as a start token. False is
            Megatron's --tokenizer-hf-no-include-special-tokens.
        text_key: where a record has its text (Megatron's --json-keys).
        split_by: where a record names its domain, dots leading into objects; None for one dataset.
            AUTO, which no manifest holds, is PILE_DOMAIN where the first documents have it, else
            None.
        piece_tokens, piece_documents: `pack` cut so many documents in a row into such pieces; 0
            where documents are whole.
    """

    append_eod: bool = True
    special_tokens: bool = True
    text_key: str = "text"
    split_by: str | None = AUTO
    piece_tokens: int = 0
    piece_documents: int = 0


DEFAULT_OPTIONS = Options()
