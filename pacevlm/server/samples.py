"""Questions of the embedded data set with their pictures and references, for the page."""

from __future__ import annotations

import base64
import functools
import io
from typing import Any

from pacevlm.data.digit_tasks import load_digits

NUM_SAMPLES = 48
"""Enough for a load that does not always ask the same."""


@functools.cache
def samples() -> tuple[dict[str, Any], ...]:
    """Test questions, which no training has seen: `question`, `references`, `task` and `image`, a data: URL."""
    return tuple(
        {
            "question": example.question,
            "references": list(example.references),
            "task": example.metadata.get("task"),
            "image": _data_url(example.image),
        }
        for example in load_digits("test", NUM_SAMPLES)
    )


def _data_url(image: Any) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
