"""Saving and loading: the same controller to the bit, or a refusal that says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pacevlm.controller.policy import Controller
from pacevlm.errors import CheckpointError, IdentityError, StorageError
from pacevlm.files import sha256_file
from pacevlm.identity import Identity
from pacevlm.images import open_picture
from pacevlm.knobs import KnobSpace

JSON, WEIGHTS = "controller.json", "controller.safetensors"


def wanted(identity: dict, **other: object) -> Identity:
    """What a controller of these tests is to be used with."""
    values = {**identity, **other}
    return Identity(
        values["model_identity"], values["knob_space"], values["estimator_fingerprint"], d_model=values["d_model"]
    )


@pytest.fixture
def saved(make_controller: Callable, tmp_path: Path) -> Path:
    make_controller(opinionated=True).save_pretrained(tmp_path / "controller")
    return tmp_path / "controller"


@pytest.mark.parametrize("settings", [{}, {"thumbnail": True, "pairwise": False, "hidden_dim": 8}])
def test_a_loaded_controller_answers_the_same_to_the_bit(
    make_controller: Callable, make_request: Callable, identity: dict, tmp_path: Path, settings: dict
) -> None:
    from PIL import Image

    controller = make_controller(opinionated=True, **settings)
    controller.save_pretrained(tmp_path / "new" / "folder")
    state = torch.get_rng_state()
    loaded = Controller.from_pretrained(tmp_path / "new" / "folder", wanted(identity))
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == controller.config
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == dict.fromkeys(
        dict(controller.named_parameters()), True
    )

    requests = [make_request(seed, picture=open_picture(Image.new("RGB", (9, 9), (seed, 0, 0)))) for seed in range(6)]
    objectives = [request.objective for request in requests]
    outputs = torch.randn(6, 12)
    for one, other in (
        (controller.stage1_features(requests), loaded.stage1_features(requests)),
        (controller.latency_tokens(objectives), loaded.latency_tokens(objectives)),
        *[
            (c.stage1_logits(c.stage1_features(requests)), d.stage1_logits(d.stage1_features(requests)))
            for c, d in [(controller, loaded)]
        ],
        (
            controller.stage2_logits(outputs, requests, [0, 1, 2, 0, 1, 2]),
            loaded.stage2_logits(outputs, requests, [0, 1, 2, 0, 1, 2]),
        ),
    ):
        assert torch.equal(one, other)


def test_saving_again_gives_the_same_files_and_leaves_no_others(saved: Path, identity: dict, tmp_path: Path) -> None:
    loaded = Controller.from_pretrained(saved, wanted(identity))
    loaded.save_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [JSON, WEIGHTS]
    for name in (JSON, WEIGHTS):
        assert sha256_file(saved / name) == sha256_file(tmp_path / "again" / name)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model_identity": "model-2"}, "another model: 'model-1', not 'model-2'"),
        ({"d_model": 13}, "another model width: 12, not 13"),
        ({"knob_space": KnobSpace(("low", "medium", "high"), (4, 8), (12, 14, 15, 16))}, "another knob space"),
        ({"knob_space": KnobSpace(("a", "b", "c"), (4, 6), (12, 14, 15, 16))}, "another knob space"),
        ({"estimator_fingerprint": "e" * 64}, "another latency estimator"),
    ],
)
def test_another_model_knob_space_or_estimator_is_refused(
    saved: Path, identity: dict, other: dict, message: str
) -> None:
    with pytest.raises(IdentityError, match=message):
        Controller.from_pretrained(saved, wanted(identity, **other))


@pytest.mark.parametrize("name", [JSON, WEIGHTS])
def test_missing_files_are_refused(saved: Path, identity: dict, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match="there is no"):
        Controller.from_pretrained(saved, wanted(identity))


@pytest.mark.parametrize("name", [JSON, WEIGHTS])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.95])
def test_truncated_files_are_refused(saved: Path, identity: dict, name: str, kept: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError):
        Controller.from_pretrained(saved, wanted(identity))


def test_any_changed_byte_of_the_weights_is_refused(saved: Path, identity: dict) -> None:
    content = (saved / WEIGHTS).read_bytes()
    for position in range(0, len(content), len(content) // 23):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        (saved / WEIGHTS).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            Controller.from_pretrained(saved, wanted(identity))


@pytest.mark.parametrize("name", [JSON, WEIGHTS])
def test_files_of_two_controllers_are_refused(
    saved: Path, make_controller: Callable, identity: dict, tmp_path: Path, name: str
) -> None:
    make_controller(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, saved / name)
    with pytest.raises(CheckpointError, match="does not belong"):
        Controller.from_pretrained(saved, wanted(identity))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fixed policy"}, "fixed policy"),
        ({"schema_version": 1}, "schema version 1"),
        ({"extra": 1}, "must have the keys"),
        ({"config": {"reference_ms": 90.0}}, "config must have the keys"),
        ({"knob_space": {"tiers": []}}, "knob_space must have the keys"),
        ({"knob_space": {"tiers": ["low"], "top_ks": ["x"], "num_blocks": [1]}}, r"top_ks\[0\] is 'x'"),
        ({"knob_space": 3}, "knob_space must have the keys"),
        ({"weights_sha256": None}, "weights_sha256"),
        ({"weights_sha256": "0" * 64}, "does not belong"),
        ({"d_model": True}, "d_model"),
    ],
)
def test_malformed_descriptions_are_refused(
    saved: Path, identity: dict, reseal: Callable, change: dict, message: str
) -> None:
    values = {**json.loads((saved / JSON).read_text()), **change}
    (saved / JSON).write_text(json.dumps(values))
    with pytest.raises(CheckpointError):
        Controller.from_pretrained(saved, wanted(identity))
    reseal(saved / JSON, values)
    with pytest.raises(CheckpointError, match=message):
        Controller.from_pretrained(saved, wanted(identity))


def test_a_description_of_other_shapes_is_refused(saved: Path, identity: dict, reseal: Callable) -> None:
    values = json.loads((saved / JSON).read_text())
    values["config"]["hidden_dim"] = 32
    reseal(saved / JSON, values)
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        Controller.from_pretrained(saved, wanted(identity))


def test_json_that_is_no_object_is_refused(saved: Path, identity: dict) -> None:
    (saved / JSON).write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="holds 'list'"):
        Controller.from_pretrained(saved, wanted(identity))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_training_gives_are_refused(
    make_controller: Callable, identity: dict, tmp_path: Path, number: float
) -> None:
    controller = make_controller()
    with torch.no_grad():
        next(controller.stage2.parameters()).view(-1)[3] = number
    controller.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not finite or beyond"):
        Controller.from_pretrained(tmp_path, wanted(identity))


def test_a_folder_that_cannot_be_written_says_so(make_controller: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        make_controller().save_pretrained(tmp_path / "file")
