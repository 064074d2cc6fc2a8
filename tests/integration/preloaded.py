"""Imported once by the fork server: ranks forked from it start with Megatron ready to use.

What Megatron does anew in every process, and no test asks about, is done once or made small.
"""

import gc
import sys
from collections import defaultdict

from megatron_infoentropy.runtime import cpu

gc.disable()
cpu.install()

# Only after the redirections.
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402, F401
import torch.distributed.launcher.api  # noqa: E402, F401
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from megatron.training.log_handler import CustomHandler  # noqa: E402

from megatron_infoentropy.integration import arguments, batch, observe, step  # noqa: E402, F401
from megatron_infoentropy.launch import parsed  # noqa: E402, F401

# Documents of --mock-data: the index of its own 100,000 takes longer than a training.
MockGPTLowLevelDataset.size = 500

# The help texts of flags, parsed from Megatron's sources at every start.
ArgumentGroupFactory._get_field_docstrings = lambda self, owner: defaultdict(str)

# Into the output of the process that logs, which is another one than this server's.
CustomHandler.stream = property(lambda self: sys.stdout, lambda self, stream: None)

gc.enable()
gc.freeze()  # no rank looks through what is imported
