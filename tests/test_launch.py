"""Which process of a launch this is."""

from __future__ import annotations

import pytest

from pacevlm.errors import ConfigError
from pacevlm.launch import Launch, read_launch

GIVEN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}


def test_a_launch_is_read_and_a_process_on_its_own_is_none() -> None:
    assert read_launch(GIVEN) == Launch(rank=5, num_ranks=8, local_rank=1)
    assert read_launch({}) is None
    assert read_launch(GIVEN | {"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert read_launch({"WORLD_SIZE": "8"}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"LOCAL_RANK": ""}, "no LOCAL_RANK"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "no MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "8"}, "0 <= LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({"RANK": "one"}, "RANK, WORLD_SIZE and LOCAL_RANK one, 8, 1"),
        ({"LOCAL_RANK": "-1"}, "must be"),
    ],
)
def test_a_broken_launch_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_launch(GIVEN | changes)
