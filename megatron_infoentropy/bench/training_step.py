"""A training step of a small Megatron GPT, on one rank, with our loss and with Megatron's own.

One model, one optimizer and one batch serve all of them, so that nothing but the loss differs:
gradients to zero, forward, loss, backward, `finalize_model_grads`, optimizer. Ours is what our
trainer does, its counting for the log included. Megatron's layers are its local ones, which need
neither Transformer Engine nor a GPU.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.providers import Computes
from megatron_infoentropy.runtime import cpu
from megatron_infoentropy.runtime.device import find_device

LAYERS, HEAD_DIM, LONGEST_SEQUENCE = 4, 64, 256
LEARNING_RATE = 1e-4

Batch = dict[str, torch.Tensor]
Objective = Callable[[Any, Batch], torch.Tensor]  # (model, batch) -> scalar to minimise


class Rival(NamedTuple):
    """One of the losses that the same model is trained with, in turn."""

    name: str
    computes: Computes
    objective: Objective
    is_ours: bool = False
    calls_output_layer: bool = True


class Training(NamedTuple):
    """A model that any rival can take a step of."""

    model: Any
    optimizer: Any
    batch: Batch
    words: str  # what the model is
    device: torch.device

    @property
    def output_layer(self) -> Any:
        from megatron.core.utils import get_attr_wrapped_model

        return get_attr_wrapped_model(self.model, "output_layer")

    def step(self, rival: Rival) -> None:
        from megatron.core.distributed import finalize_model_grads

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        rival.objective(self.model, self.batch).backward()  # type: ignore[no-untyped-call]
        finalize_model_grads([self.model])
        self.optimizer.step()


@contextmanager
def training(case: Case, hidden: int) -> Iterator[Training]:
    """A GPT of `case.vocabulary` entries and a batch of `case.tokens` tokens.

    In a process that has not imported Megatron yet.

    Raises:
        ValueError: a hidden size that heads of 64 do not divide.
    """
    if hidden < HEAD_DIM or hidden % HEAD_DIM:
        raise ValueError(f"hidden must be a positive multiple of {HEAD_DIM}, got {hidden}")
    cpu.install()  # does nothing where there is a GPU
    from megatron.core import parallel_state, tensor_parallel

    device = find_device()
    with tempfile.TemporaryDirectory() as folder:
        where = {"init_method": f"file://{Path(folder)}/store", "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(device.backend, **where)  # type: ignore[arg-type]
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            model, optimizer = _build(case, hidden)
            sequence = math.gcd(case.tokens, LONGEST_SEQUENCE)
            size = f"{LAYERS} layers of hidden size {hidden}"
            words = f"{size}, {case.tokens // sequence} sequences of {sequence}"
            place = torch.device(device.type)
            yield Training(model, optimizer, _batch(case, sequence), words, place)
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _build(case: Case, hidden: int) -> tuple[Any, Any]:
    """Llama's shape; in bf16 with fp32 gradients and master weights."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    dtype: torch.dtype = getattr(torch, case.dtype)
    is_bf16 = dtype == torch.bfloat16
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 8 // 3,
        num_attention_heads=hidden // HEAD_DIM,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=find_device().type == "cpu",
        bf16=is_bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=case.vocabulary,
        max_sequence_length=LONGEST_SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).cuda()
    if is_bf16:
        model = Float16Module(config, model)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=LEARNING_RATE, bf16=is_bf16, params_dtype=dtype, clip_grad=1.0), [model]
    )
    return model, optimizer


def _batch(case: Case, sequence: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(
        case.vocabulary, (case.tokens // sequence, sequence + 1), generator=generator
    )
    size = (case.tokens // sequence, sequence)
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": torch.ones(size),
        "position_ids": torch.arange(sequence).expand(size).contiguous(),
        "attention_mask": torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1),
    }
    return {name: tensor.cuda() for name, tensor in batch.items()}


def rivals(case: Case) -> tuple[list[Rival], list[tuple[Rival, str]]]:
    """(the losses, ours first; those that cannot take part, with the reason)."""
    chunk_tokens = max(1, min(InfoEntropyConfig().chunk_tokens, case.tokens // 2))
    fused_linear = InfoEntropyConfig(fused_linear=True, chunk_tokens=chunk_tokens)
    found = [
        _ours("infoentropy", InfoEntropyConfig(), case),
        _ours("infoentropy fused linear", fused_linear, case),
        Rival("megatron unfused", "cross entropy", _their_objective(fused=False)),
    ]
    fused = Rival("megatron fused", "cross entropy", _their_objective(fused=True))
    if cpu.is_installed():
        return found, [(fused, "torch.compile is off where Megatron runs on a CPU")]
    return [*found, fused], []


def _ours(name: str, config: InfoEntropyConfig, case: Case) -> Rival:
    objective = _our_objective(config, case.vocabulary)
    return Rival(name, "infoentropy", objective, True, not config.fused_linear)


def _our_objective(config: InfoEntropyConfig, vocabulary: int) -> Objective:
    from megatron.core import mpu

    from megatron_infoentropy.integration.observe import TokenObserver
    from megatron_infoentropy.integration.output import (
        OutputSettings,
        statistics_processor,
        unpack,
    )
    from megatron_infoentropy.integration.step import Groups, training_loss

    observer = TokenObserver(vocabulary)
    settings = OutputSettings(config, mpu.get_tensor_model_parallel_group(), vocabulary)
    groups = Groups(mpu.get_context_parallel_group(), mpu.get_data_parallel_group())

    def objective(model: Any, batch: Batch) -> torch.Tensor:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            output_processor=statistics_processor,
            output_processor_context=settings,
        )
        loss, count, report, weight = training_loss(batch["loss_mask"], output, config, groups)
        statistics = unpack(output.detach())
        observer.add(statistics, weight, batch["loss_mask"], report["objective"])
        return loss / count

    return objective


def _their_objective(*, fused: bool) -> Objective:
    from megatron.core.utils import get_attr_wrapped_model

    def objective(model: Any, batch: Batch) -> torch.Tensor:
        get_attr_wrapped_model(model, "config").cross_entropy_loss_fusion = fused
        losses = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
        )
        mask = batch["loss_mask"]
        mean: torch.Tensor = (losses * mask).sum() / mask.sum()
        return mean

    return objective
