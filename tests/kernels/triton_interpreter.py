"""Mends Triton's interpreter for the tests: it rounds to bf16 wrongly, and it is slow.

Only where TRITON_INTERPRET=1, and before the first kernel runs. Triton 3.6 to 3.9 need both. 3.6
also keeps NaN in the maximum that drops it on a GPU (and needs a numpy below 2.4).
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_infoentropy.kernels import triton_kernels


def mend() -> None:
    """Patches the interpreter of this process, and launches the kernels as suits it."""
    convert, patched = interpreter._convert_float, set[str]()

    def convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """To bf16 to the nearest, ties to even, as GPUs do; the interpreter cuts bits off."""
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.atleast_1d(data).view(np.float32)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy().reshape(data.shape)
        return convert(data, source, target, mode)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Patches the language once a module, not in every call of a device function."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    interpreter._convert_float = convert_rounding
    interpreter.InterpretedFunction.__call__ = call
    # Its time is that of the operations, whatever their size: the same tiles by fewer of them.
    triton_kernels.THREADS *= triton_kernels.LOADS
    triton_kernels.LOADS = 1
