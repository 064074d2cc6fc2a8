"""Run on every rank: one step of a model with multi-token-prediction heads, by parameters' names.

Names and numbers are those of the whole model, so that layouts can be compared; the numbers are
drawn by the name. What was built before they were drawn is written down too.
"""

import re
import zlib

import torch

from megatron_infoentropy import pretrain as ours

EMBEDDING = "embedding.word_embeddings.weight"
LAYER = re.compile(r"decoder\.layers\.\d+")


def whole_names(chunks):
    """{name in the whole model: parameter} of this rank; copies of the embedding have its name."""
    found = {}
    for chunk in chunks:
        modules = dict(chunk.named_modules())
        for name, parameter in chunk.named_parameters():
            layer = LAYER.match(name)
            if layer:
                number = modules[layer.group()].layer_number - 1
                name = f"decoder.layers.{number}{name[layer.end() :]}"
            found[EMBEDDING if getattr(parameter, "shared", False) else name] = parameter
    return found


def main(folder):
    from megatron.core import mpu

    container, forward_step = ours.prepare()
    transformer = container.model.transformer
    finalize = transformer.finalize_model_grads_func
    written = {}

    def draw(chunks):
        written["built"] = {n: p.detach().clone() for n, p in whole_names(chunks).items()}
        for name, parameter in whole_names(chunks).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return chunks

    def write_down(model, *arguments, **options):
        finalize(model, *arguments, **options)
        named = whole_names([chunk.module for chunk in model])
        written["gradients"] = {name: p.main_grad.clone() for name, p in named.items()}

    container.model.pre_wrap_hooks.append(draw)
    transformer.finalize_model_grads_func = write_down
    ours.run(container, forward_step)
    torch.save(written, folder / f"{mpu.get_pipeline_model_parallel_rank()}.pt")
