""" "global" normalisation over the global batch: sum(w ce) / sum(w), however the batch is cut.

sum(w) is known only after the last micro-batch. Megatron runs with per-token losses, i.e. sums of
w ce over micro-batches and ranks, and once all gradients are reduced they are divided by the
batch's weight here, where Megatron itself would divide by its (integer) token count.

Sums over a batch are as many times larger than means as it has tokens, beyond what fp16 holds: the
losses are divided by a power of two near that number, and the gradients multiplied by it in the
end, which changes no bit of a result that is in range.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.data_parallel_base import _BaseDataParallel

from megatron_infoentropy.loss.weighting import LEAST_WEIGHT


class GlobalBatchWeight:
    """Adds up the weights of a step's micro-batches on this rank, then scales the gradients."""

    def __init__(self, tokens: int = 1) -> None:
        """tokens: about how many a global batch has; 1 leaves the losses as they are."""
        self.unit = 2.0 ** round(math.log2(tokens))
        self._total: torch.Tensor | None = None

    def add(self, weight: torch.Tensor) -> None:
        """Count one micro-batch; scalar, on this rank."""
        weight = weight.detach()
        self._total = weight.clone() if self._total is None else self._total + weight

    def finalize_model_grads(
        self,
        model: list[Any],
        num_tokens: torch.Tensor | None = None,
        pg_collection: Any = None,
        **options: Any,
    ) -> None:
        """`config.finalize_model_grads_func` of a run with "global" normalisation.

        Raises:
            ValueError: a wrapper of the model that cannot scale gradients.
        """
        does_nothing = _BaseDataParallel.scale_gradients
        for chunk in model:
            if getattr(chunk.scale_gradients, "__func__", None) is does_nothing:
                raise ValueError(
                    f"'global' normalization scales gradients, which {type(chunk).__name__} does "
                    "not do; use 'paper' or 'none', or another data-parallel wrapper"
                )
        finalize_model_grads(model, None, pg_collection=pg_collection, **options)
        total = self._sum_over_ranks(pg_collection)
        # Without a weight there is no gradient to scale, and no host has to know.
        scale = self.unit / total.clamp_min(LEAST_WEIGHT * self.unit)
        for chunk in model:
            chunk.scale_gradients(scale)

    def _sum_over_ranks(self, pg_collection: Any) -> torch.Tensor:
        """The global batch's weight on every rank; starts the next step from zero."""
        if pg_collection is None:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        else:
            # With weights sharded over a further axis its peers hold tokens of their own.
            data = getattr(pg_collection, "dp_cp_gtp_remat", None) or pg_collection.dp_cp
            pipeline = pg_collection.pp
        total = self._total
        if total is None:  # a pipeline stage without the loss
            total = torch.zeros((), device=torch.cuda.current_device())
        self._total = None
        # Only the last stage has weights: a sum over the pipeline hands them to the others.
        torch.distributed.all_reduce(total, group=pipeline)
        torch.distributed.all_reduce(total, group=data)
        return total
