r"""Write a Megatron checkpoint of a Llama of any size with random bf16 numbers, to measure with.

python tests/convert/generate_checkpoint.py FOLDER --layers 24 --hidden 2048 --ffn 5120 --heads 16 \
    --vocabulary 50304 [--stacked]

As in Megatron, every layer is a piece of its own; with --stacked, all layers of a parameter are one
piece, as other writers leave them. Needs the memory of one piece.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.distcp_writer import CheckpointWriter
from megatron_infoentropy.convert.from_hf import arguments_of
from megatron_infoentropy.convert.matching import rows_of, shape_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stacked", action="store_true")
    for name in ("layers", "hidden", "ffn", "heads", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, required=True)
    words = parser.parse_args()
    model = Architecture(
        family="llama",
        num_layers=words.layers,
        hidden_size=words.hidden,
        ffn_hidden_size=words.ffn,
        num_heads=words.heads,
        num_groups=words.heads,
        head_dim=words.hidden // words.heads,
        norm_epsilon=1e-5,
        activation="silu_gated",
        rotary_base=10000.0,
        rotary_percent=1.0,
        rope_scaling_factor=None,
        max_positions=2048,
        vocab_size=words.vocabulary,
        padded_vocab_size=words.vocabulary,
        initializer_range=0.02,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untied=True,
        linear_bias=False,
        qkv_bias=False,
        interleaved_rotary=False,
        zero_centered_norms=False,
    )
    write(words.folder / "iter_0000001", model, words.stacked)
    (words.folder / "latest_checkpointed_iteration.txt").write_text("1")


def write(folder: Path, model: Architecture, stacked: bool) -> None:
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder)
    writer.object("common_state/shard_0_1", {"args": arguments_of(model), "iteration": 1})
    done: set[str] = set()
    for row in rows_of(model):
        if done & set(row.hf):
            continue
        done |= set(row.hf)
        shape, name = shape_of(row, model), row.megatron.replace(".*.", ".")
        if "*" not in row.megatron:
            writer.tensor(name, draw(shape))
        elif stacked:
            writer.tensor(name, draw((model.num_layers, *shape)))
        else:
            for layer in range(model.num_layers):
                writer.tensor(name, draw(shape), index=(layer,), of=(model.num_layers,))
    writer.finish()
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))


BLOCK = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()


def draw(shape: tuple[int, ...]) -> torch.Tensor:
    """The same random numbers over and over, which no row has in the same place."""
    repeats = -(-math.prod(shape) // len(BLOCK))
    return BLOCK.repeat(repeats)[: math.prod(shape)].view(shape)


if __name__ == "__main__":
    main()
