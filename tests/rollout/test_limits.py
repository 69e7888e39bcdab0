"""Limits of batches follow from the memory that is free."""

from __future__ import annotations

import pytest
import torch

from pacevlm.errors import ConfigError
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout import limits
from pacevlm.rollout.limits import MOST_PREFIX_BYTES, MOST_ROWS, MOST_TOKENS, BatchLimits, free_bytes, is_out_of_memory


def limits_with(model: ElasticModel, num_free: int, monkeypatch: pytest.MonkeyPatch) -> BatchLimits:
    monkeypatch.setattr(limits, "free_bytes", lambda _: num_free)
    return BatchLimits.for_model(model)


def test_more_memory_allows_more_up_to_what_is_useful(
    tiny_elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [limits_with(tiny_elastic, 1 << power, monkeypatch) for power in range(0, 41, 4)]
    for name in ("max_tokens", "max_prefix_bytes"):
        values = [getattr(limit, name) for limit in chosen]
        assert values == sorted(values)
        assert len(set(values)) > 3
        assert values[0] == 1
    most = BatchLimits(MOST_ROWS["cpu"], MOST_TOKENS["cpu"], MOST_PREFIX_BYTES["cpu"])
    assert chosen[-1] == most


def test_a_batch_takes_no_more_than_its_share(tiny_elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch) -> None:
    num_free = 1 << 24
    chosen = limits_with(tiny_elastic, num_free, monkeypatch)
    caches = 2 * tiny_elastic.adapter.num_blocks * tiny_elastic.d_model * 4 * chosen.max_tokens
    assert caches < num_free / 2
    assert caches + chosen.max_prefix_bytes < num_free


def test_given_limits_are_kept(tiny_elastic: ElasticModel) -> None:
    assert BatchLimits.for_model(tiny_elastic, max_rows=7, max_tokens=None).max_rows == 7


def test_halving_cuts_the_batch_that_failed_and_ends_at_one() -> None:
    whole = BatchLimits(256, 8192, 1 << 20)
    half = whole.halved(40, 4000)
    assert (half.max_rows, half.max_tokens, half.max_prefix_bytes) == (20, 2000, 1 << 20)
    assert half.halved(2, 2) == BatchLimits(1, 1, 1 << 20)


@pytest.mark.parametrize("name", ["max_rows", "max_tokens", "max_prefix_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_senseless_limits_are_refused(name: str, value: object) -> None:
    values = {"max_rows": 1, "max_tokens": 1, "max_prefix_bytes": 1, name: value}
    with pytest.raises(ConfigError, match=name):
        BatchLimits(**values)


def test_this_machine_has_memory() -> None:
    assert free_bytes(torch.device("cpu")) > 1 << 20


def test_what_torch_raises_without_memory_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
