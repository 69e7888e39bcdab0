"""The published benchmarks that have short names: where they are, which columns hold what, and how they are asked.

Prefixes and the format of options are those that Molmo was trained with (github.com/allenai/molmo at 793fa38,
`olmo/data/data_formatter.py`), the metrics and the 12 tokens of an answer those of its evaluation
(`launch_scripts/utils.py`); it was not trained on POPE, whose questions are asked as those of VQAv2.

Repositories are those that hold parquet files: what a repository's own script makes (`facebook/textvqa`,
`HuggingFaceM4/VQAv2`) is no longer read by the `datasets` library. `lmms-lab/VQAv2` and `lmms-lab/DocVQA` offer no
training split. Where the answers of a test split are withheld (VQAv2, TextVQA, DocVQA), the validation split is the
test part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pacevlm.dataset_list import DatasetEntry


@dataclass(frozen=True)
class Origin:
    """One split of a data set, as the `datasets` library names it.

    Attributes:
        repository: `owner/name` on the Hugging Face hub, or a local folder.
        split: of the data set.
        configuration: of the data set; None where it has one.
    """

    repository: str
    split: str
    configuration: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A published data set.

    Attributes:
        name: its short name.
        parts: where each part comes from. What has no split of its own is set aside from `train`.
        fields: columns by what they stand for; see `DataConfig.fields`.
        style: what stands in front of every question, with a colon.
        metric: scores its answers.
        max_new_tokens: most tokens of an answer.
    """

    name: str
    parts: Mapping[str, Origin]
    fields: Mapping[str, str]
    style: str
    metric: str
    max_new_tokens: int = 12


def _parts(repository: str, configuration: str | None = None, **splits: str) -> dict[str, Origin]:
    return {part: Origin(repository, split, configuration) for part, split in splits.items()}


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "vqa2",
            _parts("Multimodal-Fatima/VQAv2_train", train="train") | _parts("lmms-lab/VQAv2", test="validation"),
            {
                "image": "image",
                "question": "question",
                "answer": "answers",
                "id": "question_id",
                "answer_type": "answer_type",
            },
            "vqa2",
            "vqa",
        ),
        Benchmark(
            "textvqa",
            _parts("lmms-lab/textvqa", train="train", test="validation"),
            {"image": "image", "question": "question", "answer": "answers", "id": "question_id"},
            "text_vqa",
            "vqa",
        ),
        Benchmark(
            "docvqa",
            _parts("HuggingFaceM4/DocumentVQA", train="train", test="validation"),
            {"image": "image", "question": "question", "answer": "answers", "id": "questionId"},
            "doc_qa",
            "anls",
        ),
        Benchmark(
            "chartqa",
            _parts("HuggingFaceM4/ChartQA", train="train", val="val", test="test"),
            {"image": "image", "question": "query", "answer": "label", "author": "human_or_machine"},
            "chart_qa",
            "relaxed",
        ),
        Benchmark(
            "scienceqa",
            _parts("lmms-lab/ScienceQA", "ScienceQA-IMG", train="train", val="validation", test="test"),
            {
                "image": "image",
                "question": "question",
                "answer": "answer",
                "choices": "choices",
                "context": "hint",
                "subject": "subject",
            },
            "science_qa",
            "multiple_choice",
        ),
        Benchmark(
            "pope",
            _parts("lmms-lab/POPE", train="test"),
            {"image": "image", "question": "question", "answer": "answer", "id": "id", "category": "category"},
            "vqa2",
            "yes_no",
        ),
    )
}


def max_new_tokens(entries: Sequence[DatasetEntry]) -> int | None:
    """Most tokens that an answer to any benchmark among the data sets may have; None if there is none."""
    return max((BENCHMARKS[entry.benchmark].max_new_tokens for entry in entries if entry.benchmark), default=None)
