"""From a Megatron checkpoint to a Hugging Face folder and back, in one process without Megatron.

reading    checkpoint (distcp, unpickle): any parallel layout, by layers; hf_weights
what it is architecture: which family computes the same, or refused; hf_config
mapping    naming (the table, and what is stored of it), layout (the arrangement of numbers)
writing    to_hf (tokenizer, model_card), from_hf
proof      verify: megatron_model or reference_model, by layers, beside hf_model; tokenizer
"""

from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.from_hf import convert_from_hf
from megatron_infoentropy.convert.to_hf import (
    ConversionSummary,
    convert_checkpoint,
    why_not_exported,
)
from megatron_infoentropy.convert.verify import Proof, Verification, prove, verify_conversion

__all__ = [
    "ConversionError",
    "ConversionSummary",
    "Proof",
    "Verification",
    "convert_checkpoint",
    "convert_from_hf",
    "prove",
    "verify_conversion",
    "why_not_exported",
]
