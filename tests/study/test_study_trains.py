"""A study with nothing faked: text, two trainings, export, evaluation, report."""

import json

import pytest
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.study.plan import load_study
from megatron_infoentropy.study.runner import find_states

STUDY = """
recipe: {recipe}
flags:
  num-layers: 2
  hidden-size: 32
  ffn-hidden-size: 64
  seq-length: 32
  max-position-embeddings: 32
  micro-batch-size: 4
  global-batch-size: 8
  train-iters: 6
  lr-warmup-iters: 2
  eval-iters: 1
grid: [{{objective: cross_entropy}}, {{objective: infoentropy, gamma: 2}}]
data: {{corpus-megabytes: 0.5, vocab-size: 500}}
evaluate: {{max-tokens: 2000}}
"""


@pytest.mark.slow
def test_a_study_trains_scores_and_compares_and_finds_itself_done(tmp_path, pytestconfig):
    recipe = pytestconfig.rootpath / "examples" / "tiny.yaml"
    (tmp_path / "study.yaml").write_text(STUDY.format(recipe=recipe))
    words = ["study", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--jobs", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["last_iteration"] for run in data["runs"]] == [6, 6]
    assert [run["info"]["gamma"] for run in data["runs"]] == [1.0, 2.0]
    assert data["comparisons"][0]["rows"]
    assert all(
        state.is_done
        for state in find_states(load_study(tmp_path / "study.yaml"), tmp_path / "out")
    )
