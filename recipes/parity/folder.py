"""Parity with reference tensors: runs every case of a fixture folder and compares all that the folder stores.

A folder holds `config.json` and `model.safetensors` (a checkpoint), `cases.json` and `cases.safetensors` (inputs and
reference outputs) and, if it likes, `preproc.json`, `preproc.safetensors` and `images/` (image processing at the sizes
of the published model). Every size comes from these files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from pacevlm.errors import CheckpointError, ImageError, PacevlmError
from pacevlm.files import load_safetensors, read_json
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.image_processing import prepare_image
from pacevlm.models.molmoe.processing import PreparedRequest, SpecialTokenIds, assemble_request, collate_requests
from pacevlm.models.molmoe.tiling import CropGeometry
from pacevlm.models.molmoe.vision import VisionBackbone
from pacevlm.types import VisionSizes
from recipes.parity.checks import Check, Tolerance, compare, summary, table
from recipes.parity.greedy import decode_greedily, last_positions

IMAGE_INPUTS = ("images", "image_masks", "image_input_idx")
TIE_GAP = 2e-3
"""Two logits this close may swap their order between implementations."""
ROUTER_TIE = 1e-6
"""Two router probabilities this close may swap their order between implementations."""


EXACT = Tolerance(0.0)
PIXELS = Tolerance(1e-5)
FEATURES = Tolerance(1e-4)
HIDDEN_STATES = Tolerance(2e-3)
TEXT_LOGITS = Tolerance(2e-4, 1e-4)
IMAGE_LOGITS = Tolerance(1e-3, 1e-4)
# Tensors without a tolerance of their own: input embeddings are exact rows plus features, the final norm and the router
# logits are made from hidden states.


def unaccepted_steps(ids: Tensor, logits: Tensor, reference: Tensor, may_tie: bool) -> Tensor:
    """Steps whose greedy token is not the reference's.

    Args:
        ids: `(batch, steps)`, chosen after the reference's own earlier tokens.
        logits: `(batch, steps, embedding_size)`.
        reference: `(batch, steps)`.
        may_tie: whether a token whose logit is within `TIE_GAP` of the best is as good.

    Returns:
        `(batch, steps)`, 1.0 where the tokens differ and that is not accepted.
    """
    gap = logits.max(-1).values - logits.gather(-1, reference[..., None])[..., 0]
    return ((ids != reference) & ~((gap <= TIE_GAP) & may_tie)).double()


def geometry_of(config: MolmoEConfig, stored: dict[str, Any]) -> CropGeometry:
    """Crop geometry of a model, with what a fixture file says of it first."""
    vision = config.vision_backbone
    size = stored.get("base_image_input_size", vision["image_default_input_size"])[0]
    before, behind = stored.get("overlap_margins", config.overlap_margins)
    patch_size = stored.get("image_patch_size", vision["image_patch_size"])
    return CropGeometry(size, patch_size, (before, behind), config.image_pooling_h)


class ParityFolder:
    """The cases of one fixture folder and the model in it.

    Raises:
        CheckpointError: the folder or a file in it is missing, damaged or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no fixture folder {folder}; give one with config.json and cases.json")
        self._cases_file = self._read_json("cases.json")
        self.cases: dict[str, dict[str, Any]] = self._cases_file.get("cases", {})
        self._preproc_file = self._read_json("preproc.json") if (self.folder / "preproc.json").exists() else {}
        self.preproc = {
            f"preproc/{number:02d}-{case.get('image', '?')}": (number, case)
            for number, case in enumerate(self._preproc_file.get("cases", []))
        }
        if not self.cases:
            raise CheckpointError(f"{self.folder / 'cases.json'} holds no cases; it is damaged or of another format")

    def _read_json(self, name: str) -> dict[str, Any]:
        value = read_json(self.folder / name, "fixture file", CheckpointError)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.folder / name} holds no JSON object; it is of another format")
        return value

    @property
    def names(self) -> list[str]:
        """Names of all cases, those of the model first; none of the tensors are read for them."""
        return [*self.cases, *self.preproc]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in `cases.safetensors`."""
        return load_safetensors(self.folder / "cases.safetensors")

    @cached_property
    def model(self) -> MolmoEForConditionalGeneration:
        """The folder's model, float32, ready for inference."""
        config = self._read_json("config.json")
        if config.get("model_type") != MolmoEConfig.model_type:
            raise CheckpointError(f"{self.folder} describes a {config.get('model_type')!r} model, not MolmoE")
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            loaded: Any = MolmoEForConditionalGeneration.from_pretrained(
                self.folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
        except Exception as error:  # a damaged file raises whatever its reader does
            raise CheckpointError(f"{self.folder} holds no loadable MolmoE checkpoint: {error}") from error
        finally:
            if bar:
                logging.enable_progress_bar()
        model, info = cast(tuple[MolmoEForConditionalGeneration, dict[str, Any]], loaded)
        wrong = {
            key: sorted(info[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]
        }
        if wrong:
            raise CheckpointError(f"the weights in {self.folder} do not belong to its config.json: {wrong}")
        return model

    @torch.no_grad()
    def run(self, name: str) -> list[Check]:
        """Run one case and compare everything that is stored for it; raises CheckpointError."""
        try:
            return list(self._preproc_checks(name) if name in self.preproc else self._model_checks(name))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"case {name} in {self.folder} lacks or misnames something: {error!r}") from error

    def not_compared(self, name: str, checks: Sequence[Check]) -> list[str]:
        """Reference tensors of a model case that none of its checks used."""
        known = {check.tensor for check in checks}
        stored = [
            key.removeprefix(f"{name}/").removeprefix("out/") for key in self.tensors if key.startswith(f"{name}/")
        ]
        return [key for key in stored if not key.startswith("in/") and key not in known]

    def router_may_tie(self, name: str) -> bool:
        """Whether two router probabilities of a case are so close that one expert choice may differ without a bug."""
        case = self.cases.get(name, {})
        margins = [part.get("min_router_margin", 1.0) for part in (case, *case.get("variants", {}).values())]
        return bool(min(margins) < ROUTER_TIE)

    def _stored(self, case: str, name: str) -> Tensor | None:
        return self.tensors.get(f"{case}/{name}")

    def inputs(self, name: str) -> dict[str, Tensor]:
        """Model inputs of a case, with an attention mask; a batch stored without its crops is collated."""
        inputs = {key: self._stored(name, f"in/{key}") for key in ("input_ids", "attention_mask", *IMAGE_INPUTS)}
        given = {key: value for key, value in inputs.items() if value is not None}
        if "image_masks" in given and "images" not in given:
            given["images"] = collate_requests(self._rows(name))["images"]
        given.setdefault("attention_mask", (given["input_ids"] != -1).long())
        return given

    def _rows(self, name: str) -> list[PreparedRequest]:
        """The single requests that a collated batch was made of, recognised by their tokens."""
        singles = [c for c in self.cases if f"{c}/in/images" in self.tensors and f"{c}/in/input_ids" in self.tensors]
        rows = []
        for row in self.tensors[f"{name}/in/input_ids"]:
            ids = row[row != -1]
            same = [c for c in singles if torch.equal(self.tensors[f"{c}/in/input_ids"], ids[None])]
            if not same:
                raise CheckpointError(f"case {name} stores no images, and no other case has the tokens of its rows")
            images, masks, places = (self.tensors[f"{same[0]}/in/{key}"][0] for key in IMAGE_INPUTS)
            rows.append(self._request(ids, images, masks, places))
        return rows

    @staticmethod
    def _request(ids: Tensor, images: Tensor, masks: Tensor, places: Tensor) -> PreparedRequest:
        return PreparedRequest(ids, images, masks, places, 0, VisionSizes(images.shape[0], 0))

    def _model_checks(self, name: str) -> Iterator[Check]:
        if not any(key.startswith(f"{name}/in/") for key in self.tensors):
            raise CheckpointError(f"cases.json names the case {name}, but cases.safetensors holds no inputs of it")
        if self._stored(name, "in/input_ids") is None:
            yield from self._padding_rule_checks(name)
            return
        yield from self._processor_checks(name)
        inputs = self.inputs(name)
        logit_tolerance = IMAGE_LOGITS if "images" in inputs else TEXT_LOGITS
        yield from self._vision_checks(name, inputs)
        yield from self._decoder_checks(name, inputs, logit_tolerance)
        case = self.cases[name]
        greedy = self._stored(name, "out/greedy_ids")
        if greedy is None and "greedy_ids" in case:
            greedy = torch.tensor(case["greedy_ids"])
        if greedy is not None:
            logits = self._stored(name, "out/greedy_logits")
            yield from self._greedy_checks(name, "", inputs, greedy, logits, case, logit_tolerance, {})
        for variant, facts in case.get("variants", {}).items():
            knobs = {key: facts[key] for key in ("top_k_per_block", "removed_blocks") if key in facts}
            out = self.model(**inputs, use_cache=False, output_hidden_states=True, **knobs)
            final_norm = self.model.model.transformer.ln_f(out.hidden_states[-1])
            mask = inputs["attention_mask"].bool()
            for key, ours, tolerance in (
                ("final_norm", final_norm, HIDDEN_STATES),
                ("logits", out.logits, logit_tolerance),
            ):
                reference = self._stored(name, f"{variant}/{key}")
                if reference is not None:
                    yield compare(name, f"{variant}/{key}", ours[mask], reference[mask], tolerance)
            if "greedy_ids" in facts:
                greedy = torch.tensor(facts["greedy_ids"])
                logits = self._stored(name, f"{variant}/greedy_logits")
                place = f"{variant}/"
                yield from self._greedy_checks(name, place, inputs, greedy, logits, facts, logit_tolerance, knobs)

    def _vision_checks(self, name: str, inputs: dict[str, Tensor]) -> Iterator[Check]:
        reference = self._stored(name, "out/vit_features")
        if reference is not None:
            images = inputs["images"]
            features = self.model.model.vision_backbone.vit_features(images.flatten(0, 1))
            yield compare(name, "vit_features", features.unflatten(0, images.shape[:2]), reference, FEATURES)
        reference = self._stored(name, "out/image_features")
        if reference is not None:
            features = self.model.model.image_features(inputs["images"], inputs["image_masks"])
            yield compare(name, "image_features", features, reference, FEATURES)

    def _decoder_checks(self, name: str, inputs: dict[str, Tensor], logit_tolerance: Tolerance) -> Iterator[Check]:
        out = self.model(**inputs, use_cache=False, output_hidden_states=True, output_router_logits=True)
        mask = inputs["attention_mask"].bool()
        ours = {f"hidden_{index}": (state, HIDDEN_STATES) for index, state in enumerate(out.hidden_states[1:])}
        ours["inputs_embeds"] = (out.hidden_states[0], FEATURES)
        ours["final_norm"] = (self.model.model.transformer.ln_f(out.hidden_states[-1]), HIDDEN_STATES)
        ours["logits"] = (out.logits, logit_tolerance)
        # (blocks, batch, tokens, experts), with the tokens in front like everything else
        ours["router_logits"] = (torch.stack(out.router_logits).permute(1, 2, 0, 3), HIDDEN_STATES)
        for key, (tensor, tolerance) in ours.items():
            reference = self._stored(name, f"out/{key}")
            if reference is not None:
                reference = reference.permute(1, 2, 0, 3) if key == "router_logits" else reference
                yield compare(name, key, tensor[mask], reference[mask], tolerance)

    def _greedy_checks(
        self,
        name: str,
        place: str,
        inputs: dict[str, Tensor],
        reference: Tensor,
        reference_logits: Tensor | None,
        facts: dict[str, Any],
        logit_tolerance: Tolerance,
        knobs: dict[str, Any],
    ) -> Iterator[Check]:
        # Every step continues from the reference's tokens, so that an accepted tie leaves the later steps comparable.
        num_steps = reference.shape[1]
        ids, logits = decode_greedily(self.model, inputs, num_steps, follow=reference, **knobs)
        may_tie = facts.get("greedy_min_top2_gap", 0.0) <= TIE_GAP
        missed = unaccepted_steps(ids, logits, reference, may_tie)
        yield compare(name, f"{place}greedy_ids", missed, torch.zeros_like(missed), EXACT)
        if reference_logits is not None:
            yield compare(name, f"{place}greedy_logits", logits, reference_logits, logit_tolerance)
        mask = inputs["attention_mask"]
        whole = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], reference[:, :-1]], dim=1),
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), num_steps - 1)], dim=1),
        }
        at_once = self.model(**whole, use_cache=False, **knobs).logits
        first = at_once[torch.arange(len(mask)), last_positions(mask)][:, None]
        uncached = torch.cat([first, at_once[:, mask.shape[1] :]], dim=1)
        yield compare(name, f"{place}greedy_logits (cached = uncached)", logits, uncached, logit_tolerance)

    def _padding_rule_checks(self, name: str) -> Iterator[Check]:
        """The input on which the two rules for padding crops differ: another case with one patch replaced."""
        patch = self.tensors[f"{name}/in/images"]
        bases = [c for c in self.cases if (x := self._stored(c, "in/images")) is not None and x.dim() == 4]
        # It was made from the case that has nearly this patch somewhere.
        matches = {c: (self.tensors[f"{c}/in/images"] == patch).sum(-1) for c in bases}
        base = max(matches, key=lambda c: int(matches[c].max()), default="")
        if not base or int(matches[base].max()) <= len(patch) // 2:
            raise CheckpointError(f"no case of {self.folder} has the images that {name} was made from")
        place = np.unravel_index(int(matches[base].argmax()), matches[base].shape)
        row, crop, index = (int(axis) for axis in place)
        images = self.tensors[f"{base}/in/images"].clone()
        masks = self.tensors[f"{base}/in/image_masks"]
        images[row, crop, index] = patch
        for rule, origin in (("all", "training"), ("any", "hf")):
            reference = self._stored(name, f"out/image_features_{origin}")
            if reference is None:
                continue
            settings = self.model.config.to_dict() | {"padding_crop_rule": rule}
            backbone = VisionBackbone(MolmoEConfig(**settings))
            backbone.load_state_dict(self.model.model.vision_backbone.state_dict())
            features = backbone(images[row], masks[row])[crop]
            yield compare(name, f"image_features_{origin}", features, reference.squeeze(0), FEATURES)

    def _special_tokens(self, stored: dict[str, Any]) -> SpecialTokenIds:
        ids = stored["special_tokens"]
        names = ("start", "end", "patch", "col")
        return SpecialTokenIds(ids["bos"], *(ids[key] if key in ids else ids[f"im_{key}"] for key in names))

    def _processor_checks(self, name: str) -> Iterator[Check]:
        pixels, prompt = self._stored(name, "in/image_uint8"), self._stored(name, "in/prompt_token_ids")
        if pixels is not None and prompt is not None:
            geometry = geometry_of(cast(MolmoEConfig, self.model.config), self._cases_file.get("geometry", {}))
            max_crops = self.cases[name].get("max_crops", self.model.config.max_crops)
            prepared = prepare_image(pixels.numpy(), max_crops, geometry)
            requests = [assemble_request([], prompt.tolist(), prepared, self._special_tokens(self._cases_file))]
        elif self._stored(name, "in/image_masks") is not None and self._stored(name, "in/images") is None:
            requests = self._rows(name)
        else:
            return
        batch = collate_requests(requests)
        for key in ("input_ids", *IMAGE_INPUTS):
            reference = self._stored(name, f"in/{key}")
            if reference is not None:
                yield compare(name, f"in/{key}", batch[key], reference, PIXELS if key == "images" else EXACT)

    @cached_property
    def _preproc_tensors(self) -> dict[str, Tensor]:
        return load_safetensors(self.folder / "preproc.safetensors")

    def _preproc_checks(self, name: str) -> Iterator[Check]:
        number, case = self.preproc[name]
        number = case.get("case", number)
        path = self.folder / "images" / f"{case['image']}.png"
        # As the reference reads them: it drops transparency, which `load_image` composes on a background.
        try:
            with Image.open(path, formats=["PNG"]) as file:
                pixels = np.array(file.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise CheckpointError(f"case {name}: {path} cannot be read: {error}") from error
        # Stored at the published model's sizes, which are the defaults.
        geometry = CropGeometry()
        try:
            prepared = prepare_image(pixels, case["max_crops"], geometry)
        except ImageError:
            error_size = 0.0 if "error" in case else math.inf
            yield Check(name, "refused", error_size, EXACT, error_size)
            return
        if "error" in case:
            yield Check(name, "refused", math.inf, EXACT, math.inf)
            return
        request = assemble_request([], case["prompt_token_ids"], prepared, self._special_tokens(self._preproc_file))
        images = prepared.images
        ours = {
            "input_ids": (request.input_ids, EXACT),
            "image_input_idx": (prepared.image_input_idx, EXACT),
            "image_masks": (prepared.image_masks, EXACT),
            "patch_mean": (images.mean(-1), PIXELS),
        }
        yield compare(name, "tiling", torch.tensor(prepared.tiling), torch.tensor(case["tiling"]), EXACT)
        if "images_shape" in case:
            yield compare(name, "images_shape", torch.tensor(images.shape), torch.tensor(case["images_shape"]), EXACT)
        for key, (tensor, tolerance) in ours.items():
            reference = self._preproc_tensors.get(f"{number:02d}/{key}")
            if reference is not None:
                yield compare(name, key, tensor, reference, tolerance)
        index = self._preproc_tensors.get(f"{number:02d}/sample_index")
        if index is not None:
            values = self._preproc_tensors[f"{number:02d}/sample_value"]
            fits = int(index.max()) < images.numel()
            sample = images.flatten()[index.long()] if fits else images.new_full(values.shape, math.nan)
            yield compare(name, "sample_value", sample, values, PIXELS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: run a folder, print a table and, as the last line, a JSON summary.

    Returns:
        0 if everything is within tolerance, 1 if not, 2 if the folder cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="parity", description="Compare MolmoE with the reference tensors of a folder."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with config.json, model.safetensors, cases.*")
    checks: list[Check] = []
    notes: list[str] = []
    try:
        folder = ParityFolder(parser.parse_args(arguments).folder)
        for name in folder.names:
            case_checks = folder.run(name)
            checks.extend(case_checks)
            if name in folder.cases:
                notes += [f"{name}: {tensor} was not compared" for tensor in folder.not_compared(name, case_checks)]
            if folder.router_may_tie(name) and not all(check.passed for check in case_checks):
                notes.append(f"{name}: two router probabilities nearly tie; one expert choice may differ without a bug")
    except PacevlmError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    print(table(checks))
    for note in notes:
        print(note)
    result = summary(checks)
    print(json.dumps(result))
    return 1 if result["failed"] else 0
