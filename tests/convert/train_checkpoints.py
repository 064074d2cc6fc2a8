"""Checkpoints of Megatron's own trainer, on the CPU, and what its models compute.

For every case below `train_all` leaves FOLDER/<case>/save, the folder Megatron wrote, and
FOLDER/<case>/golden.pt: tokens, the logits of Megatron's model for them, and its greedy
continuation of the first few. The cases of IMPORTED start from a Hugging Face model,
FOLDER/<case>/hf, and do not change it (learning rate 0).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from launch import run_trainer

from megatron_infoentropy.convert import convert_from_hf
from megatron_infoentropy.convert.megatron_model import one_rank_inputs

COMMON = """
--seq-length 64 --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 8
--micro-batch-size 2 --global-batch-size 4 --lr-decay-style constant
--eval-interval 100 --eval-iters 0 --save-interval 100 --hidden-dropout 0 --attention-dropout 0
"""
MODEL = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 8
--max-position-embeddings 96 --init-method-std 0.2 --vocab-size 250
--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
--train-iters 3 --lr 0.02
"""
GQA = "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights"
# Everything that is the other way round: one key per query, one table, the other rotary pairing,
# heads wider than hidden/heads, other constants.
OTHER = "--rotary-interleaved --kv-channels 16 --rotary-base 50000 --norm-epsilon 1e-3"

EXPERTS = """
--num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
"""
CASES = {  # name: (number of ranks, flags)
    "tp2": (2, GQA + " --tensor-model-parallel-size 2"),
    "pp2": (2, GQA + " --pipeline-model-parallel-size 2"),
    "other": (2, OTHER + " --tensor-model-parallel-size 2"),
    "bf16": (2, GQA + " --bf16 --use-distributed-optimizer"),
    "experts": (2, GQA + EXPERTS + " --expert-model-parallel-size 2"),
    "pre_softmax": (1, EXPERTS + " --qk-layernorm --moe-router-pre-softmax --rotary-interleaved"),
    "hybrid": (2, GQA + " --pipeline-model-parallel-size 2 --hybrid-layer-pattern *-*-|*-*-"),
    "rope32": (1, "--rotary-base 500000 --use-rope-scaling --rope-scaling-factor 32"),
}
_LLAMA = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 256}
_LLAMA |= {"intermediate_size": 176, "num_key_value_heads": 2, "max_position_embeddings": 64}
_LLAMA |= {"initializer_range": 0.2}
_EXPERTS = _LLAMA | {"num_experts_per_tok": 2, "num_hidden_layers": 2, "intermediate_size": 48}
_EXPERTS |= {"moe_intermediate_size": 48}
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 64, "vocab_size": 256}
_NEOX = {**_LLAMA, "use_parallel_residual": False, "rotary_pct": 0.5}
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
IMPORTED: dict[str, tuple[str, dict[str, Any], str]] = {  # model type, its configuration, layout
    "llama": ("llama", _LLAMA | {"rope_theta": 5e4, "tie_word_embeddings": True}, TP2),
    "qwen2": ("qwen2", _LLAMA | {"rms_norm_eps": 1e-3}, PP2),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}, TP2),
    "mixtral": ("mixtral", _EXPERTS | {"num_local_experts": 4}, EP2),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"num_experts": 4, "norm_topk_prob": True}, PP2),
    "gpt_neox": ("gpt_neox", _NEOX, TP2),
    "gpt2": ("gpt2", _GPT2 | {"activation_function": "gelu", "initializer_range": 0.2}, PP2),
    "hybrid_qwen2": ("qwen2", _LLAMA | {"tie_word_embeddings": True}, TP2),
    "hybrid_gpt_neox": ("gpt_neox", _NEOX, PP2),
}
PROMPT, NEW_TOKENS = 16, 12


def golden_tokens() -> list[list[int]]:
    """Three sequences of text, one byte a token."""
    text = (__doc__ or "").encode()
    return [list(text[start : start + 64]) for start in (0, 150, 300)]


def train(folder: Path) -> None:
    """Train one rank's part of a case, let Megatron save it, and record what it computes."""
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_infoentropy.integration.compat import model_config_from_args, prepare_megatron

    prepare_megatron()
    models: list[Any] = []

    def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
        models[:] = [model]
        batch = next(batches)
        return model(*inputs_of(batch[:, :-1]), labels=batch[:, 1:].contiguous()), sum_and_count

    def datasets(sizes: list[int], vp_stage: int | None = None) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (64, get_args().seq_length + 1)
        return [torch.randint(250, shape, generator=generator) for _ in sizes]

    datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own
    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, model_config_from_args(args))
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
    record(models[0], folder / "golden.pt")


def inputs_of(tokens: Any) -> tuple[Any, Any, Any]:
    """Return token ids, positions and the mask of causal attention, as GPTModel takes them."""
    positions, mask = one_rank_inputs(tokens.shape[1])
    return tokens.contiguous(), positions.expand_as(tokens), mask


def sum_and_count(loss: Any) -> tuple[Any, Any, dict[str, Any]]:
    count = torch.tensor(loss.numel(), dtype=torch.int)
    return loss.sum(), count, {"loss": torch.stack([loss.detach().sum(), count.float()])}


def record(model: Any, path: Path) -> None:
    """Save what the trained model computes, from the ranks of the last pipeline stage."""
    model.eval()
    sequences = golden_tokens()
    logits = [full_logits(model, sequence) for sequence in sequences]
    generated = sequences[0][:PROMPT]
    last = torch.distributed.get_world_size() - 1
    for _ in range(NEW_TOKENS):
        best = full_logits(model, generated)
        token = torch.zeros(1, dtype=torch.long) if best is None else best[-1:, :250].argmax(-1)
        torch.distributed.broadcast(token, last)
        generated = [*generated, int(token)]
    if torch.distributed.get_rank() == last:
        torch.save({"tokens": sequences, "logits": logits, "generated": generated}, path)


def full_logits(model: Any, sequence: list[int]) -> Any:
    """Return logits [length, padded vocabulary]; None on ranks before the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    def step(_: Any, model: Any) -> tuple[Any, Any]:
        output = model(*inputs_of(torch.tensor([sequence])))
        return output, lambda logits, non_loss_data: gather(logits)[0].float()

    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=len(sequence),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected[0] if collected else None


def train_all(folder: Path) -> None:
    for name, (world, flags) in CASES.items():
        train_case(folder / name, MODEL + flags, world)
    for name, (kind, config, layout) in IMPORTED.items():
        flags = import_model(folder / name, kind, config, name.startswith("hybrid"))
        train_case(folder / name, flags + layout, 2)


def train_case(case: Path, flags: str, world: int) -> None:
    case.mkdir(exist_ok=True)
    words = [*COMMON.split(), *flags.split(), "--save", str(case / "save")]
    run_trainer(world, train, (case,), words, case)


def import_model(case: Path, kind: str, config: dict[str, Any], hybrid: bool) -> str:
    """Make a Hugging Face model and a Megatron checkpoint of it; return the flags to load it."""
    from transformers import AutoConfig, AutoModelForCausalLM  # which ranks need not

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are all 1 and biases 0: mistakes would not show
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(case / "hf")
    flags = convert_from_hf(case / "hf", case / "megatron", hybrid=hybrid).flags
    words = (f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())
    load = f"--load {case / 'save'} --pretrained-checkpoint {case / 'megatron'}"
    # GPT-2's configuration asks for dropout, which the comparison with transformers leaves out.
    same = "--vocab-size 256 --train-iters 1 --lr 0 --hidden-dropout 0 --attention-dropout 0"
    return " ".join(words) + f" {load} {same} "
