"""What the front and its worker send each other: JSON, and a picture's bytes as they are; never pickle."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from pacevlm.knobs import Knobs
from pacevlm.types import Answer, RequestSizes, StageTimes, VisionSizes

# Lengths of the two parts that follow: JSON, then bytes.
HEAD = struct.Struct("!II")
# What a question alone sends in the place of a picture; no picture's file is empty.
NO_IMAGE = b""


def pack(message: dict[str, Any], body: bytes = NO_IMAGE) -> bytes:
    """A message as it is sent; infinite numbers are allowed, as Python's JSON writes them."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return HEAD.pack(len(text), len(body)) + text + body


def send(connection: socket.socket, message: dict[str, Any], body: bytes = NO_IMAGE) -> None:
    """Send a message and wait until the system has taken it; raises OSError if nobody listens any more."""
    connection.sendall(pack(message, body))


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Wait for a message; None if the other side is gone."""
    head = _read(connection, HEAD.size)
    if head is None:
        return None
    num_text, num_body = HEAD.unpack(head)
    content = _read(connection, num_text + num_body)
    return None if content is None else (json.loads(content[:num_text]), content[num_text:])


def _read(connection: socket.socket, number: int) -> bytes | None:
    content, place = bytearray(number), 0
    view = memoryview(content)
    while place < number:
        try:
            count = connection.recv_into(view[place:])
        except OSError:
            return None
        if count == 0:
            return None
        place += count
    return bytes(content)


def answer_to_dict(answer: Answer) -> dict[str, Any]:
    """An answer ready for JSON."""
    values = {name: getattr(answer, name) for name in Answer.__dataclass_fields__}
    sizes, times = answer.sizes, answer.times
    return values | {
        "knobs": str(answer.knobs),
        "sizes": {name: getattr(sizes, name) for name in RequestSizes.__slots__}
        | {"vision": [_vision(vision) for vision in sizes.vision]},
        "vision": _vision(answer.vision),
        "times": {name: getattr(times, name) for name in StageTimes.__slots__},
    }


def answer_from_dict(values: dict[str, Any]) -> Answer:
    """Inverse of `answer_to_dict`."""
    sizes, times = values["sizes"], values["times"]
    return Answer(
        **values
        | {
            "token_ids": tuple(values["token_ids"]),
            "knobs": Knobs.parse(values["knobs"]),
            "sizes": RequestSizes(**sizes | {"vision": tuple(VisionSizes(*each) for each in sizes["vision"])}),
            "vision": VisionSizes(*values["vision"]),
            "times": StageTimes(**times | {"decode_ms": tuple(times["decode_ms"])}),
        }
    )


def _vision(vision: VisionSizes) -> tuple[int, int, int]:
    return vision.num_units, vision.num_image_tokens, vision.num_unit_pairs
