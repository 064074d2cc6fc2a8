"""Each stack's way from logits to log-probability and entropy, by its functions or by ours."""

from types import SimpleNamespace

import peers
import torch
import torch.distributed as dist

from megatron_infoentropy.rl import stacks

CALLS = ("verl apart", "verl engine", "slime", "slime kept", "skyrl", "trl")


def stack_of(call):
    return call.partition(" ")[0]


def our_functions():
    engine = type("Engine", (), {"process": stacks.verl_lm_head_logits_processor})()
    return {
        "entropy": stacks.verl_vocab_parallel_entropy,
        "log_probs": stacks.verl_vocab_parallel_log_probs_from_logits,
        "process": engine.process,
        "slime": stacks.slime_calculate_log_probs_and_entropy,
        "skyrl": stacks.skyrl_distributed_logprob,
        "skyrl entropy": stacks.verl_vocab_parallel_entropy,
        "trl": stacks.trl_selective_log_softmax_and_entropy,
    }


def their_functions(stack):
    module = peers.published(stack)
    if stack == "verl":
        engine = peers.verls_engine().MegatronEngineWithLMHead()
        engine.engine_config = SimpleNamespace(entropy_from_logits_with_chunking=False)
        return {
            "entropy": module.vocab_parallel_entropy,
            "log_probs": module.vocab_parallel_log_probs_from_logits,
            "process": engine._lm_head_logits_processor,
        }
    if stack == "skyrl":
        apply = module.DistributedLogprob.apply
        return {"skyrl": apply, "skyrl entropy": module.vocab_parallel_entropy}
    if stack == "slime":
        return {"slime": module.calculate_log_probs_and_entropy}
    return {"trl": module.selective_log_softmax_and_entropy}


def results(call, functions, logits, target, keep=None):
    """(log-probability, entropy) [b, s] of this rank's shard, as the stack itself calls them."""
    width, group = logits.shape[-1], dist.group.WORLD
    if call == "verl apart":
        return functions["log_probs"](logits.clone(), target), functions["entropy"](logits)
    if call == "verl engine":
        found = functions["process"](
            logits,
            target,
            torch.ones(target.shape),
            calculate_sum_pi_squared=False,
            calculate_entropy=True,
            distillation_use_topk=False,
            distillation_only=False,
            logits_processor_func=None,
            batch=None,
            data_format="thd",
        )
        return found["log_probs"], found["entropy"]
    if stack_of(call) == "slime":
        keep = keep.flatten(0, 1) if call == "slime kept" else None
        logprob, entropy = functions["slime"](
            logits.flatten(0, 1), target.flatten(), group, True, log_prob_keep_mask=keep
        )
        return logprob.view(target.shape), entropy.view(target.shape)
    if call == "skyrl":
        start = group.rank() * width
        logprob = functions["skyrl"](logits, target, start, start + width, group, False)
        return logprob, functions["skyrl entropy"](logits)
    return functions["trl"](logits, target)
