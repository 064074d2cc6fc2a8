"""Language models of the megatron-core on the path, with the loss bound, on two gloo ranks.

`python probe_versions.py FOLDER` imports Megatron once and forks two ranks; each writes what it saw
to FOLDER/<tensor ranks>-<rank>.json, at two tensor-parallel ranks and then at one (two data ranks).
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from megatron_infoentropy.runtime import cpu

cpu.install()
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import __version__, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.bert import bert_layer_specs  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.T5 import t5_spec  # noqa: E402
from megatron.core.models.T5.t5_model import T5Model  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402
from megatron_bridge import infoentropy_hook  # noqa: E402
from oracle import dense_statistics, dense_weight  # noqa: E402

from megatron_infoentropy import InfoEntropyConfig  # noqa: E402
from megatron_infoentropy.integration import bound_loss, use_infoentropy_loss  # noqa: E402

try:
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid import hybrid_model as hybrid
except ImportError:  # 0.17
    from megatron.core.models.mamba import mamba_model as hybrid
    from megatron.core.ssm import mamba_block as hybrid_block

VOCAB, BATCH, SEQUENCE = 64, 2, 16
FUTURE = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
GAMMA = 2.0


def main(folder):
    for tensor_ranks in (2, 1):
        initialize(tensor_ranks)
        batch = batch_of(parallel_state.get_data_parallel_rank())
        seen = [compare(*gpt_model(*batch), mask=batch[2], by_hook=tensor_ranks == 1)]
        if tensor_ranks == 2:
            others = (hybrid_model, t5_model, bert_model)
            seen += [compare(*make(*batch)) for make in others]
        text = json.dumps({"version": __version__, "seen": seen})
        (folder / f"{tensor_ranks}-{dist.get_rank()}.json").write_text(text)
        parallel_state.destroy_model_parallel()


def initialize(tensor_ranks):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def model_config(**settings):
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        init_method_std=0.2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        **settings,
    )


def gpt_model(tokens, labels, _):
    torch.manual_seed(1)
    config = model_config(num_query_groups=2, normalization="RMSNorm", add_bias_linear=False)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope")
    arguments = {
        "input_ids": tokens,
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
        "attention_mask": FUTURE,
    }
    return model, arguments | {"labels": labels}, "labels"


def hybrid_model(tokens, labels, _):
    """Attention and MLP layers; a Mamba layer takes mamba_ssm, which takes a GPU."""
    torch.manual_seed(2)
    layer = get_gpt_layer_local_spec().submodules
    parts = type(layer)
    attention = parts(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    mlp = parts(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
    name = "Hybrid" if hybrid_block.__name__.endswith("hybrid_block") else "Mamba"  # 0.17
    submodules = getattr(hybrid_block, f"{name}StackSubmodules")(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    # Transformer Engine's, the only one that the stack asks for.
    hybrid_block.TENorm = WrappedTorchNorm
    spec = ModuleSpec(module=getattr(hybrid_block, f"{name}Stack"), submodules=submodules)
    model = getattr(hybrid, f"{name}Model")(
        model_config(), spec, VOCAB, SEQUENCE, hybrid_layer_pattern="*-"
    )
    arguments = {"input_ids": tokens, "position_ids": None, "attention_mask": FUTURE}
    return model, arguments | {"labels": labels.clamp_min(0)}, "labels"


def batch_of(data_rank):
    """tokens, labels, loss mask: masked tokens and ignored labels differ between data ranks."""
    generator = torch.Generator().manual_seed(data_rank)
    text = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    mask = (torch.rand(BATCH, SEQUENCE, generator=generator) > 0.3 * (1 + data_rank)).float()
    mask[:, 0] = 1
    labels = text[:, 1:].clone()
    labels[0, -2:] = -100
    mask[0, -2:] = 0
    return text[:, :-1].contiguous(), labels, mask


def t5_model(tokens, labels, _):
    torch.manual_seed(3)
    config = model_config()
    specs = (
        t5_spec.get_t5_encoder_with_local_block_spec(config.num_layers),
        t5_spec.get_t5_decoder_with_local_block_spec(config.num_layers),
    )
    model = T5Model(
        *(config, config, *specs, VOCAB, SEQUENCE), share_embeddings_and_output_weights=True
    )
    seen = torch.zeros(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    masks = ("encoder_attn_mask", "decoder_attn_mask", "encoder_decoder_attn_mask")
    arguments = {"encoder_input_ids": tokens, "decoder_input_ids": tokens}
    arguments |= dict.fromkeys(masks, seen)
    return model, arguments | {"lm_labels": labels.clamp_min(0)}, "lm_labels"


def bert_model(tokens, labels, _):
    torch.manual_seed(4)
    model = BertModel(
        *(model_config(), 0, bert_layer_specs.bert_layer_local_spec, VOCAB, SEQUENCE),
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    )
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return model, arguments | {"lm_labels": labels.clamp_min(0)}, "lm_labels"


def compare(model, arguments, name, mask=None, by_hook=False):
    """Worst relative errors of the bound loss: of gamma 0 and of evaluation to the model's own
    loss; of losses, objective and a parameter's gradient to dense float64 on the model's own
    gathered logits. Beside them what alpha is a mean of, and what is said where it is passed by.

    by_hook: the loss is bound by the example's, as Megatron-Bridge and megatron-core 0.19 call it.
    """
    labels = arguments.pop(name)
    real = labels.clamp_min(0)  # Megatron's own loss knows no ignored label
    valid = (labels != -100) * (1 if mask is None else mask)

    def forward(labels=None, **options):
        options |= {} if labels is None else {name: labels}
        output = model(**arguments, **options)
        return output[0] if isinstance(output, tuple) else output

    own = forward(real).detach()
    use_infoentropy_loss([model], InfoEntropyConfig(gamma=0.0))
    found = {"model": type(model).__name__, "gamma 0": worst(forward(real), own)}

    logits = tensor_parallel.gather_from_tensor_model_parallel_region(forward())
    ce, entropy, _ = dense_statistics(logits, labels)
    weight = dense_weight(ce, entropy, "infoentropy", GAMMA, 1.0).detach() * valid
    alpha = valid.sum() / weight.sum()
    found["inverse mean weight"] = float(alpha)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(alpha, group=group)
    expected = alpha / group.size() * weight * ce
    truth = expected.sum() / valid.sum()
    truth.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    if by_hook:
        (model,) = infoentropy_hook(InfoEntropyConfig(gamma=GAMMA))([model])
    else:
        use_infoentropy_loss(model, InfoEntropyConfig(gamma=GAMMA), inplace_backward=True)
    masked = {} if mask is None else {"loss_mask": mask}
    losses = forward(labels, **masked)
    objective = (losses * valid).sum() / valid.sum()
    objective.backward()
    errors = [
        worst(p.grad, gradients[n])
        for n, p in model.named_parameters()
        if n in gradients and gradients[n].abs().max() > 1e-6
    ]
    found |= {"losses": worst(losses * valid, expected), "objective": worst(objective, truth)}
    found |= {"gradient": max(errors), "calls": bound_loss(model).training_calls}
    model.eval()
    found["evaluation"] = worst(forward(real, **masked), own)
    return found | {"bypass": [] if mask is None else what_a_bypass_says(model, forward, real)}


def worst(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def what_a_bypass_says(model, forward, labels):
    """The errors of a forward whose loss something else computes."""
    said = []
    for options in ({"output_processor": lambda **_: torch.zeros(())}, {}):
        if not options:
            del model.compute_language_model_loss  # back to the class's own
        try:
            forward(labels, **options)
        except (RuntimeError, TypeError) as error:
            said.append(str(error))
    return said


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    main(folder)
    os._exit(0)  # process groups need no orderly end


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    folder = Path(sys.argv[1])
    ranks = [fork.Process(target=run_rank, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    sys.exit(any(process.exitcode for process in ranks))
