"""Bytes that an optimizer keeps of one parameter, by the types its flags choose."""

from argparse import Namespace

import pytest
import torch

from megatron_infoentropy.launch.parsed import optimizer_bytes

PLAIN = {
    "use_precision_aware_optimizer": False,
    "params_dtype": torch.bfloat16,
    "exp_avg_dtype": torch.float32,
    "exp_avg_sq_dtype": torch.float32,
    "main_params_dtype": torch.float32,
    "fp8_recipe": "delayed",  # Megatron's default, also without FP8
}
AWARE = {"use_precision_aware_optimizer": True}
HALVED = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, 4 + 4 + 4),
        ({"params_dtype": torch.float32}, 4 + 4),
        (AWARE, 4 + 4 + 2),  # the copy as the bits that bf16 lacks
        (AWARE | {"fp8_recipe": "tensorwise"}, 4 + 4 + 4),  # Megatron keeps the copy, whole
        (AWARE | HALVED | {"fp8_recipe": "tensorwise"}, 2 + 2 + 4),
        (AWARE | {"fp8_recipe": "tensorwise", "main_params_dtype": torch.float16}, 4 + 4 + 2),
        (AWARE | {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.float16}, 1 + 2 + 2),
        (AWARE | {"params_dtype": torch.float32}, 4 + 4),
    ],
)
def test_bytes_follow_the_types_of_moments_and_of_the_copy(chosen, expected):
    assert optimizer_bytes(Namespace(**PLAIN | chosen)) == expected
