"""The short form of `make fuzz`: seeds, what was found before, and a thousand mutants."""

import random

import pytest
from readers import READERS, execute, mutated, seeds_of

EXECUTIONS = 1000


@pytest.mark.parametrize("name", READERS)
def test_a_reader_ends_in_its_named_errors(name, tmp_path):
    seeds = seeds_of(name)
    for data in seeds:
        execute(name, data, tmp_path)
    rng = random.Random(1)
    for _ in range(EXECUTIONS):
        data = mutated(rng, seeds)
        try:
            execute(name, data, tmp_path)
        except BaseException as error:
            raise AssertionError(f"{data!r}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("name", sorted(set(READERS) - {"text", "metadata"}))
def test_the_first_seed_is_read_to_its_end(name, tmp_path):
    """A fuzzer whose inputs are all refused at the door sees nothing."""
    READERS[name].harness(seeds_of(name)[0], tmp_path)
