"""What a dry run says, and which ranks and stand-ins it takes, without Megatron."""

import sys
from pathlib import Path

import pytest
from small_shape import PLAIN

from megatron_infoentropy.launch import dry_run as dry
from megatron_infoentropy.runtime.device import Device

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = Device("cpu", "gloo", 1)


@pytest.fixture
def tok(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def parsed(monkeypatch):
    """Command lines that would have been parsed."""
    seen = []

    def parse(words, ranks, device):
        seen.append((words, ranks))
        return PLAIN

    monkeypatch.setattr(dry, "parse", parse)
    monkeypatch.setattr(dry, "find_device", lambda: CPU)
    return seen


def test_ranks_are_those_asked_for_else_the_recipes_else_the_machines(parsed, tok):
    recipe = EXAMPLES / "paper" / "468m.yaml"
    dry.dry_run(recipe, {}, ranks=32)
    dry.dry_run(recipe, {})
    dry.dry_run(EXAMPLES / "tiny.yaml", {}, tokenizer=tok)
    assert [ranks for _, ranks in parsed] == [32, 16, 1]


def test_ranks_that_cannot_share_the_batch_are_refused_in_our_words(parsed):
    with pytest.raises(
        ValueError, match="1024 cannot be shared by 48 data-parallel ranks in micro"
    ):
        dry.dry_run(EXAMPLES / "paper" / "468m.yaml", {}, ranks=48)
    assert not parsed


def test_data_and_a_missing_tokenizer_have_stand_ins(parsed, tok):
    dry.dry_run(EXAMPLES / "paper" / "468m.yaml", {"seed": 7}, ("--lr", "1"))
    words, _ = parsed[0]
    assert "--mock-data" in words
    assert words[words.index("--tokenizer-type") + 1] == "NullTokenizer"
    assert words[words.index("--seed") + 1 :].count("--seed") == 2  # default, recipe, option
    assert words[-2:] == ["--lr", "1"]
    dry.dry_run(EXAMPLES / "tiny.yaml", {}, tokenizer=tok)
    words, _ = parsed[1]
    assert words[words.index("--tokenizer-type") + 1] == "HuggingFaceTokenizer"
    with pytest.raises(ValueError, match=r"tiny\.yaml does not say vocab-size"):
        dry.dry_run(EXAMPLES / "tiny.yaml", {})


def test_every_number_has_a_line(parsed):
    lines = dry.dry_run(EXAMPLES / "paper" / "468m.yaml", {}, ranks=2).lines()
    text = "\n".join(lines)
    assert lines[0].startswith("parameters         3,144, at most 3,144 on a rank")
    assert "2 ranks: tensor 1 x pipeline 1 x data 2" in text
    assert "120 tokens: 12 sequences of 10, 2 micro-batches of 3 on every rank" in text
    assert "7 steps, 840 tokens" in text
    assert "without --use-distributed-optimizer" in text
    assert "with --infoentropy-fused-linear" in text
    assert "FP8" not in text
    for kind in ("weights", "gradients", "activations", "tensor parallel", "pipeline parallel"):
        assert any(line.strip().startswith(kind) for line in lines)


@pytest.mark.parametrize(
    ("size", "text"), [(3 * 2**29, "1.50 GiB"), (2**29, "512.00 MiB"), (0, "0.00 MiB")]
)
def test_sizes_come_in_units_that_fit(size, text):
    assert dry._in(dry.MEMORY_UNITS, size) == text


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('train.py: error: no such flag')", "no such flag"),
        ("raise ValueError('gamma is wrong')", "ValueError: gamma is wrong"),
        ("assert 3 % 2 == 0", r"assert 3 % 2 == 0 \(AssertionError\)"),
    ],
)
def test_a_refusal_gives_the_reason_alone(monkeypatch, tmp_path, code, reason):
    script = tmp_path / "refuses.py"
    script.write_text(code + "\n")
    run = dry.subprocess.run

    def refuse(words, **options):
        return run([sys.executable, str(script)], **options)

    monkeypatch.setattr(dry.subprocess, "run", refuse)
    with pytest.raises(dry.FlagsRefused, match=f"refuses the flags: {reason}$"):
        dry.parse([], 2, CPU)
