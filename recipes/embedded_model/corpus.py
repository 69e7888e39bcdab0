"""Training material of the embedded model: scenes as crops, with all their questions packed behind one image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pacevlm.data.digits import COLOUR_NAMES, Question, Scene, SceneConfig, sample_scene, valid_questions
from pacevlm.data.elements import element_questions, sample_number
from pacevlm.models.molmoe.image_processing import PreparedImage, prepare_image
from pacevlm.models.molmoe.processing import PROMPT_PREFIX, PROMPT_SUFFIX, MolmoEProcessor
from pacevlm.models.molmoe.tiling import CropGeometry
from pacevlm.models.molmoe.tokenization import build_tokenizer
from recipes.embedded_model.labels import CellLabels, cell_labels
from recipes.embedded_model.sizes import CROP_PX, MARGINS, MAX_VOCAB_SIZE, PATCH_PX

GEOMETRY = CropGeometry(crop_size=CROP_PX, patch_size=PATCH_PX, margins=MARGINS)
IMAGE_SEGMENT = 1 << 20


def build_embedded_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's tokenizer, learned from the wording of the digit questions and their answers."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(2000):
        questions = valid_questions(sample_scene(rng, "train", SceneConfig()), rng)
        texts += [PROMPT_PREFIX + question.text + PROMPT_SUFFIX + " " + question.answer for question in questions]
    texts.extend(f" {name}" for name in COLOUR_NAMES)
    return build_tokenizer(texts, MAX_VOCAB_SIZE)


@dataclass(frozen=True)
class Sample:
    """One scene cut for a tier, with dense labels and questions."""

    image: PreparedImage
    labels: CellLabels
    questions: list[Question]


def draw_sample(
    rng: np.random.Generator, config: SceneConfig, max_crops: int, split: str = "train", as_number: bool = False
) -> Sample:
    """Compose one scene, cut it for `max_crops` and ask everything that can be asked.

    Args:
        rng: what is drawn from.
        config: ranges of the scene.
        max_crops: the tier.
        split: whose scans are shown.
        as_number: show an atomic number, and ask for its digits and its element.
    """
    scene: Scene = sample_number(rng, split, config) if as_number else sample_scene(rng, split, config)
    prepared = prepare_image(scene.image, max_crops, GEOMETRY)
    height, width = scene.image.shape[:2]
    labels = cell_labels(scene.digits, (height, width), prepared.tiling, GEOMETRY)
    questions = valid_questions(scene, rng)
    if as_number:
        read = [question for question in questions if question.family == "read"]
        questions = element_questions(scene.digits) + read
    return Sample(prepared, labels, questions)


@dataclass(frozen=True)
class PackedBatch:
    """Several questions behind each image; questions see the image and themselves only.

    Attributes:
        input_ids: `(batch, tokens)`, 0 where padded.
        position_ids: `(batch, tokens)`; every question continues from its image.
        mask: bool `(batch, 1, tokens, tokens)`.
        labels: `(batch, tokens)`, id to predict at each position, -100 elsewhere.
        question: `(batch, tokens)`, running number of the question at labelled positions, -1 elsewhere.
        families: the family of each question, by its number.
        images, image_masks: crops of all images one behind the other, `(crops, patches, ...)`.
        cell_rows, cell_places: flat index of each used cell among `(crops * cells)` and of its token among
            `(batch * tokens)`.
        cell_labels: dense labels of the used cells, each `(used,)`.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    labels: Tensor
    question: Tensor
    families: list[str]
    images: Tensor
    image_masks: Tensor
    cell_rows: Tensor
    cell_places: Tensor
    cell_labels: dict[str, Tensor]


class Packer:
    """Turns samples into packed batches with one processor's prompt format."""

    def __init__(self, processor: MolmoEProcessor) -> None:
        self.processor = processor
        self.eos = processor.special_token_ids.bos
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def pack(self, samples: list[Sample]) -> PackedBatch:
        """Lay out `samples` as one right-padded batch."""
        rows = []
        families: list[str] = []
        for sample in samples:
            image_ids = self.processor.special_token_ids.image_token_ids(sample.image.token_pattern).tolist()
            ids = [self.eos, *image_ids]
            positions = list(range(len(ids)))
            segments = [IMAGE_SEGMENT] * len(ids)
            labels = [-100] * len(ids)
            numbers = [-1] * len(ids)
            start = len(ids)
            for number, question in enumerate(sample.questions):
                prompt = self._encode(PROMPT_PREFIX + question.text + PROMPT_SUFFIX)
                answer = [*self._encode(" " + question.answer), self.eos]
                # The end-of-text id is only predicted, never fed.
                ids += prompt + answer[:-1]
                labels += [-100] * (len(prompt) - 1) + answer
                numbers += [-1] * (len(prompt) - 1) + [len(families)] * len(answer)
                families.append(question.family)
                positions += range(start, start + len(prompt) + len(answer) - 1)
                segments += [number + 1] * (len(prompt) + len(answer) - 1)
            rows.append((ids, positions, segments, labels, numbers))
        batch, tokens = len(rows), max(len(row[0]) for row in rows)

        def stack(column: int, fill: int) -> Tensor:
            out = torch.full((batch, tokens), fill, dtype=torch.long)
            for i, row in enumerate(rows):
                out[i, : len(row[column])] = torch.tensor(row[column])
            return out

        segment_ids = stack(2, 0)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) | (segment_ids[:, None, :] == IMAGE_SEGMENT)
        mask = (same & causal)[:, None]
        places, cells, offset = [], [], 0
        for i, sample in enumerate(samples):
            flat = sample.image.image_input_idx.reshape(-1)
            used = (flat >= 0).nonzero().squeeze(-1)
            places.append(flat[used] + i * tokens)
            cells.append(used + offset)
            offset += flat.numel()
        cell_rows = torch.cat(cells)
        fields = [field.name for field in dataclasses.fields(CellLabels)]
        dense = {
            name: torch.from_numpy(np.concatenate([getattr(s.labels, name).reshape(-1) for s in samples]))[cell_rows]
            for name in fields
        }
        return PackedBatch(
            input_ids=stack(0, 0),
            position_ids=stack(1, 0),
            mask=mask,
            labels=stack(3, -100),
            question=stack(4, -1),
            families=families,
            images=torch.cat([s.image.images for s in samples]),
            image_masks=torch.cat([s.image.image_masks for s in samples]),
            cell_rows=cell_rows,
            cell_places=torch.cat(places),
            cell_labels=dense,
        )


def draw_crops(
    rng: np.random.Generator, config: SceneConfig, num_crops: int, split: str = "train"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Whole small scenes as single crops, for the vision half alone: every crop is full of digits.

    Returns:
        `images` and `image_masks`, `(crops, patches, ...)`, and the labels of all cells, each `(crops * cells,)`.
    """
    samples = [draw_sample(rng, config, 1, split) for _ in range(num_crops)]
    fields = [field.name for field in dataclasses.fields(CellLabels)]
    labels = {name: torch.from_numpy(np.concatenate([getattr(s.labels, name)[0] for s in samples])) for name in fields}
    images = torch.stack([s.image.images[0] for s in samples])
    return images, torch.stack([s.image.image_masks[0] for s in samples]), labels
