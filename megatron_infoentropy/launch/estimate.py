"""What a training will take of every rank, by arithmetic alone: parameters, memory, traffic.

For a dense GPT of Megatron's, its layers spread evenly over pipeline stages. Names, units:
t, p, d are the tensor-, pipeline- and data-parallel sizes; memory is in bytes of one rank, traffic
in bytes that one rank sends in one step, collectives as rings: an all-reduce of n bytes over k
ranks sends 2 n (k-1)/k, a reduce-scatter or an all-gather half of that.
"""

from dataclasses import dataclass
from math import ceil

STATISTICS_BYTES = 16  # a token's part of the loss's one all-gather


@dataclass(frozen=True)
class Shape:
    """A training as Megatron understood its flags; `launch.parsed` writes it."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    norm_vectors: int  # 1, or 2 with a bias
    qk_layernorm: bool
    position_table: int  # rows of learned positions, 0 without
    untied: bool
    vocab_size: int  # padded
    tensor_parallel: int
    pipeline_parallel: int
    virtual_stages: int  # chunks of layers a pipeline rank has
    data_parallel: int
    sequence_parallel: bool
    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    train_iters: int
    weight_bytes: int  # of one parameter in the forward pass
    gradient_bytes: int
    optimizer_bytes: int  # Adam's moments of one parameter and the copy of it that is updated
    distributed_optimizer: bool
    fp8: bool
    fused_linear: bool
    chunk_tokens: int
    layer_activations: int  # bytes that one layer keeps of one micro-batch, Megatron's formula
    recompute: str  # "", uniform or block
    recompute_layers: int

    @property
    def micro_batches(self) -> int:
        """Accumulated in a step by every rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of one micro-batch, whole."""
        tokens = self.micro_batch_size * self.seq_length
        return tokens * self.hidden_size * self.weight_bytes


@dataclass(frozen=True)
class Stage:
    """Parameters of one pipeline stage: cut by tensor parallelism, and whole on each of its ranks.

    `linear` of the cut ones are matrices of layers, which FP8 quantises.
    """

    cut: int
    whole: int
    linear: int

    def on_a_rank(self, tensor_parallel: int) -> int:
        return self.cut // tensor_parallel + self.whole


def parameters(shape: Shape) -> int:
    """Of the whole model; an embedding table that is tied counts once."""
    copies = not shape.untied and shape.pipeline_parallel > 1
    total = sum(stage.cut + stage.whole for stage in stages(shape))
    return total - (shape.vocab_size * shape.hidden_size if copies else 0)


def stages(shape: Shape) -> list[Stage]:
    """Every pipeline stage, first to last."""
    last = shape.pipeline_parallel - 1
    return [_stage(shape, index == 0, index == last) for index in range(shape.pipeline_parallel)]


def _stage(shape: Shape, is_first: bool, is_last: bool) -> Stage:
    layers = shape.num_layers // shape.pipeline_parallel
    linear, biases, whole = _layer(shape)
    table = shape.vocab_size * shape.hidden_size
    tables = is_first + is_last if shape.untied or shape.pipeline_parallel > 1 else 1
    final_norm = shape.norm_vectors * shape.hidden_size if is_last else 0
    positions = shape.position_table * shape.hidden_size if is_first else 0
    return Stage(
        cut=layers * (linear + biases) + tables * table,
        whole=layers * whole + final_norm + positions,
        linear=layers * linear,
    )


def _layer(shape: Shape) -> tuple[int, int, int]:
    """(matrices, their biases that are cut, what every tensor-parallel rank has) of one layer."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size * (2 if shape.gated else 1)
    query = shape.num_attention_heads * shape.kv_channels
    qkv = query + 2 * shape.num_query_groups * shape.kv_channels
    linear = hidden * (qkv + query) + hidden * (ffn + shape.ffn_hidden_size)
    cut_biases = (qkv if shape.linear_bias or shape.qkv_bias else 0) + ffn * shape.linear_bias
    norms = shape.norm_vectors * (2 * hidden + 2 * shape.kv_channels * shape.qk_layernorm)
    return linear, cut_biases, norms + 2 * hidden * shape.linear_bias


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank, by what holds them."""

    weights: int
    fp8_weights: int
    gradients: int
    optimizer_sharded: int  # with the distributed optimizer
    optimizer_whole: int  # without
    activations: int
    logits_whole: int  # of one micro-batch, gradient in place
    logits_fused: int  # with the fused output layer

    def total(self, shape: Shape) -> int:
        """Of what the training's flags choose."""
        optimizer = self.optimizer_sharded if shape.distributed_optimizer else self.optimizer_whole
        logits = self.logits_fused if shape.fused_linear else self.logits_whole
        kept = self.weights + self.fp8_weights + self.gradients + optimizer
        return kept + self.activations + logits


def memory(shape: Shape) -> Memory:
    """Of the rank that holds most; fragmentation, workspaces and NCCL's buffers come on top."""
    fullest = max(stages(shape), key=lambda stage: stage.on_a_rank(shape.tensor_parallel))
    count = fullest.on_a_rank(shape.tensor_parallel)
    tokens = shape.micro_batch_size * shape.seq_length
    columns = shape.vocab_size // shape.tensor_parallel * shape.weight_bytes
    return Memory(
        weights=count * shape.weight_bytes,
        # Transformer Engine keeps each matrix in FP8 twice: as it is, and transposed.
        fp8_weights=2 * fullest.linear // shape.tensor_parallel if shape.fp8 else 0,
        gradients=count * shape.gradient_bytes,
        optimizer_sharded=ceil(count * shape.optimizer_bytes / shape.data_parallel),
        optimizer_whole=count * shape.optimizer_bytes,
        activations=_activations(shape),
        logits_whole=tokens * columns,
        # Two chunks while their statistics are gathered, and never more than there are tokens.
        logits_fused=min(2 * shape.chunk_tokens, tokens) * columns,
    )


def _activations(shape: Shape) -> int:
    """Of the first stage, which has most micro-batches on their way."""
    stages, layers = shape.pipeline_parallel, shape.num_layers / shape.pipeline_parallel
    if shape.virtual_stages > 1:
        in_flight = stages + (stages - 1) / shape.virtual_stages
    else:
        in_flight = min(shape.micro_batches, stages)
    if not shape.recompute:
        return ceil(in_flight * layers * shape.layer_activations)
    inputs = shape.hidden_bytes // (shape.tensor_parallel if shape.sequence_parallel else 1)
    if shape.recompute == "uniform":  # an input every so many layers; these once in full
        kept = ceil(layers / shape.recompute_layers) * inputs
        return ceil(in_flight * kept) + shape.recompute_layers * shape.layer_activations
    redone = min(shape.recompute_layers, layers)
    kept = ceil(redone * inputs + (layers - redone) * shape.layer_activations)
    return ceil(in_flight * kept) + shape.layer_activations


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends in a step."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int


def traffic(shape: Shape) -> Traffic:
    """Gradients and parameters once a step, hidden states with every micro-batch."""
    return Traffic(
        tensor_parallel=shape.micro_batches * _tensor_parallel(shape),
        pipeline_parallel=shape.micro_batches * _pipeline_parallel(shape),
        data_parallel=_data_parallel(shape),
    )


def _tensor_parallel(shape: Shape) -> int:
    """Of one micro-batch, on a rank of the stage that has the output layer."""
    ranks = shape.tensor_parallel
    half = shape.hidden_bytes * (ranks - 1) / ranks  # a reduce-scatter or an all-gather
    layers = shape.num_layers / shape.pipeline_parallel
    redone = {"": 0.0, "uniform": layers, "block": min(shape.recompute_layers, layers)}
    # Attention and MLP: one all-reduce each way; a recomputed layer does the forward ones again.
    # With sequence parallelism their inputs are gathered once more for the weights' gradients.
    halves = layers * 8 + redone[shape.recompute] * 4 + layers * 2 * shape.sequence_parallel
    embedding = 2 if shape.pipeline_parallel == 1 else 0
    output_layer = 3 if shape.sequence_parallel else 2
    tokens = shape.micro_batch_size * shape.seq_length
    statistics = tokens * STATISTICS_BYTES * (ranks - 1)
    return ceil((halves + embedding + output_layer) * half + statistics)


def _pipeline_parallel(shape: Shape) -> int:
    """Of one micro-batch on the busiest stage: hidden states onwards, their gradients back."""
    if shape.pipeline_parallel == 1:
        return 0
    sent = shape.hidden_bytes // (shape.tensor_parallel if shape.sequence_parallel else 1)
    # The first stage has nobody to send gradients to, unless its next chunk of layers follows on.
    both_ways = 2 if shape.pipeline_parallel > 2 or shape.virtual_stages > 1 else 1
    return both_ways * shape.virtual_stages * sent


def _data_parallel(shape: Shape) -> int:
    ranks = shape.data_parallel
    count = max(stage.on_a_rank(shape.tensor_parallel) for stage in stages(shape))
    gradients = count * shape.gradient_bytes
    returned = count * shape.weight_bytes if shape.distributed_optimizer else gradients
    return ceil((gradients + returned) * (ranks - 1) / ranks)
