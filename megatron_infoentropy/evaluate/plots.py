"""The report's figures, drawn from the data of report.json and nothing else.

Every figure is one panel, so that a phone can show it in full width, and a function of the report's
data; where the data have nothing to draw, there is none.
"""

from megatron_infoentropy.evaluate.figure import Figure
from megatron_infoentropy.evaluate.plot_parts import Data
from megatron_infoentropy.evaluate.plots_scores import bucket_bars, differences, differences_by
from megatron_infoentropy.evaluate.plots_training import (
    entropies_over_training,
    training_curves,
    weights_over_training,
)
from megatron_infoentropy.evaluate.plots_weights import (
    confidence_calibration,
    entropy_calibration,
    weight_curves,
)


def all_figures(data: Data) -> dict[str, Figure | None]:
    """The figures by the names that the page calls them by, in its order."""
    return {
        "training_ce": training_curves(data, "cross entropy", validation=True),
        "training_objective": training_curves(data, "objective", validation=False),
        "entropies": entropies_over_training(data),
        "weights_in_training": weights_over_training(data),
        "buckets": bucket_bars(data),
        "differences": differences(data),
        "deciles": differences_by(data, "decile"),
        "difficulty": differences_by(data, "difficulty"),
        "weights": weight_curves(data),
        "calibration": entropy_calibration(data),
        "confidence": confidence_calibration(data),
    }
