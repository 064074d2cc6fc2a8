"""The configuration refuses what no objective could use, and says what to do."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_infoentropy import InfoEntropyConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "entropy"}, "objective must be one of 'infoentropy', 'focal'"),
        (
            {"normalization": "mean"},
            "normalization must be one of 'auto', 'paper', 'global', 'none'",
        ),
        ({"quantile": 1.0}, r"quantile must be at least 0 and below 1, got 1.0"),
        ({"objective": "eslm", "detach_weight": False}, "'eslm' gives weights of 0 and 1"),
        ({"objective": "entrodrop", "gamma": 1.5}, r"'entrodrop' needs gamma in \[0, 1\], got 1.5"),
        ({"objective": "dft", "gamma": -1.0}, "predicted as nearly impossible would be infinite"),
        ({"objective": "eaft", "gamma": -1.0}, "predicted as certain would be infinite"),
        ({"backend": "numpy"}, "backend must be one of"),
        ({"collective": "ring"}, "collective must be one of"),
        ({"gamma": math.nan}, "gamma must be a finite number"),
        ({"gamma": "1"}, "gamma must be a finite number, got '1'"),
        ({"sigma": math.inf}, "sigma must be a finite number"),
        ({"sigma": -0.1}, "sigma must be at least 0"),
        ({"sigma": 0.0, "gamma": -1.0}, "infinite weight; use gamma >= 0 or sigma > 0"),
        ({"objective": "focal", "gamma": -1.0}, "'focal' needs gamma >= 0"),
        (
            {"objective": "focal", "gamma_schedule": "linear", "gamma_end": -1.0},
            "'focal' needs gamma_end >= 0",
        ),
        ({"gamma_schedule": "linear"}, "needs gamma_samples of at least 1, got 0"),
        (
            {"objective": "eslm", "gamma_schedule": "linear", "gamma_samples": 9},
            "'linear' has no effect on objective='eslm', whose weight has no gamma",
        ),
        (
            {"objective": "custom", "weighting": "a:b", "gamma_schedule": "linear"},
            "'linear' has no effect on objective='custom', whose weight has no gamma",
        ),
        ({"gamma_samples": 10}, "gamma_samples=10 has no effect on a constant gamma"),
        ({"gamma_end": 0.5}, "gamma_end=0.5 has no effect on a constant gamma; set gamma_schedule"),
        ({"gamma_samples": 1.5}, "gamma_samples must be an integer"),
        ({"blend": 1.5}, r"blend must be in \[0, 1\]"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0; 0 switches it off"),
        ({"softcap": -30.0}, "softcap must be at least 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"gamma": 20.0}, r"gamma=20 with sigma=1 .* 2\^75 .*bring gamma nearer to 0"),
        ({"gamma": -20.0}, r"2\^-75 \(without an idea\)"),
        ({"gamma": -5.0, "sigma": 1e-4}, r"2\^66 \(certain tokens\).* or sigma to 1"),
        ({"sigma": 1e30}, "more than fp32 can sum and invert"),
        (
            {"gamma_schedule": "linear", "gamma_end": 20.0, "gamma_samples": 9},
            "gamma_end=20 with sigma=1",
        ),
        ({"ignore_target": -100}, "ignore_target must be a token's id, or -1 for none, got -100"),
        ({"gamma": np.bool_(True)}, "gamma must be a finite number"),
        ({"gamma_samples": np.float32(3)}, "gamma_samples must be an integer"),
        ({"objective": "custom"}, "belong together"),
        ({"weighting": "my.module:weight"}, "belong together"),
        ({"objective": "custom", "weighting": "my.module"}, "package.module:function, got"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InfoEntropyConfig(**settings)


def test_numbers_of_other_libraries_are_taken_for_the_numbers_they_are():
    config = InfoEntropyConfig(
        gamma=np.float32(0.5), sigma=np.int64(1), chunk_tokens=np.int64(64), objective="focal"
    )
    assert config == InfoEntropyConfig(gamma=0.5, sigma=1.0, chunk_tokens=64, objective="focal")
    assert [type(x) for x in (config.gamma, config.sigma, config.chunk_tokens)] == [
        float,
        float,
        int,
    ]


@pytest.mark.parametrize(("gamma", "sigma"), [(12.0, 1.0), (-12.0, 1.0), (9.0, 0.0), (2.0, 1e-9)])
def test_gammas_that_fp32_can_hold_are_accepted(gamma, sigma):
    InfoEntropyConfig(gamma=gamma, sigma=sigma)


def test_the_configuration_is_frozen_and_the_published_setting_is_the_default():
    config = InfoEntropyConfig()
    assert (config.objective, config.gamma, config.sigma) == ("infoentropy", 1.0, 1.0)
    assert (config.normalization, config.detach_weight) == ("paper", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 2.0


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("linear", {0: 0.0, 250: 0.5, 500: 1.0, 1000: 2.0, 5000: 2.0}),
        ("cosine", {0: 0.0, 250: 1 - math.sqrt(0.5), 500: 1.0, 1000: 2.0, 5000: 2.0}),
    ],
)
def test_gamma_moves_from_its_start_to_its_end_over_the_samples(schedule, values):
    config = InfoEntropyConfig(
        gamma=0.0, gamma_schedule=schedule, gamma_end=2.0, gamma_samples=1000
    )
    for samples, gamma in values.items():
        now = config.at(samples)
        assert now.gamma == pytest.approx(gamma, abs=1e-12)
        assert now.at(123) is now


def test_a_constant_gamma_stays():
    config = InfoEntropyConfig(gamma=0.7)
    assert config.at(10**9) is config


def test_an_objective_is_normalized_as_it_was_published_unless_told_otherwise():
    chosen = {
        objective: InfoEntropyConfig(objective=objective).normalization
        for objective in ("focal", "lin_focal", "eaft", "dft", "eslm", "entrodrop")
    }
    assert {name for name, how in chosen.items() if how == "none"} == {"lin_focal", "eaft", "dft"}
    assert set(chosen.values()) == {"none", "paper"}
    assert InfoEntropyConfig(objective="dft", normalization="global").normalization == "global"
    assert not InfoEntropyConfig(objective="lin_focal").detach_weight


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"objective": "eslm", "gamma": 3.0}, {"objective": "eslm"}),
        ({"objective": "eslm", "quantile": 0.0}, {"objective": "cross_entropy"}),
        ({"objective": "entrodrop", "gamma": 0.0}, {"objective": "cross_entropy"}),
        ({"objective": "dft", "quantile": 0.5, "sigma": 2.0}, {"objective": "dft"}),
    ],
    ids=str,
)
def test_what_has_no_effect_makes_no_other_objective(settings, same):
    config, other = InfoEntropyConfig(**settings), InfoEntropyConfig(**same)
    assert config.effective() == other.effective()
    assert config.is_weighted == (same["objective"] != "cross_entropy")
