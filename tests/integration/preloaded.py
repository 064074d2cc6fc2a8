"""Imported once by the fork server: ranks forked from it start with Megatron ready to use."""

from megatron_infoentropy.runtime import cpu

cpu.install()

import megatron.training.training  # noqa: E402, F401  only after the redirections
import transformers  # noqa: E402, F401
