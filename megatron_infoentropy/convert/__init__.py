"""From a Megatron checkpoint to a Hugging Face folder and back, in one process without Megatron.

reading    checkpoint (distcp, torch_file, unpickle): any parallel layout, by layers
what it is architecture: the family that computes the same, or refused; arguments, hf_config
mapping    naming (the table), matching, layout (the arrangement of numbers)
writing    to_hf (shards, weights_file, tokenizer_files, model_card), output_folder
proof      reference_model and config_check, which share nothing with the mapping; texts, verify
"""

from megatron_infoentropy.convert.errors import (
    IncompleteCheckpointError,
    InvalidWeightsError,
    UnreadableCheckpointError,
    UnsupportedModelError,
)
from megatron_infoentropy.convert.to_hf import ConversionSummary, convert_checkpoint
from megatron_infoentropy.convert.verify import Verification, verify_conversion

__all__ = [
    "ConversionSummary",
    "IncompleteCheckpointError",
    "InvalidWeightsError",
    "UnreadableCheckpointError",
    "UnsupportedModelError",
    "Verification",
    "convert_checkpoint",
    "verify_conversion",
]
