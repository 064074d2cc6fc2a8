"""The configuration refuses what no objective could use, and says what to do."""

import dataclasses
import math

import pytest

from megatron_infoentropy import InfoEntropyConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "entropy"}, "objective must be one of 'infoentropy', 'focal'"),
        ({"normalization": "mean"}, "normalization must be one of 'paper', 'global', 'none'"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"collective": "ring"}, "collective must be one of"),
        ({"gamma": math.nan}, "gamma must be a finite number"),
        ({"gamma": "1"}, "gamma must be a finite number, got '1'"),
        ({"sigma": math.inf}, "sigma must be a finite number"),
        ({"sigma": -0.1}, "sigma must be at least 0"),
        ({"sigma": 0.0, "gamma": -1.0}, "infinite weight; use gamma >= 0 or sigma > 0"),
        ({"objective": "focal", "gamma": -1.0}, "'focal' needs gamma >= 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InfoEntropyConfig(**settings)


def test_the_configuration_is_frozen_and_the_published_setting_is_the_default():
    config = InfoEntropyConfig()
    assert (config.objective, config.gamma, config.sigma) == ("infoentropy", 1.0, 1.0)
    assert (config.normalization, config.detach_weight) == ("paper", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 2.0


def test_every_setting_explains_itself():
    for field in dataclasses.fields(InfoEntropyConfig):
        assert len(field.metadata["help"]) > 20, field.name
