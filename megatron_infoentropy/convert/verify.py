"""Whether a Hugging Face folder computes what a Megatron checkpoint computes.

The logits of both models are compared, Megatron's own wherever it can be run, in fp32 on texts of
full length, and so their loss: a wrong constant such as the norm's epsilon may leave every
next-token choice as it was, and still moves the largest logit difference a hundredfold. Compared
beside them is the tokenizer, id by id and by the text it cuts.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_infoentropy.convert.architecture import OF_EXPERTS
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.hf_config import read_config
from megatron_infoentropy.convert.hf_model import streamed_model, whole_model
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights
from megatron_infoentropy.convert.layers import Routes, StoredModel
from megatron_infoentropy.convert.megatron_model import MegatronModel, why_not_megatron
from megatron_infoentropy.convert.reference_model import ReferenceModel
from megatron_infoentropy.convert.tokenizer import tokenizer_differences
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.progress import progress

TOLERANCE = 1e-5
"""The largest difference between two fp32 logits that rounding explains, of the largest logit."""
LOSS_TOLERANCE = 1e-4
"""The largest difference between two mean cross entropies, in nats a token."""
SEQUENCES = 3
LONGEST = 4096
"""Beyond this a sequence costs more than it tells."""


@dataclass(frozen=True)
class Verification:
    """The outputs of both models for the same tokens; `passed` is the verdict."""

    tokens: int
    max_difference: float  # largest |logit - logit|
    max_logit: float  # largest |logit|, the scale of the above
    top1_agreement: float  # share of positions where both predict the same token
    megatron_loss: float  # mean cross entropy of the next token, in nats
    hf_loss: float
    not_megatron: str = ""  # why the first side is not Megatron's own forward pass
    differences: tuple[str, ...] = ()  # besides: of the vocabulary and the tokenizer

    @property
    def same_outputs(self) -> bool:
        close = self.max_difference <= TOLERANCE * self.max_logit  # NaN is not
        same_loss = abs(self.megatron_loss - self.hf_loss) <= LOSS_TOLERANCE
        return close and same_loss and self.top1_agreement == 1.0

    @property
    def passed(self) -> bool:
        return self.same_outputs and not self.differences

    def __str__(self) -> str:
        ratio = self.max_difference / self.max_logit if self.max_logit else math.inf
        lines = (
            f"logits over {self.tokens} tokens: largest difference {self.max_difference:.1e}, "
            f"{ratio:.1e} of the largest logit (at most {TOLERANCE:.0e} is rounding); same top "
            f"token {self.top1_agreement:.2%}",
            f"loss of these tokens: {self.megatron_loss:.6f} nats in Megatron, {self.hf_loss:.6f} "
            f"in transformers (at most {LOSS_TOLERANCE:.0e} apart)",
            "Megatron's side is a plain PyTorch forward pass of its parameters and arguments: "
            + self.not_megatron
            if self.not_megatron
            else "Megatron's side is its own forward pass",
            *self.differences,
        )
        return "\n".join(lines)


def prove(
    checkpoint: Path | MegatronCheckpoint,
    folder: Path,
    *,
    text: Path | None = None,
    data: Path | None = None,
    imported: bool = False,
) -> Verification:
    """Compare both sides on three texts of full length, as `verify_conversion` does, and insist.

    Args:
        checkpoint: Megatron's --save folder, or one iteration's folder in it.
        folder: the Hugging Face model.
        text: file to compare on; default: Python's reference texts.
        data: instead of `text` an indexed dataset, its path without .bin.
        imported: the checkpoint was made from the folder, not the other way round.

    Raises:
        ConversionError: they do not compute the same, with all that differs.
    """
    sequences = sequences_for(folder, text, data)
    result = verify_conversion(checkpoint, folder, sequences, imported=imported)
    if not result.passed:
        raise ConversionError(f"the two sides do not compute the same; {result}")
    return result


@dataclass(frozen=True)
class Proof:
    """A conversion's `check`: `prove` where memory allows or where it is insisted on.

    Otherwise an export's tokenizer is compared alone, which takes no memory.

    Raises:
        ValueError: text or data that cannot be compared on, or that nothing is to be compared on.
    """

    say: Callable[[str], object]  # told what was found
    insist: bool | None = None
    text: Path | None = None
    data: Path | None = None
    imported: bool = False

    def __post_init__(self) -> None:
        if self.insist is False and (self.text or self.data):
            raise ValueError("--text and --data are what is compared on: leave out --no-verify")
        require_readable(self.text, self.data)

    def __call__(self, checkpoint: MegatronCheckpoint, folder: Path) -> None:
        reason = why_not_now(folder) if self.insist is None else None
        if not reason and self.insist is not False:
            on = {"text": self.text, "data": self.data}
            self.say(str(prove(checkpoint, folder, **on, imported=self.imported)))
            return
        differences = [] if self.imported else tokenizer_differences(folder)
        if differences:
            raise ConversionError(f"the two sides are not the same; {'\n'.join(differences)}")
        if reason:
            self.say(f"not verified: {reason}; --verify insists")


def why_not_now(folder: Path) -> str | None:
    """Say why this machine cannot compare the models; None if it can."""
    return _too_much(memory_needed(folder, length_for(folder), streamed=True)) or None


def verify_conversion(
    checkpoint: Path | MegatronCheckpoint,
    folder: Path,
    sequences: Sequence[Sequence[int]],
    *,
    imported: bool = False,
) -> Verification:
    """Compare a Hugging Face folder with a Megatron checkpoint, whichever was made of the other.

    The checkpoint's parameters are rounded to the folder's dtype first, so that what is measured
    is the conversion and not the rounding that was asked for.

    Args:
        checkpoint: Megatron's --save folder, or one iteration's folder in it.
        folder: the Hugging Face side.
        sequences: token ids to run both models on; real text, of the full length, tells most.
        imported: the checkpoint was made of the folder, whose tokenizer nobody copied.

    Raises:
        ValueError: no two tokens in a sequence, or ids outside the vocabulary.
    """
    opened = MegatronCheckpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    config = read_config(folder)
    _require_tokens(sequences, config.vocab_size, config.max_position_embeddings)
    length = max(map(len, sequences))
    streamed = memory_needed(folder, length) > _free_memory()
    scores = 4 * 4 * config.num_attention_heads * length**2  # Megatron keeps all of a layer
    not_megatron = why_not_megatron() or _too_much(
        memory_needed(folder, length, streamed=streamed) + scores
    )
    dtype = HuggingFaceWeights(folder).dtype
    side = ReferenceModel(opened, dtype) if not_megatron else MegatronModel(opened, dtype)
    model = streamed_model(folder, config) if streamed else whole_model(folder)
    if config.model_type in OF_EXPERTS:
        _break_ties_alike(model, side.routes)
    differences = [] if imported else tokenizer_differences(folder)
    trained = getattr(opened.args, "vocab_size", None)
    if trained not in (None, config.vocab_size):
        differences.append(f"vocabulary: {config.vocab_size} rows, trained with {trained}")
    return Verification(
        **_compare_outputs(side, model, sequences),
        not_megatron=not_megatron,
        differences=tuple(differences),
    )


def memory_needed(folder: Path, length: int, *, streamed: bool = False) -> int:
    """Return about how many bytes the check allocates at most.

    All of transformers' model in fp32, or its tables and one layer if it is streamed; the tables
    and one layer of the other model; and logits. A layer is there in its own dtype too; of one with
    experts they are not counted but for one, where both sides read them one by one.
    """
    config = read_config(folder)
    weights = HuggingFaceWeights(folder)
    tables = 2 * config.vocab_size * config.hidden_size
    at_once: float = weights.parameters
    if streamed and config.model_type in OF_EXPERTS:  # they are read one by one
        of_experts = (t.shape for name, t in weights.tensors.items() if ".experts." in name)
        at_once -= sum(map(math.prod, of_experts)) * (1 - 1 / config.num_local_experts)
    layers = 4 * at_once / config.num_hidden_layers
    logits = 3 * length * config.vocab_size
    of_transformers = tables if streamed else weights.parameters
    return int(4 * (of_transformers + tables + layers + logits)) + 500_000_000


def _too_much(needed: int) -> str:
    free = _free_memory()
    if needed <= free:
        return ""
    return f"comparing the models takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _break_ties_alike(model: Any, routes: Routes) -> None:
    """Where rounding decides between a token's experts, let transformers take the other side's.

    Among thousands of tokens there is one whose last expert and the next have the same logit but
    for rounding; what it computes with either differs by far more.
    """
    for number, layer in enumerate(model.base_model.layers):
        gate = getattr(getattr(layer, "mlp", None), "gate", None)
        if gate is not None and not isinstance(gate, nn.Linear):  # as transformers 4 has it
            gate.register_forward_hook(partial(_take_tied_routes, routes[number]))


def _take_tied_routes(routes: list[Tensor], gate: Any, _: Any, output: Any) -> Any:
    """Change the routes of those tokens for which the other side's experts are as good."""
    logits, shares, ours = output
    theirs = routes.pop(0)
    behind = logits.gather(1, ours).amin(1) - logits.gather(1, theirs).amin(1)
    tied = behind <= TOLERANCE * logits.abs().max()
    rows = tied & (ours.sort().values != theirs.sort().values).any(1)
    their_shares = logits.float().softmax(-1).gather(1, theirs)
    if getattr(gate, "norm_topk_prob", True):
        their_shares = their_shares / their_shares.sum(1, keepdim=True)
    return (
        logits,
        torch.where(rows[:, None], their_shares.to(shares.dtype), shares),
        torch.where(rows[:, None], theirs, ours),
    )


@torch.no_grad()
def _compare_outputs(
    side: StoredModel, model: Any, sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return a Verification's numbers."""
    tokens = [torch.tensor(sequence) for sequence in sequences if len(sequence)]
    difference, largest, agree, total = 0.0, 0.0, 0, sum(map(len, tokens))
    losses = torch.zeros(2, dtype=torch.float64)
    layers = int(side.args.num_layers)
    with progress("verify", 2 * layers * len(tokens), "layers") as advance:
        for ids in tokens:
            expected = side.logits(ids, advance)
            actual = model(ids[None], use_cache=False).logits[0]
            expected = expected[:, : actual.shape[-1]]
            gaps = (actual - expected).abs().max()
            difference = gaps.item() if not gaps <= difference else difference  # NaN stays
            largest = max(largest, expected.abs().max().item())
            agree += int((actual.argmax(-1) == expected.argmax(-1)).sum())
            for at, logits in enumerate((expected, actual)):
                losses[at] += cross_entropy(logits[:-1], ids[1:], reduction="none").double().sum()
            advance(layers)
    megatron_loss, hf_loss = (losses / (total - len(tokens))).tolist()
    return {
        "tokens": total,
        "max_difference": difference,
        "max_logit": largest,
        "top1_agreement": agree / total,
        "megatron_loss": megatron_loss,
        "hf_loss": hf_loss,
    }


def _require_tokens(sequences: Sequence[Sequence[int]], vocab_size: int, max_length: int) -> None:
    if not any(len(sequence) > 1 for sequence in sequences):
        raise ValueError("expected at least two tokens in a row to compare the models on")
    for sequence in sequences:
        if len(sequence) > max_length or not all(0 <= token < vocab_size for token in sequence):
            raise ValueError(
                f"expected sequences of at most {max_length} ids below {vocab_size}, got one of "
                f"{len(sequence)} with ids up to {max(sequence)}"
            )


def sequences_for(
    folder: Path, text: Path | None = None, data: Path | None = None
) -> list[list[int]]:
    """Return three sequences of full length, from the start, middle and end of a text.

    Args:
        folder: a Hugging Face folder; without a tokenizer in it the ids are drawn at random.
        text: any UTF-8 file; by default the reference texts that come with Python.
        data: instead of a text the prefix of an indexed dataset (its path without .bin), whose
            documents are read one after another, as Megatron does.
    """
    require_readable(text, data)
    length = length_for(folder)
    if data is not None:
        tokens = _open(data).tokens
        last = max(0, len(tokens) - length)
        return [tokens[at : at + length].tolist() for at in sorted({0, last // 2, last})]
    if not (folder / "tokenizer.json").is_file():
        draw = random.Random(0)
        vocab_size = read_config(folder).vocab_size
        return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(SEQUENCES)]
    raw = _python_reference() if text is None else text.read_bytes()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # A token is rarely longer than 16 bytes: enough text, without encoding all of a large file.
    starts = {0, max(0, len(raw) // 2), max(0, len(raw) - 16 * length)}
    sequences = [
        tokenizer.encode(raw[start : start + 16 * length].decode("utf-8", "ignore")).ids[:length]
        for start in sorted(starts)
    ]
    long_enough = [sequence for sequence in sequences if len(sequence) > 1]
    if not long_enough:
        raise ValueError(f"expected text to verify on in {text}, got less than two tokens")
    return long_enough


def require_readable(text: Path | None, data: Path | None) -> None:
    """Look whether there is something to verify on, before a conversion that may take hours."""
    if text is not None and data is not None:
        raise ValueError("expected a text or a dataset to verify on, got both")
    if text is not None and not text.is_file():
        raise ValueError(f"expected a text to verify on, found no file {text}")
    if text is not None and not text.stat().st_size:
        raise ValueError(f"expected a text to verify on, {text} is empty")
    if data is not None and len(_open(data).tokens) < 2:
        raise ValueError(f"expected a dataset to verify on in {data}, got less than two tokens")


def length_for(folder: Path) -> int:
    """Return the model's full length as transformers understands config.json, or LONGEST."""
    return min(LONGEST, int(read_config(folder).max_position_embeddings))


def _open(data: Path) -> IndexedReader:
    return IndexedReader(data.with_suffix("") if data.suffix in (".bin", ".idx") else data)


def _python_reference() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()
