"""Megatron's GPT model as plain PyTorch, straight from the stored parameters: the check's witness.

It shares no code with the conversion. It does what Megatron's modules do in the arrangement they
do it in: queries, keys and values of a group come out of one multiplication side by side, and
rotary pairs are turned where they stand. One sequence at a time, fp32, no cache, no dropout.
"""

from argparse import Namespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint


class ReferenceModel:
    """The model of a checkpoint; parameters rounded to `dtype` and then computed with in fp32."""

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: torch.dtype) -> None:
        self.args: Namespace = checkpoint.args
        self.weights = {
            name: checkpoint.read(name).to(dtype).float() for name in checkpoint.tensors
        }

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return [length, padded vocabulary] for token ids [length]."""
        table = self.weights["embedding.word_embeddings.weight"]
        x = table[tokens]
        turn = self._angles(len(tokens))
        for layer in range(self.args.num_layers):
            x = x + self._attention(x, layer, turn)
            x = x + self._mlp(x, layer)
        x = self._norm(x, self.weights["decoder.final_layernorm.weight"])
        return x @ self.weights.get("output_layer.weight", table).T

    def _attention(self, x: Tensor, layer: int, turn: Tensor) -> Tensor:
        args, length = self.args, len(x)
        x = self._norm(
            x,
            self._of(
                layer, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
            ),
        )
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        mixed = x @ self._of(layer, "self_attention.linear_qkv.weight").T
        mixed = mixed.view(length, groups, -1, args.kv_channels).transpose(0, 1)
        query, key, value = mixed[:, :, :-2], mixed[:, :, -2:-1], mixed[:, :, -1:]
        query, key = self._rotate(query, turn), self._rotate(key, turn)
        context = [
            scaled_dot_product_attention(
                query[group].transpose(0, 1),
                key[group].transpose(0, 1).expand(query.shape[2], -1, -1),
                value[group].transpose(0, 1).expand(query.shape[2], -1, -1),
                is_causal=True,
            )
            for group in range(groups)
        ]
        heads = torch.cat(context).transpose(0, 1).reshape(length, -1)
        return heads @ self._of(layer, "self_attention.linear_proj.weight").T

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        x = self._norm(
            x, self._of(layer, "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        )
        both = x @ self._of(layer, "mlp.linear_fc1.weight").T
        width = both.shape[-1] // 2
        return (silu(both[:, :width]) * both[:, width:]) @ self._of(
            layer, "mlp.linear_fc2.weight"
        ).T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.args.layernorm_epsilon)
        return x * scale * (weight + 1 if self.args.layernorm_zero_centered_gamma else weight)

    def _angles(self, length: int) -> Tensor:
        """Return unit complex numbers [length, D/2]: by how much each pair is turned."""
        pairs = self.args.kv_channels // 2
        frequency = self.args.rotary_base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)

    def _rotate(self, x: Tensor, turn: Tensor) -> Tensor:
        """Turn the pairs of x [G, length, heads, D]."""
        if self.args.rotary_interleaved:
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            turned = torch.view_as_complex(pairs.contiguous()) * turn[:, None]
            return torch.view_as_real(turned).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first.contiguous(), second.contiguous()) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    def _of(self, layer: int, *names: str) -> Tensor:
        """Return the layer's parameter under the first of its names that was stored."""
        for name in names:
            if (stacked := self.weights.get(f"decoder.layers.{name}")) is not None:
                return stacked[layer]
            if (alone := self.weights.get(f"decoder.layers.{layer}.{name}")) is not None:
                return alone
        raise ValueError(f"the checkpoint has no {' or '.join(names)} for layer {layer}")
