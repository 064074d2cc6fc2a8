"""What a machine offers to training, and whether the ranks of a job can work together."""

from megatron_infoentropy.doctor.machine import MachineFact, examine, find_apex

__all__ = ["MachineFact", "examine", "find_apex"]
