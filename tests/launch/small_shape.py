"""A training small enough to count by hand."""

from megatron_infoentropy.launch.estimate import Shape

# 4 layers of hidden 8, 2 heads of 4, SwiGLU of 16, vocabulary 32, untied: small enough for paper.
PLAIN = Shape(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    gated=True,
    linear_bias=False,
    qkv_bias=False,
    norm_vectors=1,
    qk_layernorm=False,
    position_table=0,
    untied=True,
    vocab_size=32,
    tensor_parallel=1,
    pipeline_parallel=1,
    virtual_stages=1,
    data_parallel=2,
    sequence_parallel=False,
    micro_batch_size=3,
    global_batch_size=12,
    seq_length=10,
    train_iters=7,
    weight_bytes=2,
    gradient_bytes=4,
    distributed_optimizer=True,
    fp8=False,
    fused_linear=False,
    chunk_tokens=5,
    layer_activations=1000,
    recompute="",
    recompute_layers=1,
)
