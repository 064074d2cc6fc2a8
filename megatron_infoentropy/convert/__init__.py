"""From a Megatron checkpoint to a Hugging Face folder, in one process without Megatron.

checkpoint (unpickle)  reads any parallel layout      architecture  what model it is, or refused
naming, layout         names and arrangement undone   to_hf         the folder (weights_file)
reference_model        Megatron's model again         verify        both models on the same tokens
"""

from megatron_infoentropy.convert.architecture import UnsupportedModelError
from megatron_infoentropy.convert.to_hf import ConversionSummary, convert_checkpoint
from megatron_infoentropy.convert.verify import Verification, verify_conversion

__all__ = [
    "ConversionSummary",
    "UnsupportedModelError",
    "Verification",
    "convert_checkpoint",
    "verify_conversion",
]
