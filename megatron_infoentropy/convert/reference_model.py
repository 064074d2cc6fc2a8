"""Megatron's GPT or hybrid model as plain PyTorch, straight from the stored parameters.

The other side of the check where Megatron's own model (`megatron_model`) cannot be run. It shares
no code with the conversion. It does what Megatron's modules do in the arrangement they do it in:
queries, keys and values of a group come out of one multiplication side by side, and rotary pairs
are turned where they stand. fp32, no cache, no dropout; one matrix is in memory at a time.
"""

import math
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from megatron_infoentropy.convert.layers import Place, StoredModel


class ReferenceModel(StoredModel):
    """The forward pass of a checkpoint's model."""

    @torch.no_grad()
    def logits(self, tokens: Tensor, advance: Callable[[int], None]) -> Tensor:
        """Return logits [length, padded vocabulary] of token ids [length]."""
        table = self.read((), "embedding.word_embeddings.weight")
        x = table[tokens]
        if self.args.position_embedding_type == "learned_absolute":
            x = x + self.read((), "embedding.position_embeddings.weight")[: len(x)]
        for layer, kinds in enumerate(self._layers()):
            for kind in kinds:
                x = x + {"*": self._attention, "-": self._mlp}[kind](x, (layer,))
            advance(1)
        if self.has((), "output_layer.weight"):
            table = self.read((), "output_layer.weight")
        return self._norm(x, (), "decoder.final_layernorm.", "decoder.final_norm.") @ table.T

    def _layers(self) -> list[str]:
        """Return what each layer is: attention (*), an MLP (-), a GPT's both."""
        pattern = getattr(self.args, "hybrid_layer_pattern", None)
        return ["*-"] * self.args.num_layers if pattern is None else [*pattern.replace("|", "")]

    def _attention(self, x: Tensor, place: Place) -> Tensor:
        args, length = self.args, len(x)
        x = self._norm(x, place, "self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        mixed = self._linear(x, place, "self_attention.linear_qkv.")
        mixed = mixed.view(length, groups, -1, args.kv_channels).transpose(0, 1)
        query, key, value = mixed[:, :, :-2], mixed[:, :, -2:-1], mixed[:, :, -1:]
        if getattr(args, "qk_layernorm", False):
            query = self._norm(query, place, "self_attention.q_layernorm.")
            key = self._norm(key, place, "self_attention.k_layernorm.")
        if args.position_embedding_type == "rope":
            turn = self._turns(length)
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
        return self._linear(heads, place, "self_attention.linear_proj.")

    def _mlp(self, x: Tensor, place: Place) -> Tensor:
        x = self._norm(x, place, "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        if getattr(self.args, "num_experts", None) is None:
            return self._two_linears(x, place, "mlp.")
        shares, experts = self._route(x @ self.read(place, "mlp.router.weight").T)
        self.routes[place[0]].append(experts)
        y = torch.zeros_like(x)
        for number in range(self.args.num_experts):
            token, choice = torch.where(experts == number)
            if len(token):
                one = self._two_linears(x[token], (*place, number), "")
                y[token] += shares[token, choice, None] * one
        return y

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the experts that each token is sent to, and their numbers."""
        if self.args.moe_router_pre_softmax:
            shares, experts = logits.softmax(-1).topk(self.args.moe_router_topk)
            return shares, experts
        best, experts = logits.topk(self.args.moe_router_topk)
        return best.softmax(-1), experts

    def _two_linears(self, x: Tensor, place: Place, prefix: str) -> Tensor:
        both = self._linear(x, place, prefix + "linear_fc1.")
        if self.args.swiglu:
            width = both.shape[-1] // 2
            inner = silu(both[:, :width]) * both[:, width:]
        else:
            inner = gelu(both, approximate="tanh" if has_tanh_gelu(self.args) else "none")
        return self._linear(inner, place, prefix + "linear_fc2.")

    def _linear(self, x: Tensor, place: Place, name: str) -> Tensor:
        """Return `x` times a matrix, plus its bias if it has one."""
        y = x @ self.read(place, name + "weight").T
        return y + self.read(place, name + "bias") if self.has(place, name + "bias") else y

    def _norm(self, x: Tensor, place: Place, *names: str) -> Tensor:
        weight = self.read(place, *(name + "weight" for name in names))
        if self.args.layernorm_zero_centered_gamma:
            weight = weight + 1
        epsilon = self.args.layernorm_epsilon
        if self.args.normalization == "RMSNorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
        bias = self.read(place, *(name + "bias" for name in names))
        return layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    def _turns(self, length: int) -> Tensor:
        """Return unit complex numbers [length, R/2]: by how much each pair is turned.

        In fp32, as Megatron computes them: at position 2000 that is 1e-4 of a radian off.
        """
        args = self.args
        width = int(args.kv_channels * args.rotary_percent)
        exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
        frequency = 1.0 / (args.rotary_base**exponent)
        if getattr(args, "use_rope_scaling", False):
            frequency = _stretched(frequency, args.rope_scaling_factor)
        angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
        return torch.polar(torch.ones_like(angle), angle)

    def _rotate(self, x: Tensor, turn: Tensor) -> Tensor:
        """Turn the pairs of x [G, length, heads, D], which are in its first 2 R/2 numbers."""
        width = 2 * turn.shape[-1]
        x, straight = x[..., :width], x[..., width:]
        if self.args.rotary_interleaved:
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            turned = torch.view_as_complex(pairs.contiguous()) * turn[:, None]
            return torch.cat([torch.view_as_real(turned).flatten(-2), straight], dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first.contiguous(), second.contiguous()) * turn[:, None]
        return torch.cat([turned.real, turned.imag, straight], dim=-1)


def has_tanh_gelu(args: Namespace) -> bool:
    """Return whether the model's gelu is the tanh approximation.

    Of Megatron's fused kernel and of Transformer Engine's, which local layers do not have.
    """
    te = getattr(args, "use_te_activation_func", False)
    return args.bias_gelu_fusion or (te and getattr(args, "transformer_impl", None) != "local")


def _stretched(frequency: Tensor, factor: float) -> Tensor:
    """Llama 3's scaling: slow rotations slower by `factor`, fast ones kept, smooth in between."""
    turns = 8192 * frequency / (2 * math.pi)  # over the context of the first training
    share = ((turns - 1) / 3).clamp(0, 1)  # 0 below one turn, 1 from four turns on
    return (1 - share) * frequency / factor + share * frequency
