"""Two replicas of the server behind Ray Serve, on CPUs: one is killed under load, and every request gets its answer."""

from __future__ import annotations

import base64
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pacevlm.errors import ConfigError
from pacevlm.server.config import ServeConfig

pytest.importorskip("ray", reason="needs Ray Serve, pacevlm's extra ray")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray's own libraries complain of
    import ray
    from ray import serve

    from pacevlm.server.ray_app import Replica, build

# Ray leaves sockets and processes to its own threads, which close them when they please.
pytestmark = pytest.mark.filterwarnings("ignore")
AMPLE_MS = 60_000
NUM_CLIENTS, SECONDS = 4, 8.0


def replica_processes() -> list[psutil.Process]:
    named = psutil.process_iter(["cmdline"])
    return [one for one in named if " ".join(one.info["cmdline"] or []).startswith("ray::ServeReplica:tested")]


@pytest.fixture(scope="module")
def address(served_run: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    paths = {"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=paths)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Replica.options(num_replicas=2).bind(ServeConfig(run_dir=served_run)), name="tested", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def test_settings_are_those_of_the_server(tmp_path: Path) -> None:
    assert build({"run_dir": "runs/mine", "max_waiting": 8}) is not None
    with pytest.raises(ConfigError, match="are unknown"):
        build({"run_directory": str(tmp_path)})


@pytest.mark.timeout(240)
def test_a_replica_is_killed_under_load_and_nothing_is_lost(address: str, picture: bytes) -> None:
    before = replica_processes()
    assert len(before) == 2
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    content = [{"type": "text", "text": "Which digit is red?"}, {"type": "image_url", "image_url": {"url": url}}]
    until, answers, errors = time.monotonic() + SECONDS, [], []

    def ask() -> None:
        # Ray answers 500 for what ran on the killed one; the official client then tries again, as it always does.
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=4)
        while time.monotonic() < until:
            try:
                found = client.chat.completions.create(
                    model="pacevlm",
                    messages=[{"role": "user", "content": content}],
                    extra_body={"latency_budget_ms": AMPLE_MS},
                )
                answers.append(found.choices[0].message.content)
            except openai.OpenAIError as error:
                errors.append(error)

    clients = [threading.Thread(target=ask) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(SECONDS / 3)
    num_before = len(answers)
    os.kill(before[0].pid, signal.SIGKILL)
    for client in clients:
        client.join()
    assert not errors
    assert 0 < num_before < len(answers)
    # The same question of the same model: whichever replica answers, under budgets that bind nothing.
    assert len(set(answers)) == 1
    deadline = time.monotonic() + 60
    while len(replica_processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(replica_processes()) == 2
    assert before[0].pid not in {one.pid for one in replica_processes()}
