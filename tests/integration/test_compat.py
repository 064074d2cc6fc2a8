"""What is said to which version of Megatron-Core; no Megatron is imported."""

import sys
import warnings
from types import SimpleNamespace

import pytest

from megatron_infoentropy.integration import compat


class GPTModel:
    def compute_language_model_loss(self, labels, logits):
        """As in the tested versions."""


class OtherModel:
    def compute_language_model_loss(self, hidden, labels, weight):
        """As it may become."""


@pytest.fixture
def installed(monkeypatch):
    """A function that makes a version the one that is imported."""

    def install(version):
        monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(__version__=version))

    return install


@pytest.mark.parametrize("version", ["0.17.1", "0.18.2+1a2b3c4", "0.19.2", "0.19.0rc3"])
def test_tested_versions_take_the_bound_loss_without_a_word(installed, version):
    installed(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_drop_in(GPTModel)


@pytest.mark.parametrize("version", ["0.16.1", "0.20.0", "1.0"])
def test_an_untested_version_with_the_interface_is_warned_of_and_served(installed, version):
    installed(version)
    says = rf"GPTModel of megatron-core {version} \(tested: 0.17, 0.18, 0.19\): its interface is as"
    with pytest.warns(UserWarning, match=says):
        compat.check_drop_in(GPTModel)


@pytest.mark.parametrize("version", ["0.19.2", "0.20.0"])
def test_another_interface_is_refused_in_any_version(installed, version):
    installed(version)
    with pytest.raises(ValueError, match=r"takes \(hidden, labels, weight\), expected \(labels"):
        compat.check_drop_in(OtherModel)


def test_the_trainer_refuses_other_versions_and_names_the_way_out(installed):
    installed("0.19.2")
    compat.check_trainer()
    for version in ("0.17.1", "0.18.2", "0.20.0"):
        installed(version)
        says = rf"drives megatron-core 0.19, got {version}, .* bind the loss to its model"
        with pytest.raises(ValueError, match=says):
            compat.check_trainer()


def gpt_arguments(**changes):
    names = ("hybrid_layer_pattern", "virtual_pipeline_model_parallel_size", "use_checkpoint_args")
    sizes = {"num_layers": 4, "encoder_num_layers": 4, "pipeline_model_parallel_size": 1}
    return SimpleNamespace(**dict.fromkeys(names) | sizes | changes)


@pytest.mark.parametrize(
    ("stages", "virtual", "pattern"),
    [(1, None, "*-*-*-*-"), (2, None, "*-*-|*-*-"), (2, 2, "*-|*-|*-|*-")],
)
def test_a_gpt_becomes_a_hybrid_on_the_same_stages(stages, virtual, pattern):
    layout = {"virtual_pipeline_model_parallel_size": virtual}
    args = gpt_arguments(recompute_num_layers=1, pipeline_model_parallel_size=stages, **layout)
    compat.make_hybrid(args)
    assert args.hybrid_layer_pattern == pattern
    assert (args.num_layers, args.encoder_num_layers, args.recompute_num_layers) == (8, 8, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4, "no_rope_freq": 2}, "cannot go with --num-experts, --no-rope-freq: it"),
        ({"decoder_first_pipeline_num_layers": 1}, "--decoder-first-pipeline-num-layers: it is"),
        ({"hybrid_layer_pattern": "*-"}, "of --num-layers, and got one: leave one of them out"),
    ],
)
def test_a_gpt_that_no_such_hybrid_equals_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        compat.make_hybrid(gpt_arguments(**changes))
    # A checkpoint of a hybrid has its pattern already.
    args = gpt_arguments(hybrid_layer_pattern="*-*-", use_checkpoint_args=True)
    compat.make_hybrid(args)
    assert (args.hybrid_layer_pattern, args.num_layers) == ("*-*-", 4)
