"""run.json says with which tokenizer the training data were made."""

import json

import pytest

from megatron_infoentropy.launch.run_folder import write_facts

MANIFEST = {
    "format": 1,
    "tokenizer": {"sha256": "ab12", "vocab_size": 300, "eod_id": 0},
    "dtype": "uint16",
    "append_eod": True,
    "token_counts": "token_counts.npy",
    "domains": {"A": {"prefix": "a", "documents": 1, "tokens": 2, "bytes": 3}},
}


@pytest.mark.parametrize(
    ("there", "flags", "told"),
    [(True, True, "ab12"), (False, True, None), (True, False, None)],
    ids=["data", "no manifest", "no data in the flags"],
)
def test_the_tokenizer_is_that_of_the_data(tmp_path, there, flags, told):
    data = tmp_path / "train"
    data.mkdir()
    if there:
        (data / "manifest.json").write_text(json.dumps(MANIFEST))
    words = ["--infoentropy-objective", "cross_entropy", "--infoentropy-gamma", "1"]
    words += ["--infoentropy-sigma", "1", "--infoentropy-normalization", "paper", "--seed", "1"]
    words += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    if flags:
        words += ["--train-data-path", "0.5", str(data / "a"), "0.5", str(data / "b")]
    write_facts(tmp_path, tmp_path / "r.yaml", words, 1, "CPU")
    assert json.loads((tmp_path / "run.json").read_text())["tokenizer_sha256"] == told
