"""Loading a Hugging Face folder for scoring: local files only, no code from the folder."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.evaluate.errors import (
    ModelFolderError,
    TokenizerMismatchError,
    VocabularyMismatchError,
)


@dataclass(frozen=True)
class ScoringModel:
    """A causal language model in fp32, in evaluation mode, on the device it is scored on."""

    network: Any
    device: torch.device
    context_length: int

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits, fp32 [rows, positions, vocabulary], of int64 tokens [rows, positions].

        No attention mask: padding stands to the right, where a causal model cannot see it.
        """
        logits: torch.Tensor = self.network(tokens.to(self.device), use_cache=False).logits
        return logits

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def load_model(folder: Path, device: str = "auto") -> ScoringModel:
    """Load the model of a Hugging Face folder in fp32.

    Args:
        folder: holds config.json and the weights; nothing is fetched and no code in it is run.
        device: a torch device, or "auto": the first GPU where there is one, else the CPU.

    Raises:
        ModelFolderError: a model without a stated context length.
    """
    from transformers import AutoModelForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _without_progress_bars():
        network = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
    context_length = getattr(network.config, "max_position_embeddings", None)
    if not isinstance(context_length, int) or context_length < 1:
        raise ModelFolderError(
            f"{folder / 'config.json'} states no max_position_embeddings (got {context_length!r}); "
            "add the context length the model was trained with"
        )
    return ScoringModel(network.to(device).eval(), torch.device(device), context_length)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading draws a bar of its own between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def require_model_folder(folder: Path) -> None:
    """Refuse what is no model folder (a name that is none would be looked for on the network).

    Raises:
        ModelFolderError: there is no config.json.
    """
    if not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"{folder} holds no config.json, expected a Hugging Face model folder: "
            "export the checkpoint with `infoentropy convert` first"
        )


def require_same_tokenizer(folder: Path, sha256: str) -> None:
    """Refuse a model whose tokenizer.json is not the one the data was written with.

    Raises:
        TokenizerMismatchError: tokenizer.json is missing or has another hash.
    """
    path = folder / "tokenizer.json"
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != sha256:
        raise TokenizerMismatchError(
            f"{path} has sha256 {found}, but the data was written with {sha256}: token ids would "
            "not mean the same; preprocess the data with this tokenizer, or evaluate the model "
            "that belongs to it"
        )


def require_same_vocabulary(model: ScoringModel, vocab_size: int) -> None:
    """Refuse a model that predicts more or fewer tokens than the data's tokenizer has.

    Raises:
        VocabularyMismatchError: naming both sizes.
    """
    size = model.network.config.vocab_size
    if size != vocab_size:
        raise VocabularyMismatchError(
            f"the model's vocabulary is {size}, the data's tokenizer has {vocab_size}: padding "
            "must be cut when a checkpoint is exported (`infoentropy convert` does)"
        )
