"""Where a training step's time goes: by a clock, marked where one part gives way to the next.

    forward     a micro-batch's forward pass begins
    loss        the output layer has given the logits
    backward    their gradient is complete
    gradients   they are reduced over ranks, and reported on
    optimizer   what is left

On a GPU marks are CUDA events among the kernels: a part is what the device did between two of them,
its idling for the host included.
"""

from typing import Any

import torch

from megatron_infoentropy.bench.clock import Clock

PARTS = ("forward", "loss", "backward", "gradients", "optimizer")


class PartTimes:
    """Times one step after the other; each micro-batch may pass through the parts once more."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begun: list[str] = []
        self._watched: set[Any] = set()

    def start(self) -> None:
        """A step begins, with its forward pass."""
        self._begun = [PARTS[0]]
        self._clock.start()

    def enter(self, part: str) -> None:
        """A part begins, unless it is under way."""
        if part != self._begun[-1]:
            self._clock.mark()
            self._begun.append(part)

    def stop(self) -> dict[str, float]:
        """The step has ended: {part: ms}, 0 for those it did not pass through."""
        self._clock.mark()
        spent = dict.fromkeys(PARTS, 0.0)
        for part, span in zip(self._begun, self._clock.read(), strict=True):
            spent[part] += span
        return spent

    def watch(self, output_layer: Any) -> None:
        """Learn from this layer, from now on, where the loss begins and ends.

        It returns (logits, ...), as Megatron's does.
        """
        if output_layer not in self._watched:
            self._watched.add(output_layer)
            output_layer.register_forward_hook(self._logits_are_there)

    def _logits_are_there(self, layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(self._gradient_is_there)  # type: ignore[no-untyped-call]
        self.enter("loss")

    def _gradient_is_there(self, gradient: torch.Tensor) -> None:
        self.enter("backward")
