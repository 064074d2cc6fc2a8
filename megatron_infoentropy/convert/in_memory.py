"""The model of a Megatron checkpoint as a network of transformers, without a folder in between."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.convert.architecture import architecture_of
from megatron_infoentropy.convert.checkpoint import LATEST, MegatronCheckpoint
from megatron_infoentropy.convert.errors import IncompleteCheckpointError
from megatron_infoentropy.convert.hf_config import hf_config
from megatron_infoentropy.convert.matching import match_names, require_shape, steps_of
from megatron_infoentropy.convert.shards import convert_steps
from megatron_infoentropy.convert.tokenizer_files import read_tokenizer


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint and the folder of the tokenizer it was trained with."""

    checkpoint: MegatronCheckpoint
    tokenizer: Path

    @property
    def iteration(self) -> int:
        return self.checkpoint.iteration

    def network(self, dtype: torch.dtype) -> Any:
        """The model in evaluation mode on the CPU, its vocabulary cut to the tokenizer's.

        Raises:
            UnsupportedModelError, InvalidWeightsError: as for `convert_checkpoint`.
            IncompleteCheckpointError: a parameter of the model is not in the checkpoint.
        """
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        facts = read_tokenizer(self.tokenizer)
        model = architecture_of(self.checkpoint.args, facts.vocab_size)
        config = AutoConfig.for_model(**hf_config(model, dtype, facts.ids))
        with no_init_weights():
            network = AutoModelForCausalLM.from_config(config, dtype=dtype)
        state = network.state_dict()
        sources = match_names(self.checkpoint.tensors, model)
        for source in sources:
            require_shape(source, self.checkpoint.tensors[source.name].shape, model)
        filled = set()
        for name, tensor in convert_steps(self.checkpoint, steps_of(sources, model), model):
            state[name].copy_(tensor)
            filled.add(state[name].data_ptr())  # tied tables have two names
        names = [name for name, _ in network.named_parameters()]
        missing = [name for name in names if state[name].data_ptr() not in filled]
        if missing:
            raise IncompleteCheckpointError(f"the checkpoint gives no {', '.join(missing[:4])}")
        return network.eval()


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a `--save` folder of Megatron, or one iteration in it."""
    return any((folder / name).is_file() for name in (LATEST, ".metadata"))


def open_checkpoint(
    checkpoint: Path, *, iteration: int | None = None, tokenizer: Path | None = None
) -> OpenedCheckpoint:
    """Open a checkpoint, by default with the tokenizer that its training arguments name.

    Raises:
        UnreadableCheckpointError, IncompleteCheckpointError: the checkpoint cannot be read.
        ValueError: no tokenizer is given, and none is where the arguments say.
    """
    opened = MegatronCheckpoint(checkpoint, iteration)
    if tokenizer is None:
        named = getattr(opened.args, "tokenizer_model", None)
        if not named or not (Path(named) / "tokenizer.json").is_file():
            raise ValueError(
                f"the checkpoint {opened.folder} was trained with the tokenizer {named!r}, where "
                "there is no tokenizer.json now: name the tokenizer's folder"
            )
        tokenizer = Path(named)
    return OpenedCheckpoint(opened, tokenizer)
