"""Run on every rank: `probe_gradients`, the output layer told to add to main_grad by itself.

Megatron's own code for that needs a CUDA extension and is refused on a CPU, ours does not.
"""

import probe_gradients

from megatron_infoentropy import pretrain as ours


def main(folder, gammas):
    prepare = ours.prepare

    def prepare_with_fusion():
        container, forward_step = prepare()
        container.model.pre_wrap_hooks.append(fuse_accumulation)
        return container, forward_step

    ours.prepare = prepare_with_fusion
    probe_gradients.main(folder, gammas)


def fuse_accumulation(chunks):
    for chunk in chunks:
        if chunk.post_process:
            chunk.output_layer.gradient_accumulation_fusion = True
    return chunks
