"""Reading pickles without running them."""

import argparse
import collections
import enum
import os
import pickle
import signal
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import Harmful

from megatron_infoentropy.convert import distcp
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.unpickle import StandIn, load_object, unpickle


class Backend(enum.Enum):
    FLASH = 5


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, print])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_function_in_a_pickle_is_not_called(
    tmp_path: Path, function: Any, protocol: int, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made"
    argument = f"open({str(target)!r}, 'w')" if function in (eval, exec) else str(target)
    argument = f"touch {target}" if function is os.system else argument
    data = pickle.dumps({"args": [Harmful(function, argument)], "n": 1}, protocol=protocol)
    loaded = unpickle(data)
    assert loaded["n"] == 1
    assert isinstance(loaded["args"][0], StandIn)
    assert loaded["args"][0].arguments == (argument,)
    assert not target.exists()
    assert capsys.readouterr().out == ""


def test_the_same_pickle_does_run_in_pickle_itself(tmp_path: Path) -> None:
    data = pickle.dumps(Harmful(os.mkdir, str(tmp_path / "made")))
    pickle.loads(data)
    assert (tmp_path / "made").is_dir()


def test_torch_reads_only_weights_by_default(tmp_path: Path) -> None:
    """What Megatron relies on when it calls torch.load: from torch 2.6 on."""
    file = BytesIO()
    torch.save(Harmful(os.mkdir, str(tmp_path / "made")), file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(BytesIO(file.getvalue()))


def test_a_pickle_changes_no_class_of_the_process() -> None:
    # the class itself, then BUILD with (None, {"trust_remote_code": True})
    unpickle(b"\x80\x02cargparse\nNamespace\nN}X\x11\x00\x00\x00trust_remote_code\x88s\x86b.")
    assert not hasattr(argparse.Namespace, "trust_remote_code")


def test_training_arguments_are_read_with_stand_ins_for_other_classes() -> None:
    args = argparse.Namespace(
        num_layers=4,
        betas=(0.9, 0.95),
        attention_backend=Backend.FLASH,
        exit_signal=signal.SIGTERM,
        ratio=Fraction(1, 3),
        groups=collections.OrderedDict(a=[1]),
        defaults=collections.defaultdict(list, key=[2]),
    )
    loaded = unpickle(pickle.dumps(args))
    assert isinstance(loaded, argparse.Namespace)
    assert (loaded.num_layers, loaded.betas, loaded.groups["a"]) == (4, (0.9, 0.95), [1])
    assert repr(loaded.attention_backend) == "Backend(5)"
    assert isinstance(loaded.defaults, StandIn)
    assert isinstance(loaded.ratio, StandIn)


def test_an_allowed_class_is_real() -> None:
    key = (Fraction.__module__, "Fraction")
    assert unpickle(pickle.dumps(Fraction(1, 3)), {key: Fraction}) == Fraction(1, 3)


def test_a_file_of_torch_save_is_read_without_its_numbers() -> None:
    file = BytesIO()
    torch.save({"iteration": 3, "step": torch.ones(2)}, file)
    file.seek(0)
    loaded = load_object(file, "a file")
    assert loaded["iteration"] == 3
    assert isinstance(loaded["step"], StandIn)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2])[:-1],
        b"\x80\x05\x96" + b"\xff" * 5 + bytes(3) + b".",  # gigabytes, of a few bytes
        b"\x80\x02Nr\xff\xff\xff\x7f.",
    ],
)
def test_a_broken_pickle_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="expected a pickle"):
        unpickle(data)


def test_something_else_than_a_file_of_torch_save_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"torch\.save"):
        load_object(BytesIO(b"PK but not a zip file"), "a file")


def nested(levels: int, kind: type) -> Any:
    """2**levels numbers, written in a few bytes."""
    thing = kind([1])
    for _ in range(levels):
        thing = kind([thing, thing])
    return thing


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_few_bytes_that_are_a_tree_without_end_are_refused(kind: type) -> None:
    """Its hash and its text would take for ever."""
    assert unpickle(pickle.dumps(nested(3, kind))) == nested(3, kind)
    with pytest.raises(ConversionError, match="parts in a pickle"):
        unpickle(pickle.dumps(nested(60, kind)))


def test_a_key_without_end_is_refused_before_it_is_hashed() -> None:
    tree = pickle.dumps(nested(24, tuple), protocol=2)  # seconds, if it is hashed
    with pytest.raises(ConversionError, match="parts in a pickle"):
        unpickle(b"\x80\x02}" + tree[2:-1] + b"K\x01s.")  # {tree: 1}


def lists_filled_later(levels: int) -> bytes:
    """Lists that are put into others while they are empty: no one who follows the bytes knows."""
    made = b"".join(b"]q" + bytes([place]) + b"0" for place in range(levels))
    filled = b"".join(
        b"h" + bytes([place]) + 2 * (b"h" + bytes([place + 1]) + b"a") + b"0"
        for place in range(levels - 1)
    )
    return b"\x80\x02" + made + filled + b"h\x00."


def test_what_is_said_of_lists_without_end_ends(tmp_path: Path) -> None:
    value = unpickle(lists_filled_later(60))
    place = {"relative_path": "a", "offset": 0, "length": 1}
    for where in (place | {"relative_path": value}, place | {"offset": value}):
        with pytest.raises(ValueError, match=r"\[\[\.\.\.\]") as failure:
            distcp._place(where)
        assert len(str(failure.value)) < 1000


def test_a_stand_in_shows_itself_in_part() -> None:
    tree: Any = StandIn(5, "a" * 1000)
    for _ in range(60):
        tree = StandIn(tree, tree)
    assert repr(tree) == "StandIn(..., ...)"
    assert repr(StandIn(5, None, 2**20000)) == "StandIn(5, None, ...)"
    assert len(repr(StandIn("a" * 1000))) < 100
