"""Log-probability of the taken token and entropy, as reinforcement learning asks for them.

A door for users: the two functions, and `use_in`, which puts them in the place of what verl, slime,
SkyRL or TRL compute; in the signatures of these they are in `stacks`.
"""

from megatron_infoentropy.rl.logprob import linear_logprob_and_entropy, logprob_and_entropy
from megatron_infoentropy.rl.stacks import use_in

__all__ = ["linear_logprob_and_entropy", "logprob_and_entropy", "use_in"]
