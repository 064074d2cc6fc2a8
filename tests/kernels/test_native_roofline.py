"""The passes that measure the machine do what they say, and the bounds follow from them."""

import pytest
import torch

from megatron_infoentropy.bench.roofline import Roofline, measure_roofline
from megatron_infoentropy.kernels import native

pytestmark = pytest.mark.usefixtures("instructions")


def test_a_copy_pass_copies_all_but_the_ends():
    data = torch.arange(1 << 20, dtype=torch.int32)
    out = torch.zeros_like(data)
    native.copy_pass(data, out, 2)
    page = 1024  # of int32
    assert torch.equal(out[page:-page], data[page:-page])


def test_a_change_pass_touches_every_word_once():
    data = torch.zeros(1 << 20, dtype=torch.int32)
    native.change_pass(data, 2)
    assert (data == 0x10001).all()
    native.change_pass(data, 1)
    assert (data == 0).all()


def test_exponentials_are_counted():
    for dtype in native.DTYPES:
        assert 0 < native.exponentials_pass(dtype, 1 << 20, 2) <= 1 << 20


def test_a_bound_is_the_slower_of_memory_and_arithmetic():
    rates = dict.fromkeys(native.DTYPES, 1e9)
    roofline = Roofline(2, 10.0, 8.0, 16.0, rates)
    million = 10**6
    assert roofline.statistics_ms(torch.float32, million) == 1.0  # 0.4 ms of reading
    assert roofline.gradient_ms(torch.float32, million, in_place=False) == 1.0
    fast = Roofline(2, 10.0, 8.0, 16.0, dict.fromkeys(native.DTYPES, 1e12))
    assert fast.statistics_ms(torch.float32, million) == 0.4
    assert fast.gradient_ms(torch.float32, million, in_place=False) == 1.0
    assert fast.gradient_ms(torch.bfloat16, million, in_place=True) == 0.25


def test_a_measurement_has_every_number():
    roofline = measure_roofline(1, 1 << 20, repeats=1)
    assert min(roofline.read_gb_per_s, roofline.copy_gb_per_s, roofline.change_gb_per_s) > 0
    assert set(roofline.exponentials_per_s) == set(native.DTYPES)
