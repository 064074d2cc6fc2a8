"""Megatron's own model of a checkpoint, and its forward pass on a CPU: what a proof trusts.

The model is built as our trainer builds it, of Megatron's local layers, in fp32 on one rank, from
the training arguments that the conversion reads. What those arguments ask for and the model has
not, a comparison with arguments would never show. One layer's parameters are in memory at a time.
"""

import argparse
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_infoentropy.convert.architecture import NEUTRAL, NEUTRAL_FOR_EXPERTS, architecture_of
from megatron_infoentropy.convert.layers import Place, StoredModel, read_when_run
from megatron_infoentropy.convert.reference_model import has_tanh_gelu

_STORED_NAMES = {  # of the local layers' norms, as Transformer Engine has them and files do
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def why_not_megatron() -> str:
    """Say why Megatron's own model cannot be run in this process; "" if it can."""
    with _quietly_on_a_cpu():
        try:
            from megatron.training.argument_utils import gpt_config_from_args  # noqa: F401
        except ImportError as error:
            return f"Megatron's model builder cannot be imported ({error})"
    return "this process is a rank of a job" if dist.is_initialized() else ""


class MegatronModel(StoredModel):
    """The forward pass of Megatron's model of a checkpoint."""

    @torch.no_grad()
    def logits(self, tokens: Tensor, advance: Callable[[int], None]) -> Tensor:
        """Return logits [length, padded vocabulary] of token ids [length]."""
        with one_cpu_rank():
            logits: Tensor = self._build(advance)(tokens[None], *one_rank_inputs(len(tokens)))[0]
        return logits

    def _build(self, advance: Callable[[int], None]) -> Any:
        """Return a model that reads each layer, or expert, when it is run; then forgets it."""
        model = build_model(self.args)
        outside = self._state(model, (), without="decoder.layers.")
        model.load_state_dict(outside, strict=False, assign=True)
        for number, layer in enumerate(model.decoder.layers):
            read_when_run(layer, partial(self._state, layer, (number,), without="mlp.experts."))
            layer.register_forward_hook(lambda *_: advance(1))
            if hasattr(layer.mlp, "experts"):
                layer.mlp.router.register_forward_hook(partial(_record, self.routes[number]))
                for expert, module in enumerate(layer.mlp.experts.local_experts):
                    read_when_run(module, partial(self._state, module, (number, expert)))
        return model.eval()

    def _state(self, module: nn.Module, place: Place, without: str = " ") -> dict[str, Tensor]:
        """Return {name in the module: parameter at a place}, without those of one submodule."""
        state = {}
        norms_are_shifted = self.args.layernorm_zero_centered_gamma
        for name, _ in module.named_parameters():
            if not name.startswith(without):
                alias = name
                for local, other in _STORED_NAMES.items():
                    alias = alias.replace(local, other)
                tensor = self.read(place, alias, name)
                is_shifted = norms_are_shifted and name.endswith("norm.weight")
                state[name] = tensor + 1 if is_shifted else tensor
        return state


def _record(routes: list[Tensor], router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
    chosen = output[1]  # [length, experts]
    routes.append(chosen.nonzero()[:, 1].view(len(chosen), -1))


def build_model(saved: Namespace) -> Any:
    """Return the model that a checkpoint's arguments describe, its parameters without storage.

    It is a GPTModel, or a HybridModel where they have a pattern of its layers.

    Of these arguments those that the conversion reads are used, of others Megatron's defaults.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_infoentropy.integration.compat import model_config_from_args

    config = model_config_from_args(_model_arguments(saved))
    config.transformer.perform_initialization = False
    with torch.device("meta"):
        return config.get_builder_cls()(config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True
        )


def one_rank_inputs(length: int) -> tuple[Tensor, Tensor]:
    """Return positions and the mask of causal attention, as GPTModel takes them."""
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return torch.arange(length)[None], mask


def arguments_read(saved: Namespace) -> set[str]:
    """Return the names of those training arguments that the conversion reads."""
    recorder = _Recorder(**vars(saved))
    architecture_of(recorder, None)
    return recorder.names


@cache
def _default_arguments() -> Namespace:
    """Return Megatron's defaults on a CPU; its parser takes long to be made."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_infoentropy.runtime.cpu import CPU_FLAGS

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args: Namespace = parser.parse_args(list(CPU_FLAGS))
    return args


def _model_arguments(saved: Namespace) -> Namespace:
    """Return Megatron's defaults with what describes the model, for one CPU rank and fp32."""
    args = Namespace(**vars(_default_arguments()))
    neutral = NEUTRAL.keys() | NEUTRAL_FOR_EXPERTS.keys()
    for name in (arguments_read(saved) & vars(saved).keys()) - neutral:
        setattr(args, name, getattr(saved, name))
    if args.hybrid_layer_pattern is not None:  # of several stages one rank would build the first
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("|", "")
    args.params_dtype = torch.float32
    args.hidden_dropout = args.attention_dropout = 0.0
    # Local layers have neither: the other fused gelu, and norms that were stored minus 1.
    args.bias_gelu_fusion = not args.swiglu and has_tanh_gelu(saved)
    args.use_te_activation_func = args.layernorm_zero_centered_gamma = False
    args.transformer_impl = "local"
    return args


class _Recorder(Namespace):
    """Arguments that remember which of them were asked for."""

    def __init__(self, **values: Any) -> None:
        self.names: set[str] = set()
        super().__init__(**values)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "names":
            self.names.add(name)
        return super().__getattribute__(name)


@contextmanager
def one_cpu_rank() -> Iterator[None]:
    """Let Megatron believe in a job of one rank on a CPU; leave nothing of it behind."""
    with _quietly_on_a_cpu(), ExitStack() as stack:
        from megatron.core import parallel_state, tensor_parallel

        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        # Functions that Megatron compiles cannot be where its calls of CUDA go to the CPU, and were
        # decorated already if this process had imported it before.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _quietly_on_a_cpu() -> Iterator[None]:
    """Let Megatron be imported and run where no GPU is used, without its warnings of that."""
    from megatron_infoentropy.runtime import cpu

    was_installed = cpu.is_installed()
    with ExitStack() as stack:
        cpu.install(hide_gpu=True)
        if not was_installed:
            stack.callback(cpu.uninstall)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # that GPTModel is deprecated
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield
