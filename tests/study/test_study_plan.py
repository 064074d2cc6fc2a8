"""What a study file says, and what it must not."""

from pathlib import Path

import pytest
from small_study import TEXT, write_study

from megatron_infoentropy.study.plan import StudyError, load_study

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.yaml"))


def test_lists_are_crossed_and_every_seed_gets_every_setting(tmp_path):
    grid = "grid: [{objective: infoentropy, gamma: [0.5, 2], normalization: [paper, global]}]"
    text = f"recipe: recipe.yaml\nseeds: [3, 4]\n{grid}\ndata: {{tokens: tokens, tokenizer: t}}"
    study = write_study(tmp_path, text)
    assert [member.name for member in study.members] == [
        f"infoentropy-gamma{gamma}-{normalization}-seed{seed}"
        for seed in (3, 4)
        for gamma in (0.5, 2)
        for normalization in ("paper", "global")
    ]
    assert study.data.tokens == tmp_path / "tokens"
    assert study.members[-1].seed == 4
    assert study.members[-1].loss == {
        "objective": "infoentropy",
        "gamma": 2.0,
        "normalization": "global",
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", "the study has no key seed; it has recipe, flags, seeds"),
        ("gamma: 1", "gama: 1", "grid has no key gama"),
        ("gamma: 1", "gamma: high", "grid: gamma: expected a number, got 'high'"),
        ("gamma: 1", "gamma: [1, 1]", "infoentropy-gamma1-seed1, .* would be trained twice"),
        ("infoentropy", "entropy", "objective must be one of"),
        ("cross_entropy", "{objective: cross_entropy, gamma: 1}", "expected a word"),
        ("[1, 2]", "[]", "at least one entry"),
        ("[1, 2]", "[one]", "expected a whole number, got 'one'"),
        ("recipe.yaml", "none.yaml", "there is no file"),
        ("tokens: tokens", "tokens: tokens, text: x", "expected one of tokens, text"),
        ("tokens: tokens,", "tokens: tokens, vocab-size: 9,", "expected a tokenizer, or the voc"),
        ("{train-iters: 10}", "!!python/object/apply:os.system [true]", "is not YAML"),
        ("{train-iters: 10}", "{lr: 1, lr: 2}", "line 3: 'lr' is given twice"),
        (
            "[1, 2]",
            "[1, 0]",
            "cross_entropy-seed0 cannot be trained: --seed must be a whole number",
        ),
        ("{train-iters: 10}", "{lr: .nan}", "cannot be trained: --lr must be a number from 0 to"),
        ("{train-iters: 10}", "{num-layers: 3, pipeline-model-parallel-size: 2}", "a multiple of"),
        ("tokens: tokens, tokenizer: tokenizer", "text: t, vocab-size: 0", "whole number above 0"),
        ("tokens: tokens,", "corpus-megabytes: .inf,", "a number above 0, got inf"),
        ("[1, 2]", "[1]\n    evaluate: {max-tokens: -1}", "max-tokens: expected a whole number ab"),
        ("[1, 2]", "[1]\n    tasks: {names: [a], limit: 0}", "limit: expected a whole number abo"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(StudyError, match=message):
        write_study(tmp_path, TEXT.replace(old, new))


def test_a_missing_study_says_where_to_find_some(tmp_path):
    with pytest.raises(StudyError, match="examples/studies has some"):
        load_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_studies_with_several_seeds_and_a_baseline(path):
    study = load_study(path)
    objectives = {member.loss["objective"] for member in study.members}
    assert {"cross_entropy", "focal", "infoentropy"} <= objectives
    assert len({member.seed for member in study.members}) >= 2
