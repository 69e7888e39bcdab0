"""Parity with reference tensors: of every fixture folder there is, and of the parity code itself.

The folders in `shared/fixtures` beside the repository are run, or the one (or the ones inside the one) that
PACEVLM_FIXTURES names. A folder in the same format that the model itself wrote, of other sizes, is always run: it
proves nothing about the model, but that the code reads the format and notices damage.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pacevlm.errors import CheckpointError
from pacevlm.models import experts as experts_module
from pacevlm.models.molmoe import MolmoEForConditionalGeneration, blocks, modeling_molmoe
from pacevlm.models.molmoe.image_processing import prepare_image
from pacevlm.models.molmoe.processing import SpecialTokenIds, assemble_request, collate_requests
from pacevlm.models.molmoe.tiling import CropGeometry
from recipes.parity.checks import Tolerance, compare, summary, table
from recipes.parity.folder import ParityFolder, main, unaccepted_steps
from recipes.parity.greedy import decode_greedily

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("PACEVLM_FIXTURES", ROOT.parent / "shared" / "fixtures"))


def fixture_folders() -> list[Path]:
    if (FIXTURES / "cases.json").exists():
        return [FIXTURES]
    return sorted(path.parent for path in FIXTURES.glob("*/cases.json"))


@functools.cache
def opened(folder: Path) -> ParityFolder:
    return ParityFolder(folder)


def all_cases() -> list[Any]:
    cases = [
        pytest.param(folder, name, id=f"{folder.name}-{name}")
        for folder in fixture_folders()
        for name in opened(folder).names
    ]
    reason = f"no reference fixtures in {FIXTURES}; set PACEVLM_FIXTURES to a folder of them"
    return cases or [pytest.param(None, "", marks=pytest.mark.skip(reason=reason), id="none")]


@pytest.mark.parametrize(("folder", "name"), all_cases())
def test_reference(folder: Path, name: str) -> None:
    parity = opened(folder)
    checks = parity.run(name)
    assert checks, f"{name} stores nothing to compare"
    assert all(check.passed for check in checks), "\n" + table([check for check in checks if not check.passed])
    if name in parity.cases:
        assert parity.not_compared(name, checks) == []


# A folder that the model writes itself

GEOMETRY = CropGeometry(32, 4, (2, 2))
SPECIAL_IDS = {"bos": 55, "start": 56, "end": 57, "patch": 58, "col": 59}
VARIANTS: dict[str, dict[str, Any]] = {
    "topk_mixed": {"top_k_per_block": [8, 1, 2, 3, 8], "removed_blocks": []},
    "skip_first_last": {"top_k_per_block": [8] * 5, "removed_blocks": [0, 4]},
}


def outputs(model: MolmoEForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out = model(**inputs, use_cache=False, output_hidden_states=True, output_router_logits=True)
    tensors = {f"hidden_{index}": state for index, state in enumerate(out.hidden_states[1:])}
    if "images" in inputs:
        tensors["image_features"] = model.model.image_features(inputs["images"], inputs["image_masks"])
        patches = inputs["images"].flatten(0, 1)
        tensors["vit_features"] = model.model.vision_backbone.vit_features(patches).unflatten(
            0, inputs["images"].shape[:2]
        )
    ids, logits = decode_greedily(model, inputs, 6)
    if len(ids) == 1:
        tensors["greedy_logits"] = logits
    return tensors | {
        "inputs_embeds": out.hidden_states[0],
        "final_norm": model.model.transformer.ln_f(out.hidden_states[-1]),
        "logits": out.logits,
        "router_logits": torch.stack(out.router_logits),
        "greedy_ids": ids,
    }


@pytest.fixture(scope="module")
def own_folder(
    make_model: Callable[..., MolmoEForConditionalGeneration], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of other sizes (5 blocks, 16 experts, top-8, 64 patches per crop) without image processing cases."""
    folder = tmp_path_factory.mktemp("own")
    model = make_model(n_layers=5, moe_num_experts=16, moe_top_k=8)
    model.save_pretrained(folder)
    special = SpecialTokenIds(*SPECIAL_IDS.values())
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    cases: dict[str, Any] = {}
    requests = []
    with torch.no_grad():
        for name, height, width in (("img_one", 24, 30), ("img_wide", 20, 90)):
            pixels, prompt = rng.integers(0, 256, (height, width, 3), dtype=np.uint8), [3, 1, 4, height]
            requests.append(assemble_request([], prompt, prepare_image(pixels, 3, GEOMETRY), special))
            inputs = collate_requests(requests[-1:])
            cases[name] = {"max_crops": 3}
            tensors |= {f"{name}/in/{key}": value for key, value in inputs.items() if key != "attention_mask"}
            tensors |= {f"{name}/out/{key}": value for key, value in outputs(model, inputs).items()}
            tensors[f"{name}/in/image_uint8"] = torch.from_numpy(pixels)
            tensors[f"{name}/in/prompt_token_ids"] = torch.tensor(prompt)
        inputs = collate_requests(requests)
        cases["img_mixed_b2"] = {"greedy_min_top2_gap": 0.5}
        kept = ("input_ids", "image_masks", "image_input_idx")
        tensors |= {f"img_mixed_b2/in/{key}": inputs[key] for key in kept}
        tensors |= {f"img_mixed_b2/out/{key}": value for key, value in outputs(model, inputs).items()}
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [70, 7, 1, 8, -1, -1, -1, -1]])
        inputs = {"input_ids": ids, "attention_mask": (ids != -1).long()}
        tensors["text_rpad_b2/in/input_ids"] = ids
        tensors |= {f"text_rpad_b2/out/{key}": value for key, value in outputs(model, inputs).items()}
        variants: dict[str, Any] = {}
        for name, knobs in VARIANTS.items():
            out = model(**inputs, use_cache=False, output_hidden_states=True, **knobs)
            tensors[f"text_rpad_b2/{name}/logits"] = out.logits
            tensors[f"text_rpad_b2/{name}/final_norm"] = model.model.transformer.ln_f(out.hidden_states[-1])
            greedy_ids = decode_greedily(model, inputs, 6, **knobs)[0].tolist()
            variants[name] = {**knobs, "greedy_ids": greedy_ids, "greedy_min_top2_gap": 0.5}
        cases["text_rpad_b2"] = {"variants": variants}
        images = tensors["img_wide/in/images"][0].clone()
        row = images[1, 36]
        assert row.std() > 0.5  # a patch of the picture, not of its padding
        row[5] = -1.0
        cases["single_minus_one"] = {}
        tensors["single_minus_one/in/images"] = row
        for rule, origin in (("all", "training"), ("any", "hf")):
            backbone = model.model.vision_backbone
            backbone.padding_crop_rule = rule
            features = backbone(images, tensors["img_wide/in/image_masks"][0])[1:2]
            tensors[f"single_minus_one/out/image_features_{origin}"] = features
    geometry = {"base_image_input_size": [32, 32], "image_patch_size": 4, "overlap_margins": [2, 2]}
    text = json.dumps({"special_tokens": SPECIAL_IDS, "geometry": geometry, "cases": cases})
    (folder / "cases.json").write_text(text)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "cases.safetensors")
    return folder


def misses(parity: ParityFolder, *names: str) -> list[str]:
    """What fails in the named cases, or in all."""
    return [f"{c.case}/{c.tensor}" for name in names or parity.names for c in parity.run(name) if not c.passed]


def test_a_folder_of_other_sizes_passes(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(own_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (result["cases"], result["failed"], result["checks"]) == (5, 0, len(lines) - 2)
    assert not any("not compared" in line for line in lines)
    # An aligned table: the verdicts stand in one column.
    assert len({line.rindex(" ") for line in lines[:-1]}) == 1
    tensors = {tuple(line.split()[:2]) for line in lines[1:-1]}
    for case in ("img_one", "img_wide", "img_mixed_b2", "text_rpad_b2"):
        for tensor in ("inputs_embeds", "hidden_0", "hidden_4", "final_norm", "logits", "router_logits", "greedy_ids"):
            assert (case, tensor) in tensors
    for tensor in ("images", "image_masks", "image_input_idx", "input_ids"):
        assert {("img_one", f"in/{tensor}"), ("img_wide", f"in/{tensor}")} <= tensors
    for variant in VARIANTS:
        for tensor in ("logits", "final_norm", "greedy_ids"):
            assert ("text_rpad_b2", f"{variant}/{tensor}") in tensors
    assert {("single_minus_one", f"image_features_{rule}") for rule in ("training", "hf")} <= tensors


@pytest.mark.parametrize(
    ("weight", "place", "missed"),
    [
        ("model.transformer.blocks.3.attn.q_norm.weight", (2,), "text_rpad_b2/hidden_3"),
        ("model.transformer.blocks.4.mlp.gate.weight", (1, 2), "text_rpad_b2/router_logits"),
        ("model.transformer.ln_f.weight", (7,), "text_rpad_b2/final_norm"),
        ("lm_head.weight", (9, 3), "text_rpad_b2/logits"),
        ("model.transformer.wte.new_embedding", (6, 3), "text_rpad_b2/inputs_embeds"),
        ("model.vision_backbone.pad_embed", (1, 3), "img_one/image_features"),
        ("model.vision_backbone.image_vit.transformer.resblocks.0.attention.wv.bias", (3,), "img_wide/vit_features"),
        ("model.vision_backbone.image_projector.w3.weight", (3, 3), "single_minus_one/image_features_hf"),
    ],
)
def test_one_changed_weight_is_noticed(own_folder: Path, weight: str, place: tuple[int, ...], missed: str) -> None:
    parity = ParityFolder(own_folder)
    with torch.no_grad():
        parity.model.state_dict()[weight][place] += 0.5
    assert missed in misses(parity, missed.split("/")[0])


def renormalise(monkeypatch: pytest.MonkeyPatch) -> None:
    def route(*arguments: Any) -> tuple[Tensor, Tensor]:
        weights, experts = experts_module.route(*arguments)
        return weights / weights.sum(-1, keepdim=True), experts

    monkeypatch.setattr(blocks, "route", route)


def ignore_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_molmoe.MolmoEModel.forward
    ignoring = lambda self, *a, removed_blocks=(), **k: forward(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(modeling_molmoe.MolmoEModel, "forward", ignoring)


def interleave(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (table[..., x.shape[-1] // 2 :].repeat_interleave(2, -1) for table in rope)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + turned * sin

    monkeypatch.setattr(blocks, "rotate", rotate)


def shift_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = modeling_molmoe.rope_tables
    shifted = lambda ids, *a: tables(ids + int(ids.shape[1] == 1), *a)  # noqa: E731
    monkeypatch.setattr(modeling_molmoe, "rope_tables", shifted)


@pytest.mark.parametrize(
    ("mistake", "missed"),
    [
        (renormalise, "text_rpad_b2/hidden_0"),
        (renormalise, "text_rpad_b2/topk_mixed/logits"),
        (ignore_skipping, "text_rpad_b2/skip_first_last/logits"),
        (interleave, "img_mixed_b2/hidden_0"),
        (shift_steps, "text_rpad_b2/greedy_logits (cached = uncached)"),
        (shift_steps, "img_one/greedy_logits"),
    ],
)
def test_a_mistake_in_the_model_is_noticed(
    own_folder: Path, mistake: Callable[[pytest.MonkeyPatch], None], missed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    assert missed in misses(ParityFolder(own_folder), missed.split("/")[0])


def test_swapped_vision_levels_are_noticed(own_folder: Path) -> None:
    parity = ParityFolder(own_folder)
    parity.model.model.vision_backbone.image_vit.layers.reverse()
    missed = set(misses(parity, "img_one", "img_mixed_b2"))
    assert {"img_one/vit_features", "img_one/image_features", "img_mixed_b2/logits"} <= missed


@pytest.mark.parametrize(
    ("tensor", "missed"),
    [
        ("img_one/in/image_masks", "img_one/in/image_masks"),
        ("img_wide/in/image_input_idx", "img_wide/in/image_input_idx"),
        ("img_wide/out/greedy_ids", "img_wide/greedy_ids"),
        ("img_wide/out/greedy_logits", "img_wide/greedy_logits"),
        ("img_mixed_b2/in/image_masks", "img_mixed_b2/in/image_masks"),
        ("single_minus_one/out/image_features_training", "single_minus_one/image_features_training"),
    ],
)
def test_one_changed_reference_value_is_noticed(own_folder: Path, tensor: str, missed: str) -> None:
    parity = ParityFolder(own_folder)
    flat = parity.tensors[tensor].view(-1)
    flat[len(flat) // 2] += 1 if flat[len(flat) // 2] < 5 else -1
    assert missed in misses(parity, missed.split("/")[0])


def test_padding_is_not_compared(own_folder: Path) -> None:
    parity = ParityFolder(own_folder)
    for name in ("logits", "hidden_2", "inputs_embeds"):
        parity.tensors[f"text_rpad_b2/out/{name}"][1, 4:] = torch.nan
    assert misses(parity) == []
    parity.tensors["text_rpad_b2/out/logits"][1, 3] = torch.nan
    assert misses(parity) == ["text_rpad_b2/logits"]


def test_what_is_not_compared_is_said(own_folder: Path) -> None:
    parity = ParityFolder(own_folder)
    parity.tensors["img_one/out/attention_maps"] = torch.zeros(1)
    assert parity.not_compared("img_one", parity.run("img_one")) == ["attention_maps"]


def test_optional_parts_may_be_missing(own_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(own_folder, tmp_path / "less")
    text = json.loads((folder / "cases.json").read_text())
    del text["geometry"], text["cases"]["img_mixed_b2"], text["cases"]["single_minus_one"]
    (folder / "cases.json").write_text(json.dumps(text))
    kept = ("logits", "input_ids", "images", "image_masks", "image_input_idx", "image_uint8", "prompt_token_ids")
    tensors = load_file(folder / "cases.safetensors")
    save_file({k: v for k, v in tensors.items() if k.endswith(kept)}, folder / "cases.safetensors")
    assert misses(ParityFolder(folder)) == []


# Image processing at the published sizes


def write_preproc(folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    Image.fromarray(image).save(folder / "images" / "small.png")
    Image.fromarray(image[:1].repeat(20, axis=1)).save(folder / "images" / "thin.png")
    prepared = prepare_image(image, 12, CropGeometry())
    special = SpecialTokenIds(50279, 50280, 50281, 50282, 50283)
    case = {
        "image": "small",
        "max_crops": 12,
        "prompt_token_ids": [5, 6],
        "tiling": [1, 1],
        "images_shape": [2, 576, 588],
    }
    refused = {"image": "thin", "max_crops": 12, "error": "a side would have no pixel"}
    names = ("bos", "im_start", "im_end", "im_patch", "im_col")
    ids = dict(zip(names, (50279, 50280, 50281, 50282, 50283), strict=True))
    (folder / "preproc.json").write_text(json.dumps({"special_tokens": ids, "cases": [case, refused]}))
    index = torch.tensor([0, 7, 576 * 588 * 2 - 1])
    request = assemble_request([], [5, 6], prepared, special)
    tensors = {
        "00/input_ids": request.input_ids.int(),
        "00/image_input_idx": prepared.image_input_idx.int(),
        "00/image_masks": prepared.image_masks,
        "00/patch_mean": prepared.images.mean(-1),
        "00/sample_index": index.int(),
        "00/sample_value": prepared.images.flatten()[index],
    }
    save_file(tensors, folder / "preproc.safetensors")


def test_image_processing_is_compared(own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(own_folder, tmp_path / "preproc")
    write_preproc(folder)
    parity = ParityFolder(folder)
    small, thin = (name for name in parity.names if name.startswith("preproc/"))
    assert [c.tensor for c in parity.run(thin)] == ["refused"]
    checks = {c.tensor: c for c in parity.run(small)}
    assert all(c.passed for c in [*checks.values(), *parity.run(thin)])
    assert set(checks) >= {"tiling", "images_shape", "input_ids", "image_input_idx", "image_masks", "sample_value"}
    # What should be refused and is not, and the other way round.
    parity.preproc[small][1]["error"] = "refused"
    del parity.preproc[thin][1]["error"]
    assert [c.passed for name in (small, thin) for c in parity.run(name)] == [False, False]
    del parity.preproc[small][1]["error"]
    parity._preproc_tensors["00/sample_value"][1] += 1e-4
    parity._preproc_tensors["00/input_ids"][3] += 1
    assert {c.tensor for c in parity.run(small) if not c.passed} == {"input_ids", "sample_value"}
    (folder / "images" / "small.png").unlink()
    with pytest.raises(CheckpointError, match=r"small\.png"):
        parity.run(small)


# Judging


def test_an_element_passes_within_both_tolerances() -> None:
    reference, tolerance = torch.tensor([0.0, 100.0]), Tolerance(1e-3, 1e-4)
    assert compare("c", "t", reference + torch.tensor([0.9e-3, 1.05e-2]), reference, tolerance).passed
    assert not compare("c", "t", reference + torch.tensor([1.1e-3, 0.0]), reference, tolerance).passed
    assert not compare("c", "t", reference + torch.tensor([0.0, 1.2e-2]), reference, tolerance).passed
    for wrong in (torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf, 100.0]), torch.zeros(2, 1), torch.zeros(3)):
        check = compare("c", "t", wrong, reference, tolerance)
        assert not check.passed
        assert check.max_abs_error == float("inf")
        assert json.loads(json.dumps(summary([check]), allow_nan=False))["worst"]["max_abs_error"] is None
    exact = Tolerance(0.0)
    assert compare("c", "t", torch.tensor([1, 2]), torch.tensor([1, 2]), exact).passed
    assert not compare("c", "t", torch.tensor([1, 2]), torch.tensor([1, 3]), exact).passed


def test_a_greedy_token_may_differ_only_where_the_best_two_nearly_tie() -> None:
    logits = torch.tensor([[[1.0, 0.999, 0.0], [1.0, 0.9, 0.0], [1.0, 0.0, 0.999]]])
    ids = logits.argmax(-1)
    assert unaccepted_steps(ids, logits, torch.tensor([[1, 0, 2]]), may_tie=True).sum() == 0
    assert unaccepted_steps(ids, logits, torch.tensor([[1, 1, 1]]), may_tie=True).tolist() == [[0, 1, 1]]
    assert unaccepted_steps(ids, logits, torch.tensor([[1, 0, 0]]), may_tie=False).tolist() == [[1, 0, 0]]


def test_steps_after_an_accepted_tie_are_still_compared(own_folder: Path) -> None:
    parity = ParityFolder(own_folder)
    reference = parity.tensors["img_one/out/greedy_ids"]
    inputs = parity.inputs("img_one")
    changed = reference.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    ids, _ = decode_greedily(parity.model, inputs, 6, follow=changed)
    assert torch.equal(ids[:, :3], reference[:, :3])
    continued = {name: tensor.clone() for name, tensor in inputs.items()}
    continued["input_ids"] = torch.cat([inputs["input_ids"], changed[:, :3]], 1)
    continued["attention_mask"] = torch.ones_like(continued["input_ids"])
    assert torch.equal(decode_greedily(parity.model, continued, 1)[0][0, 0], ids[0, 3])


# Folders that cannot be used


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def one_more_block(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layers": 6}))


def test_a_missing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("cases.json"), r"cases\.json"),
        (remove("config.json"), r"config\.json"),
        (remove("cases.safetensors"), r"cases\.safetensors"),
        (remove("model.safetensors"), "no loadable"),
        (cut("cases.safetensors"), r"cases\.safetensors"),
        (cut("model.safetensors"), "no loadable"),
        (write("cases.json", "[]"), "no JSON object"),
        (write("cases.json", "{"), "JSON"),
        (write("cases.json", "{}"), "no cases"),
        (write("cases.json", '{"cases": {"img_two": {}}}'), "img_two"),
        (write("config.json", '{"model_type": "llama"}'), "llama"),
        (one_more_block, "do not belong"),
    ],
)
def test_an_unusable_folder_is_refused(
    own_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(own_folder, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        misses(ParityFolder(folder))
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("parity: ")


def test_the_script_fails_on_a_miss(own_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(own_folder, tmp_path / "missed")
    tensors = load_file(folder / "cases.safetensors")
    tensors["text_rpad_b2/out/logits"][0, 0, 0] += 1.0
    save_file(tensors, folder / "cases.safetensors")
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "parity"), str(folder)], capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.endswith("MISS") for line in lines) == 1
    verdict = json.loads(lines[-1])
    assert (verdict["failed"], verdict["worst"]["tensor"], verdict["worst"]["ok"]) == (1, "logits", False)
    assert verdict["worst"]["max_abs_error"] == pytest.approx(1.0, abs=1e-3)
