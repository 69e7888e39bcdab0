import numpy as np
import pytest
import torch

from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import KnobError
from pacevlm.types import Objective, RequestSizes, RequestView, VisionSizes


@pytest.mark.parametrize(
    "feasible",
    [np.zeros((3, 5, 5), dtype=bool), np.ones((75,), dtype=bool), np.ones((3, 5, 5), dtype=np.float64)],
    ids=["admits nothing", "flat", "not bool"],
)
def test_a_mask_that_no_policy_could_use_is_refused(feasible: np.ndarray) -> None:
    view = RequestView(torch.zeros(4), RequestSizes((VisionSizes(1, 1),), 1, 100), (10, 10), None)
    with pytest.raises(KnobError, match="feasible mask"):
        PolicyInput(view, Objective(80.0), np.zeros((3, 5, 5)), feasible, True)
