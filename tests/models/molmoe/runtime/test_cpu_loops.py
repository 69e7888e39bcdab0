"""A compiled loop gives the same bits wherever its arrays lie in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from pacevlm.models.molmoe.runtime import cpu_loops

NUM_HEAPS = 300
# Another order of a sum shows in some numbers only.
NUM_SEEDS = 5
NUM_EXPERTS, TOP_K, WIDTH, EXPERT_DIM, HEADS, HEAD_DIM, TOKENS, CAPACITY = 16, 8, 96, 128, 4, 24, 5, 40


def floats(*shape: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


EPS = np.float32(1e-5)
NORM, MATRIX, ROWS = floats(WIDTH, seed=1), floats(3 * WIDTH, WIDTH, seed=2), floats(TOKENS, WIDTH, seed=3)
GATE, UP = floats(NUM_EXPERTS, WIDTH, seed=4), floats(NUM_EXPERTS, 2 * EXPERT_DIM, WIDTH, seed=5)
DOWN, ANGLES = floats(NUM_EXPERTS, WIDTH, EXPERT_DIM, seed=6), floats(TOKENS, HEAD_DIM, seed=7)
CACHE, LOGITS = floats(HEADS, CAPACITY, HEAD_DIM, seed=8), floats(TOKENS, NUM_EXPERTS, seed=9)
COUNTS = np.array([TOP_K, 1, 3, TOP_K, 2], np.int64)
PAIRS, ENDS = int(COUNTS.sum()), np.array([0, 3, 9, *[12] * 12, int(COUNTS.sum())], np.int32)
PAIR_TOKEN = np.random.default_rng(10).integers(0, TOKENS, PAIRS)
PAIR_WEIGHT, INNER = floats(PAIRS, seed=11), floats(PAIRS, EXPERT_DIM, seed=12)

# Every compiled loop with its arguments; all arrays are placed anew, and all are compared afterwards.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "_normalise": (ROWS[0], NORM, EPS, zeros(WIDTH)),
    "_multiply": (MATRIX, ROWS[0], zeros(3 * WIDTH)),
    "normalise_rows": (ROWS, NORM, EPS, zeros(TOKENS, WIDTH)),
    "_rotate": (ROWS[0], ANGLES[0], ANGLES[1], zeros(HEADS, HEAD_DIM)),
    "normalise_and_rotate": (
        floats(TOKENS, 3 * WIDTH, seed=13),
        *(NORM, NORM, EPS, ANGLES, ANGLES + 1, zeros(1, 2 * HEADS, TOKENS, HEAD_DIM)),
    ),
    "_normalise_and_multiply": (ROWS[0], NORM, EPS, MATRIX, zeros(3 * WIDTH)),
    "_choose": (LOGITS[0], np.zeros(TOP_K, np.int64), zeros(TOP_K)),
    "group": (LOGITS, COUNTS, np.zeros(PAIRS, np.int64), zeros(PAIRS), np.zeros(NUM_EXPERTS, np.int32)),
    "scatter": (floats(PAIRS, WIDTH, seed=14), PAIR_TOKEN, PAIR_WEIGHT, zeros(TOKENS, WIDTH)),
    "_add_three": (NORM, 7, np.float32(0.3), np.float32(1.7), np.float32(-2.1), np.float32(0.9)),
    "multiply_and_scatter": (INNER, ENDS, DOWN, PAIR_TOKEN, PAIR_WEIGHT, zeros(TOKENS, WIDTH)),
    "mix_one_token": (ROWS[0], NORM, EPS, GATE, UP, DOWN, TOP_K, zeros(WIDTH)),
    "attend_one_token": (
        *(ROWS[0], NORM, EPS, MATRIX, NORM, NORM, ANGLES[0], ANGLES[1], CACHE, CACHE + 1, CAPACITY - 3),
        floats(WIDTH, WIDTH, seed=15),
    ),
    "embed": (np.array([3, 0, 17, 2, 9]), GATE, GATE + 1, UP[0, :4], np.array([1, -1, 2, 2]), zeros(TOKENS, WIDTH)),
}


def run(name: str, arguments: Sequence[Any]) -> list[bytes]:
    """Run a loop; all its arrays afterwards."""
    getattr(cpu_loops, name)(*arguments)
    return [argument.tobytes() for argument in arguments if isinstance(argument, np.ndarray)]


def varied(arguments: Sequence[Any], seed: int) -> list[Any]:
    """Other numbers in every array of floats."""
    rng = np.random.default_rng(seed)
    new = list(arguments)
    for i, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray) and argument.dtype == np.float32:
            new[i] = rng.standard_normal(argument.shape, np.float32)
    return new


def far_apart(arguments: Sequence[Any]) -> list[Any]:
    return [np.array(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]


def placed(arguments: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    """The arrays side by side in one piece of memory, in random order, 0 to 31 numbers apart."""
    arrays = [i for i, argument in enumerate(arguments) if isinstance(argument, np.ndarray)]
    pool = np.zeros(sum(arguments[i].nbytes + 512 for i in arrays) + 512, np.uint8)
    found, start = list(arguments), int(rng.integers(16)) * 4
    for i in rng.permutation(arrays).tolist():
        old = arguments[i]
        start += int(rng.integers(32)) * 4
        start += -(pool.ctypes.data + start) % old.itemsize
        found[i] = pool[start : start + old.nbytes].view(old.dtype).reshape(old.shape)
        found[i][...] = old
        start += old.nbytes
    return found


def test_every_compiled_loop_is_here() -> None:
    compiled = {name for name, value in vars(cpu_loops).items() if hasattr(value, "nopython_signatures")}
    assert compiled == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_results_do_not_depend_on_where_arguments_lie(name: str) -> None:
    rng = np.random.default_rng(0)
    different = 0
    for seed in range(NUM_SEEDS):
        given = varied(ARGUMENTS[name], seed)
        expected = run(name, far_apart(given))
        different += sum(run(name, placed(given, rng)) != expected for _ in range(NUM_HEAPS // NUM_SEEDS))
    assert different == 0, f"{different} of {NUM_HEAPS} placements gave other bits"


class Heap:
    """Pieces of the C heap, so that what a loop allocates by itself comes to lie right beside its arguments."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.malloc: Callable[[int], int] = libc.malloc
        self.free: Callable[[int], None] = libc.free
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]

    @contextmanager
    def with_holes(self, size: int, rng: np.random.Generator) -> Iterator[int]:
        """A row of equal pieces, some of which are free to be taken; gives the address of one that is not."""
        order = rng.permutation(12).tolist()
        pieces = [self.malloc(size) for _ in order]
        holes, kept = order[:7], order[7:]
        for place in holes:
            self.free(pieces[place])
        yield pieces[kept[0]]
        for place in kept:
            self.free(pieces[place])


@pytest.mark.parametrize("name", ["_choose", "group", "_normalise_and_multiply", "mix_one_token", "attend_one_token"])
def test_results_do_not_depend_on_where_a_loop_allocates(name: str) -> None:
    heap, rng = Heap(), np.random.default_rng(0)
    variants = [varied(ARGUMENTS[name], seed) for seed in range(NUM_SEEDS)]
    expectations = [run(name, far_apart(given)) for given in variants]
    different = 0
    sizes = [*range(64, 512, 16)] * 200
    for number, size in enumerate(sizes):
        arguments = far_apart(variants[number % NUM_SEEDS])
        first, offset = arguments[0], int(rng.integers(16)) * 4
        with heap.with_holes(size, rng) as address:
            if offset + first.nbytes <= size:
                memory = (ctypes.c_char * first.nbytes).from_address(address + offset)
                arguments[0] = np.frombuffer(memory, first.dtype).reshape(first.shape)
                arguments[0][...] = first
            different += run(name, arguments) != expectations[number % NUM_SEEDS]
    assert different == 0, f"{different} of {len(sizes)} heaps gave other bits"


def test_where_nothing_can_be_cached_it_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = cpu_loops.numba.njit

    def without_cache(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(cpu_loops.numba, "njit", without_cache)

    def double(x: Any) -> None:
        for i in range(x.shape[0]):
            x[i] *= np.float32(2)

    values = np.ones(3, np.float32)
    cpu_loops._compiled(cpu_loops.void(cpu_loops._vector))(double)(values)
    assert values.tolist() == [2.0, 2.0, 2.0]
