"""The model that is scored: where it comes from, its processes, whether it fits, its logits."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_infoentropy.data.tokenizer import TOKENIZER, tokenizer_digest

# The others may have much more to do; one that died ends all of them, which is torchrun's work.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int
    size: int

    def wait(self) -> None:
        """Return when all have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of torchrun over gloo while the block runs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1)
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """Return a device; of "auto" this process's own GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """A model that is not loaded yet.

    `kind` and `facts` are written into the evaluation; `tokenizer` is the folder of the tokenizer
    it was trained with, `trained_on` that tokenizer's digest in the training data's manifest, where
    it is known; `load` gives a causal language model of transformers in the dtype asked for.
    """

    kind: str
    tokenizer: Path
    load: Callable[[torch.dtype], Any]
    facts: dict[str, Any] = field(default_factory=dict)
    trained_on: str | None = None


@dataclass(frozen=True)
class ScoringModel:
    """A causal language model in evaluation mode, on the device it is scored on."""

    network: Any
    device: torch.device
    dtype: torch.dtype

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return next-token logits [rows, positions, vocabulary] of int64 [rows, positions].

        No attention mask: padding stands to the right, where a causal model cannot see it.
        """
        logits: torch.Tensor = self.network(tokens.to(self.device), use_cache=False).logits
        return logits

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def vocab_size(self) -> int:
        return int(self.network.config.vocab_size)

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "class": type(self.network).__name__,
            "parameters": self.parameters,
            "vocab_size": self.vocab_size,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def weights_sha256(self) -> str:
        """Return the SHA-256 of every parameter's name, shape and numbers, as computed with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
            numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(numbers.numpy())
        return digest.hexdigest()


def hugging_face(folder: Path) -> ModelSource:
    """Return the model of a Hugging Face folder, see `load_hugging_face`.

    Raises:
        ValueError: there is no config.json (the name would be looked for on the network).
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"expected {folder} to be a Hugging Face model folder or a Megatron checkpoint; it "
            "holds no config.json, and neither latest_checkpointed_iteration.txt nor .metadata"
        )
    return ModelSource("huggingface", folder, partial(load_hugging_face, folder))


def load_hugging_face(folder: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model of transformers; nothing is fetched, no code in it is run.

    Raises:
        ValueError: a part of the model that config.json describes has no weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # between ours
    network, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        dtype=dtype,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):  # random now, and but for a warning unseen
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors of the model that "
            f"config.json describes, first {missing[0]}; copy the folder again, or export the "
            "model anew"
        )
    return network


def load_model(source: ModelSource, device: torch.device, dtype: str) -> ScoringModel:
    """Load a model and put it on a device.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    network = source.load(DTYPES[dtype])
    return ScoringModel(network.to(device).eval(), device, DTYPES[dtype])


def require_same_tokenizer(source: ModelSource, sha256: str) -> None:
    """Refuse a model whose tokenizer is not the one the data was written with.

    Raises:
        ValueError: the tokenizer is missing, damaged, or not that of the data or of the training
            data.
    """
    folder = source.tokenizer
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"{folder} holds no {TOKENIZER}, so nothing tells whether the data's token ids mean "
            "the same to this model: copy the model's tokenizer there"
        )
    digest = tokenizer_digest(folder)
    if digest != sha256:
        raise ValueError(
            f"the tokenizer in {folder} is not the one the data was written with: token ids would "
            "not mean the same; preprocess the data with this tokenizer, or evaluate the model "
            "that belongs to it"
        )
    if source.trained_on not in (None, digest):
        raise ValueError(
            f"the model was trained on data of another tokenizer than the one in {folder}: name "
            "the tokenizer of the training data, and preprocess this data with it"
        )


def require_same_vocabulary(model: ScoringModel, vocab_size: int) -> None:
    """Refuse a model that predicts fewer tokens than the data's tokenizer has.

    Many published models have more rows than their tokenizers have tokens: they are part of the
    softmax, as in the model's own training.

    Raises:
        ValueError: naming both sizes.
    """
    if model.vocab_size < vocab_size:
        raise ValueError(
            f"the model predicts {model.vocab_size} tokens, the data's tokenizer has {vocab_size}: "
            "preprocess the data with the model's tokenizer"
        )


def context_length_of(model: ScoringModel, wanted: int | None) -> int:
    """Return the context length to score with: what is wanted, else all the model's positions.

    Raises:
        ValueError: more than the model has positions for, or a model that does not say how many.
    """
    positions = getattr(model.network.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        raise ValueError(
            f"the model's configuration states no max_position_embeddings (got {positions!r}); "
            "add the context length it was trained with"
        )
    if wanted is None:
        return positions
    if wanted < 1:
        raise ValueError(f"context_length must be at least 1, got {wanted}")
    if wanted > positions:
        raise ValueError(
            f"a context of {wanted} tokens was asked for, the model has {positions} positions: "
            f"choose at most {positions}, or leave it out"
        )
    return wanted
