"""A study of four runs that takes no time: its steps write a line each."""

import sys
import time
from pathlib import Path
from textwrap import dedent

from megatron_infoentropy.study import runner, steps
from megatron_infoentropy.study.plan import Study, load_study

TEXT = """
    recipe: recipe.yaml
    flags: {train-iters: 10}
    seeds: [1, 2]
    grid:
      - objective: cross_entropy
      - objective: infoentropy
        gamma: 1
    data: {tokens: tokens, tokenizer: tokenizer}
"""


def write_study(folder: Path, text: str = TEXT) -> Study:
    """The study file, with a recipe and manifests for datasets."""
    (folder / "recipe.yaml").write_text("model:\n  num-layers: 2\n")
    for split in ("train", "validation", "test"):
        (folder / "tokens" / split).mkdir(parents=True, exist_ok=True)
        (folder / "tokens" / split / "manifest.json").write_text("{}")
    (folder / "study.yaml").write_text(dedent(text))
    return load_study(folder / "study.yaml")


def fake_steps() -> None:
    """Let the steps write lines: also into FOLDER/did, one for each time that a step was done.

    A file FOLDER.fails or FOLDER.hangs beside the run makes its export fail or take for ever.
    """

    def do(name: str, folder: Path) -> None:
        with (folder / "did").open("a") as file:
            file.write(f"{name}\n")

    def train(study: Study, one: object, where: object, folder: Path) -> None:
        do("train", folder)
        (folder / "run.json").write_text("trained")
        (folder / "train.log").write_text("")
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "weights").write_text("weights")

    def export(where: object, folder: Path) -> None:
        do("export", folder)
        (folder / "hf").mkdir(exist_ok=True)
        (folder / "hf" / "model").write_text("half")
        if folder.with_name(f"{folder.name}.fails").exists():
            raise ValueError("no export today")
        while folder.with_name(f"{folder.name}.hangs").exists():
            sys.stdout.write("exporting\n")
            sys.stdout.flush()
            time.sleep(0.05)
        (folder / "hf" / "model").write_text("whole")

    def evaluate(study: Study, where: object, folder: Path) -> None:
        do("evaluate", folder)
        for name in ("evaluation.json", "evaluation.npz", "token_scores.npy"):
            (folder / name).write_text("{}")

    def write(runs: list[Path], output: Path, notes: list[str]) -> Path:
        page = output / "report.html"
        page.write_text("\n".join([*(run.name for run in runs), *notes]))
        return page

    steps._train, steps._export, steps._evaluate = train, export, evaluate
    runner._write = write


def did(output: Path, name: str) -> list[str]:
    """The steps of a run that were done, in order."""
    return (output / name / "did").read_text().split()


if __name__ == "__main__":  # a worker: STUDY OUTPUT PART
    from megatron_infoentropy.study.runner import terminated_as_interrupted

    fake_steps()
    with terminated_as_interrupted():
        sys.stdout.write(f"doing {sys.argv[3]}\n")
        runner.do_part(load_study(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3])
