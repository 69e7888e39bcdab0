"""Small stand-ins for the published benchmarks: their true columns, splits and answers, about scenes of digits.

They are what `huggingface-cli download --local-dir` leaves: parquet files, and a README.md with configurations and
splits. `python tests/stand_ins.py FOLDER` writes all of them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pacevlm.data.digits import COLOUR_NAMES, Question, Scene, SceneConfig, sample_scene, valid_questions

Row = dict[str, Any]
SCENES = SceneConfig(min_digits=2, max_digits=4, min_height_px=20)


def _png(scene: Scene) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(scene.image).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _ten(rng: np.random.Generator, answer: str) -> list[str]:
    """Ten people's answers, of whom seven or more agree."""
    agree = int(rng.integers(7, 11))
    return [answer] * agree + ["unanswerable"] * (10 - agree)


def _records(answers: list[str]) -> list[Row]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(answers)]


def _vqa2(rng: np.random.Generator, number: int, question: Question, split: str) -> Row:
    answers, is_train = _ten(rng, question.answer), split == "train"
    row = {
        "question_type": question.text.split()[0].lower(),
        "multiple_choice_answer": question.answer,
        "answers": answers if is_train else _records(answers),
        "answer_type": "number" if question.answer.isdigit() else "other",
        "question_id": 262148000 + number,
        "question": question.text,
    }
    # The training split is of another repository, whose columns differ.
    return row | (
        {"answers_original": _records(answers), "id_image": number // 2} if is_train else {"image_id": number}
    )


def _textvqa(rng: np.random.Generator, number: int, question: Question, split: str) -> Row:
    return {
        "image_id": f"{number // 2:016x}",
        "question_id": 34602 + number,
        "question": question.text,
        "question_tokens": question.text.lower().split(),
        "image_width": 1024,
        "image_height": 768,
        "flickr_original_url": "https://farm4.staticflickr.com/o.jpg",
        "flickr_300k_url": "https://c3.staticflickr.com/z.jpg",
        "answers": [""] * 10 if split == "test" else _ten(rng, question.answer),
        "image_classes": ["Poster"],
        "set_name": split,
        "ocr_tokens": question.answer.split(),
    }


def _docvqa(rng: np.random.Generator, number: int, question: Question, split: str) -> Row:
    return {
        "questionId": 49153 + number,
        "question": question.text,
        "question_types": None if split == "test" else ["handwritten"],
        "docId": number // 2,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "1",
        "answers": None if split == "test" else [question.answer, question.answer.replace(" ", ", ")],
    }


def _chartqa(rng: np.random.Generator, number: int, question: Question, split: str) -> Row:
    return {"query": question.text, "label": [question.answer], "human_or_machine": int(number % 3 > 0)}


def _scienceqa(rng: np.random.Generator, number: int, question: Question, split: str) -> Row:
    others = [colour for colour in COLOUR_NAMES if colour != question.answer]
    choices = [question.answer, *rng.permutation(others)[:2].tolist()]
    choices = [choices[i] for i in rng.permutation(3)]
    return {
        "question": question.text,
        "choices": choices,
        "answer": choices.index(question.answer),
        "hint": "The picture shows digits." if number % 2 else "",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "physics",
        "category": "Light",
        "skill": "Name colours",
        "lecture": "",
        "solution": "",
    }


def _pope(rng: np.random.Generator, number: int, question: Question, split: str) -> Row:
    colour = question.text.split()[2]
    return {
        "id": str(number),
        "question_id": str(number % 3 + 1),
        "question": f"Is there a {colour} digit in the image?",
        "answer": "no" if question.answer == "0" else "yes",
        "image_source": f"COCO_val2014_{number // 2:012d}",
        "category": ("adversarial", "popular", "random")[number % 3],
    }


# What each asks, how a question becomes a row, and its folders: each with its configuration and splits.
BENCHMARKS: dict[str, tuple[tuple[str, ...], Callable[..., Row], dict[str, tuple[str, tuple[str, ...]]]]] = {
    "vqa2": (
        ("colour_of_digit", "count"),
        _vqa2,
        {"VQAv2_train": ("default", ("train",)), "VQAv2": ("default", ("validation", "testdev"))},
    ),
    "textvqa": (("digit_of_colour", "read"), _textvqa, {"": ("default", ("train", "validation", "test"))}),
    "docvqa": (("read", "largest"), _docvqa, {"": ("default", ("train", "validation", "test"))}),
    "chartqa": (("difference", "product"), _chartqa, {"": ("default", ("train", "val", "test"))}),
    "scienceqa": (("colour_of_digit",), _scienceqa, {"": ("ScienceQA-IMG", ("train", "validation", "test"))}),
    "pope": (("count_colour",), _pope, {"": ("default", ("test",))}),
}


def _features(rows: list[Row]) -> Any:
    """The types of a benchmark's columns, as its card gives them."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Picture

    found = Dataset.from_list([{k: v for k, v in row.items() if k != "image"} for row in rows]).features
    special = {
        "human_or_machine": ClassLabel(names=["human", "machine"]),
        "questionId": Value("int32"),
        "answer": Value("int8") if "choices" in rows[0] else Value("string"),
    }
    return Features({"image": Picture()} | {name: special.get(name, kind) for name, kind in found.items()})


def rows_of(name: str, split: str, number: int, seed: int) -> Iterator[Row]:
    """Rows of one split, up to two about each picture; splits share no picture."""
    families, make, _ = BENCHMARKS[name]
    part = {"train": "train", "val": "val", "validation": "val"}.get(split, "test")
    rng = np.random.default_rng([seed, sorted(BENCHMARKS).index(name), len(split)])
    made = 0
    while made < number:
        scene = sample_scene(rng, part, SCENES)
        asked = [question for question in valid_questions(scene, rng) if question.family in families]
        for question in asked[: number - made]:
            yield {"image": _png(scene)} | make(rng, 1000 * len(split) + made, question, split)
            made += 1


def write_stand_in(folder: Path, name: str, number: int = 60, seed: int = 0) -> str:
    """Write one benchmark with a number of rows in each split; returns what `--data.dataset` is given."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    for inside, (configuration, splits) in BENCHMARKS[name][2].items():
        home = folder / name / inside
        lines = ["---", "configs:", f"- config_name: {configuration}", "  data_files:"]
        for split in splits:
            rows = list(rows_of(name, split, number, seed))
            if split == "testdev":
                rows = [row | {"answers": None} for row in rows]
            (home / "data").mkdir(parents=True, exist_ok=True)
            path = f"data/{split}-00000-of-00001.parquet"
            Dataset.from_list(rows, features=_features(rows)).to_parquet(str(home / path), batch_size=16)
            lines += [f"  - split: {split}", f"    path: data/{split}-*"]
        (home / "README.md").write_text("\n".join([*lines, "---", ""]))
    return f"{name}={folder / name}"


if __name__ == "__main__":
    for each in BENCHMARKS:
        print(write_stand_in(Path(sys.argv[1]), each, int(sys.argv[2]) if len(sys.argv) > 2 else 60))
