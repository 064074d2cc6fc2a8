"""Megatron's own trainer on a machine without a GPU, unchanged and through gloo.

Megatron asks CUDA for its device, its streams and its random numbers even where nothing it then
does needs a GPU. Each of these questions has an honest answer on a CPU: the device is the CPU, a
stream orders nothing because every call finishes before it returns, and the random state is the
one PyTorch keeps for the CPU. `install` gives these answers, in two ways:

1. every symbol in `_REDIRECTIONS` is replaced, for the reason written beside it;
2. `_CudaMeansCpu` watches calls on tensors: `device="cuda"`, `.cuda()`, `.to("cuda")`, `.type()`.

Where there is a GPU nothing is touched. `uninstall` undoes all of it.

Not possible this way: sequence parallelism with the local layer specification (its norm refuses
it), context parallelism, FP8, CUDA graphs; they need Transformer Engine or Apex.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from megatron_infoentropy.runtime.device import use_huge_pages

_log = logging.getLogger(__name__)

_CPU = torch.device("cpu")

CPU_FLAGS: tuple[str, ...] = (
    "--distributed-backend=gloo",
    "--transformer-impl=local",  # the default, Transformer Engine, needs a GPU
    "--no-persist-layer-norm",  # PyTorch's norms refuse the option
    "--no-rope-fusion",  # a kernel of Transformer Engine
    "--no-masked-softmax-fusion",  # a CUDA kernel, chosen for bf16 and fp16
    "--no-gradient-accumulation-fusion",  # a kernel of Apex
    "--use-cpu-initialization",  # the same weights under every tensor-parallel size
    "--num-workers=0",  # the processor that would prefetch is the one that trains
)
"""Flags of Megatron's trainer for a CPU; without the first six it fails."""


class _Stream:
    """Orders nothing: on a CPU a call has finished when it returns."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: object, **__: object) -> None:
        return None

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_stream(self, *_: object) -> None:
        return None

    wait_event = record_event = synchronize = wait_stream


class _CudaMeansCpu(TorchFunctionMode):
    """Tensor factories and methods act as if the CPU were the CUDA device.

    `.is_cuda` and `.device` keep telling the truth, so code that picks a kernel by them is right.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Optimizers and gradient clipping sort parameters by names like torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(argument) for argument in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    """Map a CUDA device, or the name of one, to the CPU; leave everything else alone."""
    if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
        return _CPU
    return device


def _returns(value: Any) -> Callable[..., Any]:
    """Return a new function: torch._dynamo refuses one object under several of torch's names."""

    def constant(*_: object, **__: object) -> Any:
        return value

    return constant


def _rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
    torch.default_generator.set_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


_STREAM = _Stream()
# Generation 10 is the first of which Megatron makes no demand (CUDA_DEVICE_MAX_CONNECTIONS=1).
_PROPERTIES = SimpleNamespace(name="cpu", major=10, minor=0, multi_processor_count=1)


class _Redirection(NamedTuple):
    symbol: str
    replacement: Any
    reason: str


_NO_ORDER = "calls have finished when they return, so a stream orders nothing"
_RANDOM = "random numbers on a CPU come from PyTorch's default generator"

_REDIRECTIONS = tuple(
    _Redirection(*row)
    for row in (
        ("torch.cuda.is_available", _returns(True), "Megatron's initialisation asserts it"),
        ("torch.cuda.device_count", _returns(1), "with 0, no model-parallel group is made"),
        ("torch.cuda.current_device", _returns(_CPU), "it is where new tensors are made"),
        ("torch.cuda.set_device", _returns(None), "every rank has the same device"),
        ("torch.cuda.get_device_properties", _returns(_PROPERTIES), "arguments are checked by it"),
        ("torch.cuda.synchronize", _returns(None), "nothing is ever in flight"),
        ("torch.cuda.is_current_stream_capturing", _returns(False), "there are no CUDA graphs"),
        ("torch.cuda.current_stream", _returns(_STREAM), _NO_ORDER),
        ("torch.cuda.Stream", _Stream, _NO_ORDER + "; a class: others annotate with it"),
        ("torch.cuda.stream", _returns(_STREAM), _NO_ORDER),
        ("torch.cuda.manual_seed", _manual_seed, _RANDOM),
        ("torch.cuda.get_rng_state", _rng_state, _RANDOM),
        ("torch.cuda.set_rng_state", _set_rng_state, _RANDOM),
        ("torch.cuda.random.get_rng_state", _rng_state, _RANDOM),
        ("megatron.core.tensor_parallel.random._set_cuda_rng_state", _set_rng_state, _RANDOM),
        (
            "torch.accelerator.is_available",
            _returns(False),
            "it follows torch.cuda in a CUDA build, and data loaders would pin memory",
        ),
        (
            "megatron.core.datasets.utils.compile_helpers",
            _returns(None),
            "it runs make and ends the process if that fails; the wheel ships the compiled helper "
            "and no Makefile",
        ),
    )
)

_installed: ExitStack | None = None


def install(*, hide_gpu: bool = False) -> None:
    """Let Megatron run on the CPU if this machine has no GPU; otherwise change nothing.

    Call it once per process, before megatron is imported. A second call does nothing. With
    `hide_gpu` Megatron runs on the CPU also where there is a GPU, and no log says so.

    Raises:
        AttributeError: PyTorch or Megatron lack a symbol of the table (another version?).
    """
    global _installed
    if _installed is not None or (torch.cuda.is_available() and not hide_gpu):
        return
    if not hide_gpu and os.environ.get("RANK", "0") == "0":
        _log.warning("no GPU found: Megatron runs on the CPU (see infoentropy doctor)")
    use_huge_pages()
    # torch._dynamo registers torch.cuda's functions when it is imported: let it see the originals.
    import_module("torch._dynamo")
    with ExitStack() as stack:
        stack.enter_context(_without_compiler())
        for redirection in _REDIRECTIONS:
            stack.enter_context(_redirected(redirection))
        stack.enter_context(_CudaMeansCpu())
        stack.enter_context(_without_false_alarm())
        _installed = stack.pop_all()


def uninstall() -> None:
    """Undo `install`; does nothing where nothing was installed."""
    global _installed
    if _installed is not None:
        _installed.close()
        _installed = None


def is_installed() -> bool:
    """Return whether the redirections are active in this process."""
    return _installed is not None


def redirections() -> list[tuple[str, str]]:
    """Return (symbol, reason) for everything `install` replaces, active or not."""
    return [(redirection.symbol, redirection.reason) for redirection in _REDIRECTIONS]


@contextmanager
def _redirected(redirection: _Redirection) -> Iterator[None]:
    path, _, name = redirection.symbol.rpartition(".")
    owner = resolve_name(path)
    original = getattr(owner, name)
    setattr(owner, name, redirection.replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Turn torch.compile off: it would generate code for the GPU that is_available() promises."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read where Megatron decorates its functions
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Drop a warning at every dropout: drawing for "the GPU" changed the CPU's random state.

    Here they are one and the same; Megatron puts the state back behind every dropout.
    """

    def is_true(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("CPU RNG state changed")

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)
