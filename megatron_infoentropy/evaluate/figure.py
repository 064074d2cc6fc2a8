"""A figure of the report: an SVG element, and the numbers that it is drawn from."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.evaluate.svg import standalone
from megatron_infoentropy.files import write_atomically

Cell = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """One panel; `rows` are the numbers it shows, None where one is missing."""

    name: str  # of the files, and before the ids in the SVG
    svg: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]

    def csv(self) -> str:
        """The numbers, with a line of column names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def write_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Write FOLDER/NAME.svg and FOLDER/NAME.csv of every figure, and leave no older ones there."""
    for figure in figures:
        texts = {"svg": standalone(figure.svg), "csv": figure.csv()}
        for ending, text in texts.items():
            with write_atomically(folder / f"{figure.name}.{ending}") as temporary:
                temporary.write_text(text, encoding="utf-8")
    names = {figure.name for figure in figures}
    for path in folder.glob("*"):
        if path.suffix in (".svg", ".csv") and path.stem not in names:
            path.unlink()
