"""What holds for every test: no network, no window, and GPU tests only where there is a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.types import Example

pytest_plugins = ["tiny_molmoe"]

# Before any test module loads the libraries that read these.
# One thread is quickest for models this small; the tests hold with any number, and child processes use the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "agg"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def enough_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests use a few threads on any machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)


TINY_TEXTS = ["Which number is the largest? 407", "How many red digits are there?", "red green blue 1 2 3"] * 20


def save_tiny_checkpoint(folder: Path, seed: int = 0, crop_px: int = 24, **changes: Any) -> Path:
    """Write a random MolmoE of 6 blocks and 8 experts, its processor and its `elastic.json`; returns the folder."""
    import torch

    from pacevlm.models.elastic import write_elastic_settings
    from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
    from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor
    from pacevlm.models.molmoe.processing import MolmoEProcessor
    from pacevlm.models.molmoe.tokenization import build_tokenizer

    tokenizer = build_tokenizer(TINY_TEXTS, 300)
    settings: dict[str, Any] = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 6,
        "mlp_hidden_size": 48,
        "vocab_size": tokenizer.vocab_size + 1,
        "embedding_size": tokenizer.vocab_size + 16,
        "additional_vocab_size": 8,
        "moe_num_experts": 8,
        "moe_top_k": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,  # large, so that prompts and knobs change the answer
        "vit_layers": [-1, -2],
        "max_crops": 4,
        "overlap_margins": [2, 2],
        "vision_backbone": {
            "image_default_input_size": [crop_px, crop_px],
            "image_patch_size": 4,
            "image_pos_patch_size": 4,
            "image_emb_dim": 16,
            "image_num_heads": 2,
            "image_num_key_value_heads": 2,
            "image_head_dim": 8,
            "image_mlp_dim": 32,
            "image_num_layers": 2,
            "image_num_pos": (crop_px // 4) ** 2 + 1,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MolmoEForConditionalGeneration(MolmoEConfig(**(settings | changes)))
    model.save_pretrained(folder)
    MolmoEProcessor(MolmoEImageProcessor(crop_px, 4, (2, 2), max_crops=4), tokenizer, max_length=200).save_pretrained(
        folder
    )
    write_elastic_settings(
        folder,
        vision_budgets={"low": 1, "medium": 2, "high": 4},
        removal=[4, 2, 3],
        max_new_tokens=6,
        knob_space={"tiers": ["low", "medium", "high"], "top_ks": [2, 3, 4], "num_blocks": [3, 4, 5, 6]},
    )
    return folder


@pytest.fixture(scope="session")
def tiny_elastic_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random checkpoint; copy it before changing it."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_elastic(tiny_elastic_dir: Path) -> ElasticModel:
    """A tiny random elastic model."""
    from pacevlm.models.elastic import ElasticModel

    return ElasticModel.from_pretrained(tiny_elastic_dir)


@pytest.fixture
def checkpoint(tiny_elastic_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_elastic_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def reseal() -> Callable[[Path, Any], None]:
    """Writes JSON values as an artefact with the digest that belongs to them, as somebody would who knows how.

    Beside a `bundle.json`, which lists its files by their digests, that list is made anew as well.
    """
    from pacevlm.artefact import content_sha256
    from pacevlm.files import sha256_file

    def write(path: Path, values: Any) -> None:
        if isinstance(values, dict) and isinstance(values.get("files"), dict):
            names = [name for name in values["files"] if (path.parent / name).is_file()]
            values = {**values, "files": values["files"] | {name: sha256_file(path.parent / name) for name in names}}
        path.write_text(json.dumps({**values, "sha256": content_sha256(values)}))

    return write


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., Path]:
    """`save_tiny_checkpoint`, for tests that need another one."""
    return save_tiny_checkpoint


# Where a law holds besides the CPU: the pretended device everywhere, a real one where there is one.
OTHER_DEVICES = ["xpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAW_MODELS = [
    *("tiny cpu", "tiny_gqa cpu", "embedded cpu", "toy cpu", "dense cpu"),
    *("qwen3_vl_moe cpu", "qwen3_vl cpu", "gemma4 cpu"),
    # Masks of transformers' Gemma 4 are made by `vmap`, which the pretended device does not follow.
    *("tiny xpu", "tiny_gqa xpu", "toy xpu", "dense xpu", "qwen3_vl_moe xpu"),
    *(
        pytest.param(f"{name} cuda", marks=pytest.mark.gpu)
        for name in ("tiny", "tiny_gqa", "embedded", "toy", "dense", "qwen3_vl_moe", "qwen3_vl", "gemma4")
    ),
]


@contextmanager
def device_exists(device: str) -> Iterator[None]:
    """Let the pretended device exist inside the block, if it is the one that is meant."""
    from pretended_device import DEVICE, PretendedDevice

    with PretendedDevice() if device == DEVICE.type else nullcontext():
        yield


@pytest.fixture(params=OTHER_DEVICES)
def other_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device that is not the CPU, for as long as the test runs."""
    with device_exists(request.param):
        yield request.param


@pytest.fixture(scope="session", params=LAW_MODELS)
def law_model_anywhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ElasticModel:
    """See `law_model`."""
    from families.tiny_gemma4 import save_gemma4
    from families.tiny_qwen3_vl import save_qwen3_vl, save_qwen3_vl_moe
    from families.toy_moe import save_toy

    from pacevlm.models.elastic import ElasticModel, read_elastic_settings
    from pacevlm.models.embedded import EMBEDDED_DIR

    name, device = request.param.split()
    with device_exists(device):
        if name == "embedded":
            if not (EMBEDDED_DIR / "model.safetensors").exists():
                pytest.skip(f"the embedded model is not in {EMBEDDED_DIR}; train it with scripts/train_embedded")
            measured = "removal" in read_elastic_settings(EMBEDDED_DIR)
            return ElasticModel.from_pretrained(
                "embedded", block_order="importance" if measured else "early_exit", device=device
            )
        if name in ("toy", "dense"):
            return ElasticModel.from_pretrained(save_toy(tmp_path_factory.mktemp(name), name), device=device)
        saves = {"qwen3_vl_moe": save_qwen3_vl_moe, "qwen3_vl": save_qwen3_vl, "gemma4": save_gemma4}
        if name in saves:
            return ElasticModel.from_pretrained(saves[name](tmp_path_factory.mktemp(name)), device=device)
        if name == "tiny_gqa":
            folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny_gqa"), seed=1, n_kv_heads=2)
            return ElasticModel.from_pretrained(folder, device=device)
        return ElasticModel.from_pretrained(request.getfixturevalue("tiny_elastic_dir"), device=device)


@pytest.fixture
def law_model(law_model_anywhere: ElasticModel) -> Iterator[ElasticModel]:
    """Every model that the laws of elastic execution must hold for, on every device."""
    with device_exists(law_model_anywhere.device.type):
        yield law_model_anywhere


@pytest.fixture(scope="session")
def law_examples() -> list[Example]:
    """Pictures and questions of different sizes."""
    import numpy as np
    from PIL import Image

    from pacevlm.types import Example

    rng = np.random.default_rng(0)
    questions = [
        "Which number is the largest?",
        "How many red digits are there?",
        "2?",
        "Is 4 there? What colour has it?",
    ]
    sizes = [(24, 24), (40, 56), (64, 33), (90, 70)]
    return [
        Example(f"law-{i}", Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), question, (str(i),))
        for i, (size, question) in enumerate(zip(sizes, questions, strict=True))
    ]
