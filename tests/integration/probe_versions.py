"""Language models of the megatron-core on the path, with the loss bound, on two gloo ranks.

`python probe_versions.py FOLDER` imports Megatron once and forks two ranks; each writes what it saw
to FOLDER/<tensor ranks>-<rank>.pt, at two tensor-parallel ranks and then at one (two data ranks).
"""

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
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron_bridge import infoentropy_hook  # noqa: E402
from oracle import dense_objective  # noqa: E402
from other_models import bert_model, hybrid_model, t5_model  # noqa: E402

from megatron_infoentropy import InfoEntropyConfig  # noqa: E402
from megatron_infoentropy.integration import bound_loss, use_infoentropy_loss  # noqa: E402

VOCAB, BATCH, SEQUENCE, LAYERS = 64, 2, 16, 2
GAMMA = 2.0


def main(folder):
    initialize(tensor_ranks=2)
    found = gpt_results(by_hook=False)
    found |= {"version": __version__, "other": [compare(*made) for made in other_models()]}
    torch.save(found, folder / f"2-{dist.get_rank()}.pt")
    parallel_state.destroy_model_parallel()
    initialize(tensor_ranks=1)
    torch.save(gpt_results(by_hook=True), folder / f"1-{dist.get_rank()}.pt")


def initialize(tensor_ranks):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def model_config(**settings):
    return TransformerConfig(
        num_layers=LAYERS,
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


def gpt_model():
    """The model of dense_gpt.py."""
    torch.manual_seed(1)
    config = model_config(
        num_query_groups=2,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        VOCAB,
        SEQUENCE,
        position_embedding_type="rope",
    )


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


def gpt_results(*, by_hook):
    """Losses and gradients of the bound loss, and Megatron's own loss.

    by_hook: the example's, as Megatron-Bridge and megatron-core 0.19 call it.
    """
    data_rank = parallel_state.get_data_parallel_rank()
    tokens, labels, mask = batch_of(data_rank)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1).contiguous()
    future = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    real = labels.clamp_min(0)  # Megatron's own loss knows no ignored label

    def forward(labels, **options):
        return model(tokens, positions, future, labels=labels, **options)

    model = gpt_model()
    own = forward(real).detach()
    use_infoentropy_loss([model], InfoEntropyConfig(gamma=0.0))
    found = {"own": own, "gamma 0": forward(real).detach()}
    found |= {"tokens": tokens, "labels": labels, "mask": mask}

    if by_hook:
        (model,) = infoentropy_hook(InfoEntropyConfig(gamma=GAMMA))([model])
    else:
        use_infoentropy_loss(model, InfoEntropyConfig(gamma=GAMMA), inplace_backward=True)
    losses = forward(labels, loss_mask=mask)
    ((losses * mask).sum() / mask.sum()).backward()
    found |= {"losses": losses.detach(), "calls": bound_loss(model).training_calls}
    found["parameters"] = {f"0.{n}": p.detach() for n, p in model.named_parameters()}
    found["gradients"] = {f"0.{n}": p.grad for n, p in model.named_parameters()}
    model.eval()
    found["evaluation"] = forward(real, loss_mask=mask).detach()
    found["bypass"] = what_a_bypass_says(model, forward, real)
    return found


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


def other_models():
    """(model, arguments of its forward, name of the labels), of the classes beside GPTModel."""
    tokens, labels, _ = batch_of(0)
    torch.manual_seed(2)
    for make in (hybrid_model, t5_model, bert_model):
        yield make(model_config, VOCAB, SEQUENCE, tokens, labels.clamp_min(0))


def compare(model, arguments, name):
    """Of the bound loss and of dense float64 on the model's own gathered logits: (name, worst
    error of gamma 0 to the model's own loss, of the objective, of a parameter's gradient)."""
    labels = arguments.pop(name)

    def forward(**options):
        output = model(**arguments, **options)
        return output[0] if isinstance(output, tuple) else output

    own = forward(**{name: labels}).detach()
    use_infoentropy_loss(model, InfoEntropyConfig(gamma=0.0))
    plain = (forward(**{name: labels}).detach() - own).abs().max()

    shards = forward()  # [b, s, V/TP]
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(shards)
    truth = dense_objective([(logits, labels, torch.ones_like(labels))], gamma=GAMMA)
    truth.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    use_infoentropy_loss(model, InfoEntropyConfig(gamma=GAMMA))
    objective = forward(**{name: labels}).mean()
    objective.backward()
    worst = max(
        float((p.grad - expected[n]).abs().max() / expected[n].abs().max())
        for n, p in model.named_parameters()
        if n in expected and expected[n].abs().max() > 1e-6
    )
    return type(model).__name__, float(plain), float(objective - truth), worst


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
