"""One request end to end: what it reports, what ends it, and what it refuses."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import generate_with_logits
from PIL import Image

from pacevlm.errors import ConfigError, ImageError, KnobError, QuestionError
from pacevlm.knobs import Compute, Knobs, KnobSpace
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.run import run_forced
from pacevlm.request.stages import open_request
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Answer, Example, VisionSizes

QUESTION = "Which number is the largest?"
TINY_SPACE = KnobSpace(("low", "medium", "high"), (2, 3, 4), (3, 4, 5, 6))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def corner_knobs(space: KnobSpace) -> list[Knobs]:
    return [space.cheapest, space[len(space) // 2], space.full]


def test_a_request_reports_what_it_ran_and_its_stages_add_up(
    law_model: ElasticModel, law_examples: list[Example]
) -> None:
    for example, knobs in zip(law_examples, corner_knobs(law_model.knob_space), strict=False):
        result = run_forced(law_model, example.image, example.question, knobs)
        sizes = law_model.view(example.image, example.question).sizes
        vision = sizes.vision[law_model.knob_space.tiers.index(knobs.tier)]
        assert result.knobs == knobs
        assert (result.sizes, result.vision) == (sizes, vision)
        assert 1 <= result.num_output_tokens == len(result.token_ids) <= law_model.max_new_tokens
        assert result.answer == law_model.adapter.decode(result.token_ids)

        times = result.times
        stages = [times.prepare_ms, times.stage1_ms, times.vision_ms, times.first_block_ms, times.prefill_ms]
        assert len(times.decode_ms) == result.num_output_tokens - 1
        assert all(ms >= 0 for ms in (*stages, *times.decode_ms))
        detokenising_ms = times.e2e_ms - sum(stages) - sum(times.decode_ms)
        assert detokenising_ms >= -1e-6
        assert times.ttft_ms == pytest.approx(sum(stages) + detokenising_ms)


def test_a_request_answers_as_the_engine_does(law_model: ElasticModel, law_examples: list[Example]) -> None:
    jobs = [(example, knobs) for example in law_examples[:3] for knobs in corner_knobs(law_model.knob_space)]
    outcomes = RolloutEngine(law_model).run(jobs)
    for (example, knobs), outcome in zip(jobs, outcomes, strict=True):
        result = run_forced(law_model, example.image, example.question, knobs)
        assert (outcome.answer, outcome.num_output_tokens) == (result.answer, result.num_output_tokens)
        assert outcome.num_prompt_tokens == result.vision.num_image_tokens + result.sizes.num_text_tokens


def test_stages_see_what_they_may(law_model: ElasticModel, law_examples: list[Example]) -> None:
    example, space = law_examples[1], law_model.knob_space
    token = torch.randn(law_model.d_model, generator=torch.Generator().manual_seed(0))
    with open_request(law_model, example.image, example.question) as request:
        view, tier = request.view, space.tiers[-1]
        output = request.encode(tier, token)
        result = request.finish(Compute(space.top_ks[0], space.num_blocks[0]))
    assert output is not None
    assert view.sizes == law_model.view(example.image, example.question).sizes
    expected = RolloutEngine(law_model).latency_token_outputs([example], [tier], token[None])
    assert output.device == expected.device == law_model.adapter.device
    torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=1e-5)
    assert result.knobs == Knobs(space.tiers[-1], space.top_ks[0], space.num_blocks[0])


def test_the_budget_changes_no_answer(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [None, *(scale * torch.randn(tiny_elastic.d_model, generator=generator) for scale in (0.1, 1.0, 100.0))]
    for example, knobs in zip(law_examples, corner_knobs(tiny_elastic.knob_space), strict=False):
        answers = set()
        for token in tokens:
            with open_request(tiny_elastic, example.image, example.question) as request:
                request.encode(knobs.tier, token)
                answers.add(request.finish(knobs.compute).token_ids)
        assert len(answers) == 1


def test_outside_choices_are_refused(tiny_elastic: ElasticModel) -> None:
    image = picture(24, 24)

    def run(tier: str, compute: tuple[int, int]) -> None:
        with open_request(tiny_elastic, image, QUESTION) as request:
            request.encode(tier)
            request.finish(Compute(*compute))

    with pytest.raises(KnobError, match="huge"):
        run("huge", (4, 6))
    with pytest.raises(KnobError, match="top_k"):
        run("low", (5, 6))
    with pytest.raises(KnobError, match="num_blocks"):
        run("low", (4, 2))
    with pytest.raises(KnobError):
        run_forced(tiny_elastic, image, QUESTION, Knobs("low", 8, 16))


@pytest.mark.parametrize("limit", [1, 2])
def test_answers_can_be_cut(tiny_elastic: ElasticModel, limit: int) -> None:
    whole = run_forced(tiny_elastic, picture(24, 24), QUESTION, TINY_SPACE.full)
    cut = run_forced(tiny_elastic, picture(24, 24), QUESTION, TINY_SPACE.full, max_new_tokens=limit)
    assert cut.token_ids == whole.token_ids[:limit]
    assert len(cut.times.decode_ms) == limit - 1


def test_answers_can_be_made_any_length(tiny_elastic: ElasticModel) -> None:
    def run(num_output_tokens: int | None) -> Answer:
        with open_request(tiny_elastic, picture(24, 24), QUESTION, num_output_tokens=num_output_tokens) as request:
            request.encode("low")
            return request.finish(TINY_SPACE.full.compute)

    own = run(None)
    for length in (1, own.num_output_tokens, own.num_output_tokens + 3, 12):
        forced = run(length)
        assert forced.num_output_tokens == len(forced.token_ids) == length
        assert len(forced.times.decode_ms) == length - 1
        shared = min(length, own.num_output_tokens)
        assert forced.token_ids[:shared] == own.token_ids[:shared]
    with pytest.raises(ConfigError, match="num_output_tokens"):
        run(0)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_senseless_answer_length_is_refused(tiny_elastic: ElasticModel, limit: Any) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        run_forced(tiny_elastic, picture(24, 24), QUESTION, TINY_SPACE.full, max_new_tokens=limit)


# Bad and unusual input


@pytest.mark.parametrize("question", ["", "   \n\t ", "x" * 100_000, "word " * 20_000, "\ud800", None, 7, b"bytes"])
def test_unusable_questions_are_refused(tiny_elastic: ElasticModel, question: Any) -> None:
    with pytest.raises(QuestionError):
        run_forced(tiny_elastic, picture(24, 24), question, TINY_SPACE.full)
    with pytest.raises(QuestionError):
        tiny_elastic.view(picture(24, 24), question)


@pytest.mark.parametrize(
    "question", ["?", "¿Qué número? 数字 🙂", "\x00\x07", "<|endoftext|>", "<im_patch> 3", "a<|image|>b"]
)
def test_unusual_questions_are_answered(tiny_elastic: ElasticModel, question: str) -> None:
    image = picture(40, 40)
    result = run_forced(tiny_elastic, image, question, TINY_SPACE.full)
    outcome = RolloutEngine(tiny_elastic).run([(Example("q", image, question, ("",)), TINY_SPACE.full)])[0]
    assert (result.answer, result.num_output_tokens) == (outcome.answer, outcome.num_output_tokens)


def test_a_prompt_longer_than_the_model_is_refused_whatever_the_tier(
    tiny_elastic_dir: Path, tiny_elastic: ElasticModel
) -> None:
    question = "7" * 100
    with pytest.raises(QuestionError, match="256 positions"):
        run_forced(tiny_elastic, picture(90, 90), question, TINY_SPACE.cheapest, max_new_tokens=200)
    long_answers = ElasticModel.from_pretrained(tiny_elastic_dir, max_new_tokens=200)
    for run in (long_answers.view, lambda *request: run_forced(long_answers, *request, TINY_SPACE.cheapest)):
        with pytest.raises(QuestionError, match="256 positions"):
            run(picture(90, 90), question)
    assert long_answers.view(picture(90, 90), "7").sizes.num_text_tokens < 20


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@functools.cache
def bad_images() -> dict[str, Any]:
    png = encoded(picture(30, 30), "PNG")
    # The header of a file of a few bytes may claim any size: width and height, then a checksum.
    header = png[12:16] + struct.pack(">II", 30_000, 30_000) + png[24:29]
    return {
        "missing": "/nowhere/picture.png",
        "zero_bytes": b"",
        "text": b"this is no image",
        "truncated": png[: len(png) // 2],
        "corrupt": png[:60] + bytes(len(png) - 60),
        "huge": png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:],
        "elongated": Image.new("RGB", (4000, 1)),
        "no_side": np.zeros((0, 5, 3), np.uint8),
        "float": np.zeros((5, 5, 3), np.float32),
    }


@pytest.mark.parametrize("name", bad_images())
def test_unusable_images_are_refused(tiny_elastic: ElasticModel, name: str) -> None:
    with pytest.raises(ImageError, match="more than the 100,000,000" if name == "huge" else None):
        run_forced(tiny_elastic, bad_images()[name], QUESTION, TINY_SPACE.full)


def test_every_kind_of_file_gives_the_answer_of_its_pixels(tiny_elastic: ElasticModel, tmp_path: Path) -> None:
    image = picture(48, 40)
    grey = np.asarray(image.convert("L"))
    cases: list[tuple[Any, Image.Image]] = [
        (encoded(image, "PNG"), image),
        (np.asarray(image), image),
        (encoded(image, "GIF", save_all=True, append_images=[picture(48, 40, seed=1)]), None),
        (encoded(image, "WEBP", lossless=True), image),
        (image.convert("CMYK"), image.convert("CMYK").convert("RGB")),
        (encoded(image.convert("CMYK"), "JPEG"), None),
        (Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey).convert("RGB")),
        (Image.merge("RGBA", [*image.split(), Image.new("L", image.size, 255)]), image),
        (picture(1, 1), picture(1, 1)),
    ]
    path = tmp_path / "picture.png"
    image.save(path)
    cases.append((path, image))
    for source, pixels in cases:
        if pixels is None:
            with Image.open(io.BytesIO(source)) as opened:
                pixels = opened.convert("RGB")
        found = run_forced(tiny_elastic, source, QUESTION, TINY_SPACE.full)
        assert found.token_ids == run_forced(tiny_elastic, pixels, QUESTION, TINY_SPACE.full).token_ids
        assert found.sizes.num_pixels == pixels.width * pixels.height


def test_flat_pictures_give_finite_logits(law_model: ElasticModel) -> None:
    for value in (0, 127, 255):
        image = Image.new("RGB", (64, 48), (value,) * 3)
        prompt = law_model.adapter.encode_question(QUESTION)
        for tier, limit in law_model.vision_budgets.items():
            prepared = law_model.adapter.prepare(image, prompt, limit)
            features = law_model.adapter.encode_vision([prepared])[0]
            prefix = law_model.decoder.prefix([law_model.adapter.embed(prepared, features)])
            top_k, num_blocks = law_model.knob_space.compute(0)
            _, logits = generate_with_logits(law_model.decoder, prefix, [top_k], [num_blocks], 2)
            assert all(step.isfinite().all() for step in logits), tier


def test_half_precision_answers(tiny_elastic_dir: Path, tiny_elastic: ElasticModel) -> None:
    half = ElasticModel.from_pretrained(tiny_elastic_dir, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.identity != tiny_elastic.identity
    token = torch.randn(half.d_model, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (half, tiny_elastic):
        with open_request(model, picture(60, 40), QUESTION) as request:
            output = request.encode("high", token)
            assert output is not None
            outputs.append(output)
            request.finish(Compute(3, 5))
    torch.testing.assert_close(outputs[0].float(), outputs[1], atol=0.1, rtol=0.1)


def test_a_question_alone_has_no_vision_and_every_tier_answers_it_alike(law_model: ElasticModel) -> None:
    adapter, space = law_model.adapter, law_model.knob_space
    results = [run_forced(law_model, None, QUESTION, Knobs(tier, *space.full.compute)) for tier in space.tiers]
    assert {result.token_ids for result in results} == {results[0].token_ids}
    for result in results:
        assert result.vision == VisionSizes(0, 0)
        assert (result.sizes.num_pixels, result.sizes.num_bytes) == (0, 0)
        assert result.sizes == law_model.view(None, QUESTION).sizes
    prompt = adapter.prepare(None, adapter.encode_question(QUESTION, False), 1)
    assert len(prompt.input_ids) == results[0].sizes.num_text_tokens
    view = law_model.view(None, QUESTION)
    assert (view.picture, view.image_size) == (None, None)


def test_two_pictures_are_refused(law_model: ElasticModel, law_examples: list[Example]) -> None:
    images = [example.image for example in law_examples[:2]]
    for several in (images, tuple(images), ["a.png", "b.png"]):
        with pytest.raises(ImageError, match="give one image, not a list"):
            run_forced(law_model, several, QUESTION, law_model.knob_space.full)
