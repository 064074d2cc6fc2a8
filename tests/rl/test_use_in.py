"""`use_in` takes the places of a stack's functions, or says why it does not."""

import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import peers
import pytest
import rl_numbers as numbers
import torch
import torch.distributed as dist
from close import assert_within
from launch import run_forked

from megatron_infoentropy.rl import stacks, use_in

SLIME = "slime.utils.ppo_utils"


def calculate_log_probs_and_entropy(
    logits,
    tokens,
    tp_group,
    with_entropy=False,
    chunk_size=-1,
    log_prob_keep_mask=None,
    with_entropy_grad=True,
):
    """Slime's signature, so that these tests run without slime."""
    return "theirs"


@pytest.fixture
def slime(monkeypatch):
    """The installed slime: one module with the function, one that imported it by name."""
    for name in ("slime", "slime.utils", SLIME, "slime.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    function = calculate_log_probs_and_entropy
    monkeypatch.setattr(sys.modules[SLIME], function.__name__, function, raising=False)
    monkeypatch.setattr(sys.modules["slime.loss"], "imported", function, raising=False)
    monkeypatch.setattr(stacks, "version", lambda stack: "0.3.1")
    monkeypatch.setattr(stacks, "_stacks_own", {})
    return sys.modules["slime.loss"]


def test_modules_that_imported_a_function_before_have_ours_too(slime):
    assert use_in("slime") == [f"{SLIME}:calculate_log_probs_and_entropy"]
    for function in (slime.imported, sys.modules[SLIME].calculate_log_probs_and_entropy):
        assert function is stacks.slime_calculate_log_probs_and_entropy


def test_padding_is_left_out_where_the_vocabulary_is_told(slime):
    logits = numbers.logits_of("plain", torch.float32).flatten(0, 1)
    use_in("slime")
    use_in("slime", vocab_size=numbers.VOCAB)  # the last one counts
    logprob, _ = slime.imported(logits, numbers.target_of().flatten(), None)
    expected = numbers.truth_of(logits.view(numbers.BATCH, -1, numbers.PADDED), vocab_size=500)
    assert_within(logprob.flatten(), expected.logprob.flatten(), rtol=1e-6, atol=1e-6)


def test_another_version_is_refused(slime, monkeypatch):
    for installed in ("0.2.9", "0.30.1", "1.3"):
        monkeypatch.setattr(stacks, "version", lambda stack, installed=installed: installed)
        with pytest.raises(RuntimeError, match=f"expected slime 0.3, .* got {installed}"):
            use_in("slime")
    assert slime.imported("", "", None) == "theirs"


def test_another_signature_is_refused(slime, monkeypatch):
    for other in (
        lambda logits, tokens, tp_group, with_entropy=False: "theirs",
        lambda logits, tokens, tp_group, with_entropy=True, chunk_size=-1, log_prob_keep_mask=None,
        with_entropy_grad=True: "theirs",
    ):  # fmt: skip
        monkeypatch.setattr(sys.modules[SLIME], "calculate_log_probs_and_entropy", other)
        with pytest.raises(RuntimeError, match=r"to take \(logits, tokens, tp_group"):
            use_in("slime")
    assert slime.imported("", "", None) == "theirs"


def test_a_function_that_is_gone_is_refused(slime, monkeypatch):
    monkeypatch.delattr(sys.modules[SLIME], "calculate_log_probs_and_entropy")
    with pytest.raises(RuntimeError, match=r"slime 0.3.1 has no slime.utils.ppo_utils:calculate"):
        use_in("slime")


def test_a_stack_that_is_not_installed_or_not_known_is_refused(monkeypatch):
    def missing(stack):
        raise PackageNotFoundError

    monkeypatch.setattr(stacks, "version", missing)
    with pytest.raises(RuntimeError, match="verl is not installed in this environment"):
        use_in("verl")
    with pytest.raises(ValueError, match="expected a stack among verl, slime, skyrl, trl"):
        use_in("openrlhf")
    with pytest.raises(ValueError, match="vocab_size is not for it"):
        use_in("trl", vocab_size=5)


def test_verls_own_processor_is_asked_for_where_it_was_not_replaced(monkeypatch):
    monkeypatch.setattr(stacks, "_stacks_own", {})
    with pytest.raises(RuntimeError, match=r'call use_in\("verl"\) first'):
        process(stacks.verl_lm_head_logits_processor, None, distillation_only=True)


def process(function, logits, **asked):
    """Call verl's method, as its engine does."""
    engine = SimpleNamespace(engine_config=None)
    engine.engine_config = SimpleNamespace(entropy_from_logits_with_chunking=False)
    names = ("calculate_sum_pi_squared", "calculate_entropy", "distillation_use_topk")
    options = dict.fromkeys((*names, "distillation_only"), False) | {"calculate_entropy": True}
    options |= {"logits_processor_func": None, "batch": None, "data_format": "thd"} | asked
    temperature = torch.full((numbers.BATCH, numbers.SEQUENCE), 0.5)
    temperature[0, 0] = 0  # padding
    return function(engine, logits, numbers.target_of(), temperature, **options)


def in_verl(world):
    """What verl's engine gives to each of ASKED on a rank, (before, after)."""
    from megatron.core import parallel_state

    module = peers.published("verl")
    engine = peers.verls_engine().MegatronEngineWithLMHead
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    try:
        with torch.compiler.set_stance("force_eager"):
            before = [process(engine._lm_head_logits_processor, shard(), **a) for a in ASKED]
            use_in("verl")
            after = [process(engine._lm_head_logits_processor, shard(), **a) for a in ASKED]
        assert module.vocab_parallel_entropy is stacks.verl_vocab_parallel_entropy
        return before, after
    finally:
        parallel_state.destroy_model_parallel()


ASKED = (
    {},
    {"calculate_entropy": False},
    {"calculate_sum_pi_squared": True},
    {"distillation_only": True},
)


def shard():
    whole = numbers.logits_of("plain", torch.float32)
    return whole.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


def test_verls_engine_gives_the_same_with_ours_in_place():
    peers.require("verl")
    for before, after in run_forked(in_verl, 2, 2):
        for theirs, ours in zip(before, after, strict=True):
            assert theirs.keys() == ours.keys()
            for name, value in theirs.items():
                assert_within(ours[name][0, 1:], value[0, 1:], rtol=1e-5, atol=1e-5)
                assert_within(ours[name][1], value[1], rtol=1e-5, atol=1e-5)


def in_skyrl(world):
    """(before, after) of SkyRL's function that shifts targets, on a rank."""
    module = peers.published("skyrl")
    logits, width = shard(), numbers.PADDED // world
    start = dist.get_rank() * width
    places = (start, start + width, dist.group.WORLD)
    calls = [{}, {"chunk_size": 3}, {"inference_only": True}]
    function = module.from_parallel_logits_to_logprobs
    before = [function(logits, numbers.target_of(), *places, **call) for call in calls]
    use_in("skyrl")
    after = [function(logits, numbers.target_of(), *places, **call) for call in calls]
    try:
        module.DistributedLogprob.apply(logits, numbers.target_of(), start + 1, *places[1:])
    except ValueError as error:
        return before, after, str(error)
    raise AssertionError("a shard that starts elsewhere was taken")


def test_skyrls_function_gives_the_same_with_ours_in_place():
    peers.require("skyrl")
    for rank, (before, after, said) in enumerate(run_forked(in_skyrl, 2, 2)):
        for theirs, ours in zip(before, after, strict=True):
            assert theirs.shape == (numbers.BATCH, numbers.SEQUENCE - 1)
            assert_within(ours, theirs, rtol=1e-5, atol=1e-5)
        assert f"this one starts at {rank * 256}" in said


def test_trls_functions_are_replaced_for_several_tokens_a_position_too(monkeypatch):
    peers.require("trl")
    module = peers.published("trl")
    logits = numbers.logits_of("shifted", torch.float32)
    index = torch.stack([numbers.target_of(), logits.argmax(-1), logits.argmin(-1)], -1)
    masked = {"row_mask": torch.tensor([[1, 0] * 4, [1] * 8])}
    keep = {
        name: getattr(module, name) for name in vars(module) if "entropy" in name or "log_s" in name
    }
    for name, function in keep.items():
        monkeypatch.setattr(module, name, function)  # is put back afterwards
    calls = [(index, {"temperature": 0.7}), (numbers.target_of(), masked)]
    theirs = [module.selective_log_softmax(logits.double(), i, **o) for i, o in calls]
    entropy = module.entropy_from_logits(logits.double())
    assert len(use_in("trl")) == 3
    assert module.entropy_from_logits is stacks.trl_entropy_from_logits
    for (i, options), expected in zip(calls, theirs, strict=True):
        found = module.selective_log_softmax(logits, i, **options)
        assert_within(found, expected, rtol=1e-6, atol=3e-5 if options != masked else 1e-6)
    assert_within(module.entropy_from_logits(logits), entropy, rtol=1e-6, atol=1e-6)
