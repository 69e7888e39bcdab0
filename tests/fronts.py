"""Made-up fronts, for the tests of what is made of them."""

from __future__ import annotations

import numpy as np

from pacevlm.evaluation.fronts import Front


def make_front(num_examples: int = 300, seed: int = 0, slower: float = 1.0) -> Front:
    """At every price a few examples more are wrong that were right before, and requests are faster."""
    generator = np.random.default_rng(seed)
    place = (generator.permutation(num_examples) + 0.5) / num_examples
    accuracy = np.stack([place >= 0.1 + lost for lost in (0.0, 0.02, 0.05, 0.2)]).astype(float)
    base_ms = generator.uniform(15, 25, num_examples)
    return Front(accuracy, slower * np.stack([base_ms * share for share in (1.0, 0.8, 0.6, 0.3)]))
