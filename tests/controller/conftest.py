from collections.abc import Callable

import numpy as np
import pytest
import torch

from pacevlm.controller.policy import Controller, ControllerConfig
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import KnobSpace
from pacevlm.types import Objective, RequestSizes, RequestView, VisionSizes

D_MODEL = 12
PRICES = (0.0, 0.0, 1.0, 12.0, 64.0)
IDENTITY = {"model_identity": "model-1", "estimator_fingerprint": "f" * 64, "d_model": D_MODEL}


@pytest.fixture(scope="session")
def space() -> KnobSpace:
    return KnobSpace(("low", "medium", "high"), (4, 6), (12, 14, 15, 16))


@pytest.fixture(scope="session")
def identity(space: KnobSpace) -> dict[str, object]:
    """What a controller of these tests is made for, as keyword arguments."""
    return {**IDENTITY, "knob_space": space}


@pytest.fixture(scope="session")
def make_controller(identity: dict[str, object]) -> Callable[..., Controller]:
    """Controllers as they start, or `opinionated` ones whose logits differ clearly between actions."""

    def build(*, seed: int = 0, opinionated: bool = False, **settings: object) -> Controller:
        config = ControllerConfig(**{"reference_ms": 100.0, "embedding_scale": 0.02, **settings})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            controller = Controller(config, **identity)
            if opinionated:
                for name, parameter in controller.named_parameters():
                    if "head.weight" in name:
                        torch.nn.init.normal_(parameter)
        return controller

    return build


@pytest.fixture(scope="session")
def make_request(space: KnobSpace) -> Callable[..., PolicyInput]:
    """A request with random sizes and question; everything follows from `seed` unless given."""

    def build(seed: int = 0, **values: object) -> PolicyInput:
        generator = np.random.default_rng(seed)
        height, width = (int(n) for n in generator.integers(50, 2000, 2))
        crops = np.sort(generator.integers(1, 13, len(space.tiers))).tolist()
        budget_ms = float(generator.uniform(20, 200))
        looks = {
            "question_embedding": torch.from_numpy(generator.normal(0, 0.02, D_MODEL).astype(np.float32)),
            "image_size": (height, width),
            "sizes": RequestSizes(
                tuple(VisionSizes(n, 144 * n) for n in crops), int(generator.integers(5, 90)), height * width
            ),
            "picture": None,
        }
        looks |= {name: values.pop(name) for name in list(values) if name in looks}
        defaults = {
            "view": RequestView(**looks),
            "objective": Objective(values.pop("budget_ms", budget_ms), price=float(generator.choice(PRICES))),
            "bounds_ms": np.cumsum(generator.uniform(1, 9, len(space))).reshape(space.shape),
            "feasible": random_mask(generator, space),
            "any_feasible": True,
            "example_id": f"example-{seed}",
        }
        return PolicyInput(**{**defaults, **values})

    return build


def random_mask(generator: np.random.Generator, space: KnobSpace) -> np.ndarray:
    """A mask over the space with a random share of it admitted, but never nothing."""
    mask = generator.random(space.shape) < generator.random()
    mask.flat[generator.integers(len(space))] = True
    return mask
