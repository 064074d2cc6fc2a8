"""A policy-gradient step with the log-probabilities and entropies of `megatron_infoentropy.rl`.

Run it: `python examples/rl_verl.py`, or at two tensor-parallel ranks
`torchrun --nproc-per-node 2 examples/rl_verl.py`. It needs torch alone and runs on a CPU. The
policy is a toy, a table of logits whose vocabulary is split over the ranks; the reward is 1 for an
even token. The lines that are ours are marked. In verl none of this is written: its Megatron
workers take ours by

    from megatron_infoentropy.rl import use_in
    use_in("verl")

in a module that the environment variable VERL_USE_EXTERNAL_MODULES names.
"""

import os

import torch
import torch.distributed as dist

from megatron_infoentropy.rl import logprob_and_entropy

STATES, VOCABULARY, SAMPLES, ENTROPY_COEFFICIENT, CLIP = 4, 64, 256, 0.01, 0.2


def whole(logits: torch.Tensor) -> torch.Tensor:
    """All shards side by side, to draw tokens from, as an inference engine would."""
    shards = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, logits)
    return torch.cat(shards, -1)


def main(steps: int = 20) -> list[float]:
    """Train; the mean reward of every step."""
    if "RANK" not in os.environ:  # without torchrun there is one rank
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same tokens on every tensor-parallel rank
    policy = torch.zeros(STATES, VOCABULARY // dist.get_world_size(), requires_grad=True)
    optimizer = torch.optim.Adam([policy], lr=0.1)
    rewards = []
    for _ in range(steps):
        state = torch.randint(STATES, (SAMPLES,))
        with torch.no_grad():
            logits = policy[state]  # [SAMPLES, VOCABULARY / ranks]
            token = whole(logits).softmax(-1).multinomial(1).squeeze(-1)
            old_logprob, _ = logprob_and_entropy(logits, token, group=group)  # ours
        reward = (token % 2 == 0).float()
        advantage = reward - reward.mean()
        for _ in range(2):
            # ours: both numbers by one collective, exact, the gradient over the logits
            logprob, entropy = logprob_and_entropy(
                policy[state], token, group=group, inplace_backward=True
            )
            ratio = (logprob - old_logprob).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            loss = -(gain + ENTROPY_COEFFICIENT * entropy).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(float(reward.mean()))
    if dist.get_rank() == 0:
        print(f"mean reward {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last")  # noqa: T201
    dist.destroy_process_group()
    return rewards


if __name__ == "__main__":
    main()
