"""The model of a Megatron checkpoint as a network of transformers, without a folder in between."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.convert.architecture import CLASSES, architecture_of
from megatron_infoentropy.convert.checkpoint import LATEST, MegatronCheckpoint
from megatron_infoentropy.convert.errors import IncompleteCheckpointError
from megatron_infoentropy.convert.hf_config import hf_config
from megatron_infoentropy.convert.matching import match_names, require_shape, steps_of
from megatron_infoentropy.convert.to_hf import convert_steps
from megatron_infoentropy.convert.tokenizer_files import read_tokenizer


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint and the folder of the tokenizer it was trained with."""

    checkpoint: MegatronCheckpoint
    tokenizer: Path

    @property
    def iteration(self) -> int:
        return self.checkpoint.iteration

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of the tokenizer that the training data was written with; None where it is gone."""
        args = self.checkpoint.args
        paths = getattr(args, "train_data_path", None) or getattr(args, "data_path", None) or []
        for path in map(Path, map(str, paths)):
            manifest = path.parent / "manifest.json"
            if manifest.is_file():
                content = json.loads(manifest.read_text(encoding="utf-8"))
                return str(content["tokenizer"]["sha256"])
        return None

    def network(self, dtype: torch.dtype) -> Any:
        """The model in evaluation mode on the CPU, its vocabulary cut to the tokenizer's.

        Raises:
            UnsupportedModelError, InvalidWeightsError: as for `convert_checkpoint`.
            IncompleteCheckpointError: a parameter of the model is not in the checkpoint.
        """
        import transformers

        facts = read_tokenizer(self.tokenizer)
        model = architecture_of(self.checkpoint.args, facts.vocab_size)
        sources = match_names(self.checkpoint.tensors, model)
        for source in sources:
            require_shape(source, self.checkpoint.tensors[source.name].shape, model)
        steps = steps_of(sources, model)
        tensors = {
            name: tensor.clone()
            for name, tensor in convert_steps(self.checkpoint, steps, model, dtype)
        }
        config = transformers.AutoConfig.for_model(**hf_config(model, dtype, facts.ids))
        family = getattr(transformers, CLASSES[model.family])
        # Transformers puts the tensors in their place: newer versions name some of them otherwise.
        network, info = family.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
        wrong = {name: keys for name, keys in info.items() if keys}
        if wrong:
            raise IncompleteCheckpointError(f"transformers could not fill the model: {wrong}")
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
