"""A Llama-style GPT or hybrid in dense float64 that takes Megatron's parameters, for the oracle.

Parameters are the ranks' own shards, as leaves; they are joined inside the graph, so that backward
leaves in each shard's .grad what that rank's main_grad must be. Names start with the number of the
rank's model chunk (interleaved pipelines have several). Shares no code with the package.
"""

import torch

Shards = dict[tuple[int, int], dict[str, torch.Tensor]]  # (pipeline rank, tensor rank) -> by name

HEADS, HEAD_DIM, EPSILON, ROTARY_BASE = 4, 8, 1e-5, 10000.0


class DenseGPT:
    final_norm = "final_layernorm"

    def __init__(self, shards: Shards, layers: int, chunks: int = 1, tied: bool = False) -> None:
        self.shards = shards
        self.stages = 1 + max(pp for pp, _ in shards)
        self.tensor_ranks = 1 + max(tp for _, tp in shards)
        self.layers, self.chunks, self.tied = layers, chunks, tied

    def place(self, layer: int) -> tuple[int, str]:
        """(stage, prefix of the names) of a layer: chunks go round the stages."""
        per_chunk = self.layers // (self.stages * self.chunks)
        turn, local = divmod(layer, per_chunk)
        chunk, stage = divmod(turn, self.stages)
        return stage, f"{chunk}.decoder.layers.{local}."

    def join(self, stage: int, name: str, dim: int) -> torch.Tensor:
        return torch.cat([self.shards[stage, tp][name] for tp in range(self.tensor_ranks)], dim)

    def replicated(self, stage: int, name: str) -> torch.Tensor:
        return self.shards[stage, 0][name]

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, sequence] -> [batch, sequence, padded vocabulary].

        hidden: bool [batch or 1, 1, sequence, sequence], keys that a query must not see.
        """
        return self.every_logits(tokens, hidden, 0)[0]

    def every_logits(
        self, tokens: torch.Tensor, hidden: torch.Tensor | None, heads: int
    ) -> list[torch.Tensor]:
        """Those of the model, then those of each multi-token-prediction head."""
        s = tokens.shape[1]
        hidden = torch.ones(s, s, dtype=torch.bool).triu(1) if hidden is None else hidden
        embedding = self.join(0, "0.embedding.word_embeddings.weight", 0)
        x = embedding[tokens]
        for layer in range(self.layers):
            x = self.block(x, layer, hidden)
        last, chunk = self.stages - 1, self.chunks - 1
        x = norm(x, self.replicated(last, f"{chunk}.decoder.{self.final_norm}.weight"))
        outputs = [x]
        for head in range(heads):
            tokens = shifted(tokens)
            x = self.head(x, embedding[tokens], hidden, f"{chunk}.mtp.layers.{head}.")
            outputs.append(x)
        table = self.join(last, f"{chunk}.output_layer.weight", 0) if not self.tied else embedding
        return [x @ table.T for x in outputs]

    def head(
        self, x: torch.Tensor, token: torch.Tensor, hidden: torch.Tensor, prefix: str
    ) -> torch.Tensor:
        """From the states before a head to its own; token: embeddings of the tokens it is shown."""
        last = self.stages - 1
        token, x = (
            norm(part, self.replicated(last, f"{prefix}{name}.weight"))
            for part, name in ((token, "enorm"), (x, "hnorm"))
        )
        x = torch.cat([token, x], -1) @ self.join(last, f"{prefix}eh_proj.weight", 0).T
        x = self.layers_of_head(x, hidden, last, f"{prefix}mtp_model_layer.")
        return norm(x, self.replicated(last, f"{prefix}final_layernorm.weight"))

    def layers_of_head(
        self, x: torch.Tensor, hidden: torch.Tensor, stage: int, prefix: str
    ) -> torch.Tensor:
        x = x + self.attention(x, hidden, stage, prefix)
        return x + self.mlp(x, stage, prefix)

    def block(self, x: torch.Tensor, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        stage, prefix = self.place(layer)
        x = x + self.attention(x, hidden, stage, prefix)
        return x + self.mlp(x, stage, prefix)

    def attention(
        self, x: torch.Tensor, hidden: torch.Tensor, stage: int, prefix: str
    ) -> torch.Tensor:
        b, s, _ = x.shape
        x = norm(x, self.replicated(stage, prefix + "input_layernorm.weight"))
        qkv = x @ self.join(stage, prefix + "self_attention.linear_qkv.weight", 0).T
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
        name = prefix + "mlp.linear_fc1.weight"
        halves = [self.shards[stage, tp][name].chunk(2) for tp in range(self.tensor_ranks)]
        gate, up = (torch.cat([half[i] for half in halves]) for i in (0, 1))
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        return hidden @ self.join(stage, prefix + "mlp.linear_fc2.weight", 1).T


class DenseHybrid(DenseGPT):
    """Layers of one kind each: * is attention, - an MLP, | the start of another model chunk, / of a
    prediction head's layers."""

    final_norm = "final_norm"

    def __init__(self, shards: Shards, pattern: str, chunks: int, tied: bool) -> None:
        super().__init__(shards, 0, chunks, tied)
        pattern, _, self.head_pattern = pattern.partition("/")
        self.places = [
            (kind, turn % self.stages, f"{turn // self.stages}.decoder.layers.{local}.")
            for turn, segment in enumerate(pattern.split("|"))
            for local, kind in enumerate(segment)
        ]
        self.layers = len(self.places)

    def block(self, x: torch.Tensor, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.part(x, hidden, *self.places[layer])

    def layers_of_head(
        self, x: torch.Tensor, hidden: torch.Tensor, stage: int, prefix: str
    ) -> torch.Tensor:
        for number, kind in enumerate(self.head_pattern.partition("/")[0]):
            x = self.part(x, hidden, kind, stage, f"{prefix}layers.{number}.")
        return x

    def part(
        self, x: torch.Tensor, hidden: torch.Tensor, kind: str, stage: int, prefix: str
    ) -> torch.Tensor:
        if kind == "*":
            return x + self.attention(x, hidden, stage, prefix)
        return x + self.mlp(x, stage, prefix)


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
