"""The kernels: `contract` says what a backend is, `dispatch` chooses one, `ops` calls it."""

from megatron_infoentropy.kernels.dispatch import select, unavailable

__all__ = ["select", "unavailable"]
