"""The comparison of fused and unfused: every provider there, memory as predicted."""

import pytest

from megatron_infoentropy.bench.fused_linear import compare_fused_linear
from megatron_infoentropy.bench.results import read_csv, write_csv

TOKENS, HIDDEN, VOCABULARY, CHUNK = 512, 32, 4096, 64
MIB = 2**20


def test_peaks_are_the_predicted_ones_and_rows_survive_a_file(tmp_path, facts):
    rows = compare_fused_linear(
        tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY, chunk_tokens=CHUNK, repeats=1
    )
    gradients = (TOKENS + VOCABULARY) * HIDDEN * 4
    logits = {"unfused": TOKENS, "fused": CHUNK}
    for row in rows:
        predicted = logits[row.provider.split()[0].strip(",")] * VOCABULARY * 4 + gradients
        slack = 200 * TOKENS / MIB  # statistics, coefficients and their temporaries
        assert predicted / MIB <= row.peak_mib <= predicted / MIB + slack, row.provider
        assert row.median_ms > 0
    assert [row.provider.split(",")[0] for row in rows] == [
        *("unfused", "fused statistics", "fused loss")
    ]
    write_csv(rows, facts, tmp_path / "rows.csv")
    assert [row.provider for row in read_csv(tmp_path / "rows.csv")[0]] == [
        row.provider for row in rows
    ]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        compare_fused_linear(dtype="float8")
