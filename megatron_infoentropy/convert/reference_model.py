"""Megatron's GPT model as plain PyTorch, straight from the stored parameters.

The other side of the check where Megatron's own model (`megatron_model`) cannot be run. It shares
no code with the conversion. It does what Megatron's modules do in the arrangement they
do it in: queries, keys and values of a group come out of one multiplication side by side, and
rotary pairs are turned where they stand. fp32, no cache, no dropout. One layer's parameters are in
memory at a time, and all sequences go through it before the next is read.
"""

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint

Routes = dict[int, list[Tensor]]
"""The numbers of each token's experts [length, top-k]: {layer: those of each sequence}."""


class ReferenceModel:
    """The model of a checkpoint; parameters rounded to `dtype` and then computed with in fp32."""

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: torch.dtype) -> None:
        self.args: Namespace = checkpoint.args
        self.routes: Routes = defaultdict(list)
        self._stored = StoredParameters(checkpoint, dtype)

    @torch.no_grad()
    def logits(
        self, sequences: Sequence[Tensor], done: Callable[[int], None] = lambda layers: None
    ) -> Iterator[Tensor]:
        """Yield [length, padded vocabulary] for each sequence of token ids [length].

        `done` is called with the number of layers that have been computed for a sequence.
        """
        outside = self._stored.layer(None)
        table = outside.find("embedding.word_embeddings.weight")
        states = [table[tokens] for tokens in sequences]
        if self.args.position_embedding_type == "learned_absolute":
            positions = outside.find("embedding.position_embeddings.weight")
            states = [x + positions[: len(x)] for x in states]
        for layer in range(self.args.num_layers):
            parameters = self._stored.layer(layer)
            states = [self._block(x, parameters, self.routes[layer]) for x in states]
            done(len(states))
        if outside.has("output_layer.weight"):
            table = outside.find("output_layer.weight")
        for x in states:
            yield self._norm(x, outside, ("decoder.final_layernorm.",)) @ table.T

    def _block(self, x: Tensor, layer: "StoredLayer", routes: list[Tensor]) -> Tensor:
        x = x + self._attention(x, layer)
        return x + self._mlp(x, layer, routes)

    def _attention(self, x: Tensor, layer: "StoredLayer") -> Tensor:
        args, length = self.args, len(x)
        x = self._norm(x, layer, ("self_attention.linear_qkv.layer_norm_", "input_layernorm."))
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        mixed = layer.linear(x, "self_attention.linear_qkv.")
        mixed = mixed.view(length, groups, -1, args.kv_channels).transpose(0, 1)
        query, key, value = mixed[:, :, :-2], mixed[:, :, -2:-1], mixed[:, :, -1:]
        if getattr(args, "qk_layernorm", False):
            query = self._norm(query, layer, ("self_attention.q_layernorm.",))
            key = self._norm(key, layer, ("self_attention.k_layernorm.",))
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
        return layer.linear(heads, "self_attention.linear_proj.")

    def _mlp(self, x: Tensor, layer: "StoredLayer", routes: list[Tensor]) -> Tensor:
        x = self._norm(x, layer, ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."))
        if getattr(self.args, "num_experts", None) is None:
            return self._linears(x, layer, "mlp.")
        shares, experts = self._route(x @ layer.find("mlp.router.weight").T)
        routes.append(experts)
        y = torch.zeros_like(x)
        for number in range(self.args.num_experts):
            token, choice = torch.where(experts == number)
            if len(token):
                one = self._linears(x[token], layer.expert(number), "")
                y[token] += shares[token, choice, None] * one
        return y

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the experts that each token is sent to, and their numbers."""
        if self.args.moe_router_pre_softmax:
            shares, experts = logits.softmax(-1).topk(self.args.moe_router_topk)
            return shares, experts
        best, experts = logits.topk(self.args.moe_router_topk)
        return best.softmax(-1), experts

    def _linears(self, x: Tensor, layer: "StoredLayer", prefix: str) -> Tensor:
        both = layer.linear(x, prefix + "linear_fc1.")
        if self.args.swiglu:
            width = both.shape[-1] // 2
            inner = silu(both[:, :width]) * both[:, width:]
        else:
            inner = gelu(both, approximate="tanh" if has_tanh_gelu(self.args) else "none")
        return layer.linear(inner, prefix + "linear_fc2.")

    def _norm(self, x: Tensor, layer: "StoredLayer", names: tuple[str, ...]) -> Tensor:
        weight = layer.find(*(name + "weight" for name in names))
        if self.args.layernorm_zero_centered_gamma:
            weight = weight + 1
        epsilon = self.args.layernorm_epsilon
        if self.args.normalization == "RMSNorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
        bias = layer.find(*(name + "bias" for name in names))
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


_Names = dict[str, tuple[str, tuple[int, ...]]]  # a short name: the stored one, and where in it


class StoredParameters:
    """The parameters of a checkpoint; rounded to `dtype`, and then in fp32."""

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype

    def layer(self, layer: int | None) -> "StoredLayer":
        """Return the parameters of one layer, with None those outside of the layers."""
        names: _Names = {name: (name, ()) for name in self._checkpoint.tensors}
        return StoredLayer(
            self, names if layer is None else _within(names, "decoder.layers.", layer)
        )

    def read(self, name: str, index: tuple[int, ...]) -> Tensor:
        """Return a parameter, or what is at an index of a stacked one."""
        return self._checkpoint.read(name, index).to(self._dtype).float()


class StoredLayer:
    """Parameters, each read once, under whichever of their names they were stored."""

    def __init__(self, stored: StoredParameters, names: _Names) -> None:
        self._stored, self._names = stored, names
        self._loaded: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Return whether a parameter was stored under this name, whole or in two halves."""
        return name in self._names or name + "_w" in self._names

    def find(self, *names: str) -> Tensor:
        """Return the parameter under the first of its names that was stored."""
        for name in names:
            if name not in self._loaded and self.has(name):
                self._loaded[name] = self._read(name)
            if name in self._loaded:
                return self._loaded[name]
        raise ValueError(f"the checkpoint has no {' or '.join(names)}")

    def expert(self, number: int) -> "StoredLayer":
        """Return the parameters of one expert."""
        return StoredLayer(self._stored, _within(self._names, "mlp.experts.experts.", number))

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Return `x` times a matrix, plus its bias if it has one."""
        y = x @ self.find(name + "weight").T
        return y + self.find(name + "bias") if self.has(name + "bias") else y

    def _read(self, name: str) -> Tensor:
        """Join what the format fsdp_dtensor keeps apart: the gate's half and the other."""
        parts = (name,) if name in self._names else (name + "_w", name + "_v")
        return torch.cat([self._stored.read(*self._names[part]) for part in parts])


def _within(names: _Names, prefix: str, number: int) -> _Names:
    """Return the names inside one of many, which are stacked or stored one by one."""
    alone = f"{prefix}{number}."
    inside: _Names = {}
    for name, (stored, index) in names.items():
        if name.startswith(alone):
            inside[name.removeprefix(alone)] = stored, index
        elif name.startswith(prefix) and not name.removeprefix(prefix)[0].isdigit():
            inside[name.removeprefix(prefix)] = stored, (*index, number)
    return inside


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
