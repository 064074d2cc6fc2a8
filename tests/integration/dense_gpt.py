"""A Llama-style GPT or hybrid in dense float64 that takes Megatron's parameters, for the oracle.

Parameters are the ranks' own shards, as leaves; they are joined inside the graph, so that backward
leaves in each shard's .grad what that rank's main_grad must be. Names start with the number of the
rank's model chunk (interleaved pipelines have several), and say what there is: layers of attention,
an MLP or both, prediction heads, on whichever stage. Shares no code with the package.
"""

import re

import torch

Shards = dict[tuple[int, int], dict[str, torch.Tensor]]  # (pipeline rank, tensor rank) -> by name

HEADS, HEAD_DIM, EPSILON, ROTARY_BASE = 4, 8, 1e-5, 10000.0
ATTENTION, MLP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
PART = re.compile(rf"(.*)({ATTENTION}|{MLP})")
NORMS = ("decoder.final_layernorm.weight", "decoder.final_norm.weight")  # of a GPT, of a hybrid


class DenseModel:
    def __init__(self, shards: Shards, tied: bool = False) -> None:
        self.shards, self.tied = shards, tied
        self.stages = 1 + max(pp for pp, _ in shards)
        self.tensor_ranks = 1 + max(tp for _, tp in shards)
        self.chunks = 1 + max(
            int(name.partition(".")[0]) for shard in shards.values() for name in shard
        )

    def join(self, stage: int, name: str, dim: int) -> torch.Tensor:
        return torch.cat([self.shards[stage, tp][name] for tp in range(self.tensor_ranks)], dim)

    def replicated(self, stage: int, name: str) -> torch.Tensor:
        return self.shards[stage, 0][name]

    def find(self, *ends: str) -> tuple[int, str]:
        """(stage, name) of the first parameter whose name ends so."""
        names = ((stage, name) for stage in range(self.stages) for name in self.shards[stage, 0])
        return next((stage, name) for stage, name in names if name.endswith(ends))

    def layers(self, stage: int, start: str) -> list[str]:
        """What the names of every layer begin with, in order, of those that begin with `start`."""
        parts = (PART.fullmatch(name) for name in self.shards[stage, 0] if name.startswith(start))
        return list(dict.fromkeys(part[1] for part in parts if part))

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """[batch, sequence, padded vocabulary] of the model, then of each prediction head.

        tokens: [batch, sequence]; hidden: bool [batch or 1, 1, sequence, sequence], keys that a
        query must not see.
        """
        embedding = self.join(0, "0.embedding.word_embeddings.weight", 0)
        x = embedding[tokens]
        for chunk in range(self.chunks):  # they go round the stages
            for stage in range(self.stages):
                x = self.run_layers(x, hidden, stage, f"{chunk}.decoder.")
        x = norm(x, self.replicated(*self.find(*NORMS)))
        outputs = [x]
        for head in range(heads):
            tokens = shifted(tokens)
            x = self.head(x, embedding[tokens], hidden, head)
            outputs.append(x)
        table = embedding if self.tied else self.join(*self.find("output_layer.weight"), 0)
        return [x @ table.T for x in outputs]

    def head(
        self, x: torch.Tensor, token: torch.Tensor, hidden: torch.Tensor, number: int
    ) -> torch.Tensor:
        """From the states before a head to its own; token: embeddings of the tokens it is shown."""
        stage, name = self.find(f".mtp.layers.{number}.enorm.weight")
        prefix = name.removesuffix("enorm.weight")
        token, x = (
            norm(part, self.replicated(stage, f"{prefix}{name}.weight"))
            for part, name in ((token, "enorm"), (x, "hnorm"))
        )
        x = torch.cat([token, x], -1) @ self.join(stage, f"{prefix}eh_proj.weight", 0).T
        x = self.run_layers(x, hidden, stage, f"{prefix}mtp_model_layer.")
        return norm(x, self.replicated(stage, f"{prefix}final_layernorm.weight"))

    def run_layers(
        self, x: torch.Tensor, hidden: torch.Tensor, stage: int, start: str
    ) -> torch.Tensor:
        for prefix in self.layers(stage, start):
            if prefix + ATTENTION in self.shards[stage, 0]:
                x = x + self.attention(x, hidden, stage, prefix)
            if prefix + MLP in self.shards[stage, 0]:
                x = x + self.mlp(x, stage, prefix)
        return x

    def attention(
        self, x: torch.Tensor, hidden: torch.Tensor, stage: int, prefix: str
    ) -> torch.Tensor:
        b, s, _ = x.shape
        x = norm(x, self.replicated(stage, prefix + "input_layernorm.weight"))
        qkv = x @ self.join(stage, prefix + ATTENTION, 0).T
        groups = (qkv.shape[-1] // HEAD_DIM - HEADS) // 2  # each has a key and a value
        per_group = HEADS // groups
        qkv = qkv.view(b, s, groups, per_group + 2, HEAD_DIM)
        q = qkv[..., :per_group, :].reshape(b, s, HEADS, HEAD_DIM)
        k, v = (qkv[..., per_group + i, :].repeat_interleave(per_group, 2) for i in (0, 1))
        q, k = rotate(q), rotate(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", p, v).reshape(b, s, -1)
        return mixed @ self.join(stage, prefix + "self_attention.linear_proj.weight", 1).T

    def mlp(self, x: torch.Tensor, stage: int, prefix: str) -> torch.Tensor:
        x = norm(x, self.replicated(stage, prefix + "pre_mlp_layernorm.weight"))
        halves = [self.shards[stage, tp][prefix + MLP].chunk(2) for tp in range(self.tensor_ranks)]
        gate, up = (torch.cat([half[i] for half in halves]) for i in (0, 1))
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        return hidden @ self.join(stage, prefix + "mlp.linear_fc2.weight", 1).T


def shifted(values: torch.Tensor) -> torch.Tensor:
    """[batch, sequence]: each place has the value of the next, the last one 0."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions, halves paired."""
    s, half = x.shape[1], HEAD_DIM // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(s, dtype=torch.float64), frequency)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
