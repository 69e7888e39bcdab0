"""The processor: prompts, image placement, limits, batches, and saving."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pacevlm.errors import CheckpointError, ConfigError, ImageError, QuestionError
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor, prepare_image
from pacevlm.models.molmoe.processing import (
    MolmoEProcessor,
    PreparedRequest,
    SpecialTokenIds,
    assemble_request,
    collate_requests,
)
from pacevlm.models.molmoe.tiling import CropGeometry
from pacevlm.models.molmoe.tokenization import (
    EOS_TOKEN,
    IM_PATCH_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    PAD_TOKEN,
    build_tokenizer,
)
from pacevlm.types import VisionSizes

FIXTURES = Path(
    os.environ.get("PACEVLM_FIXTURES", Path(__file__).resolve().parents[4] / "shared" / "fixtures"), "molmoe-tiny"
)
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no reference fixtures at {FIXTURES}; set PACEVLM_FIXTURES to their folder"
)

TEXTS = ["Which number is the largest? 407", "Describe this image. The cat sat on the mat.", "User: Assistant:"] * 20
TENSORS = ("input_ids", "images", "image_masks", "image_input_idx")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> MolmoEProcessor:
    return MolmoEProcessor(MolmoEImageProcessor(84, 14, (2, 2), max_crops=4), tokenizer, max_length=200)


def decode(processor: MolmoEProcessor, ids: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids.tolist())


def fixture_request(stored: safe_open, cases: dict, name: str) -> PreparedRequest:
    image = stored.get_tensor(f"{name}/in/image_uint8").numpy()
    prepared = prepare_image(image, cases["cases"][name]["max_crops"], CropGeometry(84, 14, (2, 2)))
    special = SpecialTokenIds(*(cases["special_tokens"][key] for key in ("bos", "start", "end", "patch", "col")))
    return assemble_request([], stored.get_tensor(f"{name}/in/prompt_token_ids").tolist(), prepared, special)


@needs_fixtures
def test_sequences_and_batches_match_the_reference() -> None:
    cases = json.loads((FIXTURES / "cases.json").read_text())
    with safe_open(FIXTURES / "cases.safetensors", "pt") as stored:
        requests = {name: fixture_request(stored, cases, name) for name in ("img_one", "img_wide", "img_tall")}
        for name, request in requests.items():
            assert torch.equal(request.input_ids, stored.get_tensor(f"{name}/in/input_ids")[0])
            assert torch.equal(request.image_input_idx, stored.get_tensor(f"{name}/in/image_input_idx")[0])
        batch = collate_requests([requests["img_one"], requests["img_wide"]])
        for name in ("input_ids", "image_masks", "image_input_idx"):
            assert torch.equal(batch[name], stored.get_tensor(f"img_mixed_b2/in/{name}"))
        assert (batch["images"][0, requests["img_one"].vision_sizes.num_units :] == -1).all()


def test_prompt_is_bos_then_image_then_question(processor: MolmoEProcessor) -> None:
    request = processor.prepare(picture(96, 128), "Which number is the largest?")
    ids, num_image = request.input_ids, request.vision_sizes.num_image_tokens
    assert ids[0] == processor.tokenizer.eos_token_id
    assert set(ids[1 : 1 + num_image].tolist()) == {
        processor.tokenizer.convert_tokens_to_ids(t) for t in IMAGE_TOKENS[:4]
    }
    assert decode(processor, ids[1 + num_image :]) == " User: Which number is the largest? Assistant:"
    assert request.num_text_tokens + num_image == len(ids)
    assert request.vision_sizes == processor.image_processor.vision_sizes(96, 128)


@pytest.mark.parametrize("question", ["What is {} this?", "{}What is this?", "What is this? {}"])
def test_the_image_stands_where_the_question_says(processor: MolmoEProcessor, question: str) -> None:
    image = picture(70, 190)
    request = processor.prepare(image, question.format(IMAGE_TOKEN))
    in_front = processor.prepare(image, question.format(""))
    num_image = request.vision_sizes.num_image_tokens
    first = 1 + request.input_ids[1:].eq(processor.special_token_ids.im_start).nonzero()[0].item()
    before, behind = f" User: {question} Assistant:".split("{}")
    assert decode(processor, request.input_ids[1:first]) == before
    assert decode(processor, request.input_ids[first + num_image :]) == behind
    # Cells move with the image, unused ones stay unused.
    used = in_front.image_input_idx >= 0
    assert torch.equal(request.image_input_idx[used], in_front.image_input_idx[used] + first - 1)
    assert torch.equal(request.image_input_idx[~used], in_front.image_input_idx[~used])
    patches = request.input_ids[request.image_input_idx[used]]
    assert (patches == processor.special_token_ids.im_patch).all()


def test_text_alone_is_bos_and_prompt(processor: MolmoEProcessor) -> None:
    request = processor.prepare(None, "What is 4 + 7?")
    assert decode(processor, request.input_ids) == f"{EOS_TOKEN} User: What is 4 + 7? Assistant:"
    assert request.images is request.image_masks is request.image_input_idx is None
    assert (request.num_text_tokens, request.vision_sizes) == (len(request.input_ids), VisionSizes(0, 0))
    assert set(processor(text="What is 4 + 7?")) == {"input_ids", "attention_mask"}


def test_special_strings_in_a_question_are_ordinary_text(processor: MolmoEProcessor) -> None:
    question = f"Is {IM_PATCH_TOKEN} or {EOS_TOKEN} or {PAD_TOKEN} in <im_start> the picture?"
    request = processor.prepare(picture(50, 64), question)
    num_image = request.vision_sizes.num_image_tokens
    text_ids = request.input_ids[1 + num_image :]
    assert decode(processor, text_ids) == f" User: {question} Assistant:"
    assert not set(text_ids.tolist()) & set(processor.tokenizer.all_special_ids)
    assert text_ids.max() < processor.tokenizer.eos_token_id


@pytest.mark.parametrize("question", ["é ü 漢字 😀 عربي", "tab\tnew\nline", "nul\0", " two  spaces ", "1234567890"])
def test_any_text_survives(processor: MolmoEProcessor, question: str) -> None:
    ids = processor.prepare(None, question).input_ids
    assert decode(processor, ids[1:]) == f" User: {question} Assistant:"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        (IMAGE_TOKEN, "empty"),
        (f"{IMAGE_TOKEN} or {IMAGE_TOKEN}?", "2 times"),
        (None, "text, not NoneType"),
        (7, "text, not int"),
        (b"what?", "text, not bytes"),
        ("\ud800?", "Unicode"),
        ("word " * 20_000, "100,000 characters"),
        ("1" * 190, "190 tokens|19[0-9] tokens|characters"),
    ],
    ids=["empty", "blank", "mark", "two marks", "none", "number", "bytes", "surrogate", "100 kB", "too many tokens"],
)
def test_unfit_questions_are_refused(processor: MolmoEProcessor, question: object, message: str) -> None:
    with pytest.raises(QuestionError, match=message):
        processor.prepare(picture(50, 64), question)


def test_a_huge_question_is_never_tokenized(processor: MolmoEProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_encode", lambda text: pytest.fail("tokenized"))
    with pytest.raises(QuestionError, match="characters"):
        processor.prepare(None, "a" * 100_000)


def test_the_image_mark_needs_an_image(processor: MolmoEProcessor) -> None:
    with pytest.raises(QuestionError, match="no image was given"):
        processor.prepare(None, f"What is in {IMAGE_TOKEN}?")


def test_the_longest_question_fits_beside_every_image(processor: MolmoEProcessor) -> None:
    limit = processor.max_question_tokens()
    # Every digit is a token; the first takes the space in front of it along, so one more may fit.
    num_digits = next(n for n in range(limit + 2, 0, -1) if accepted(processor, "1" * n))
    assert limit <= num_digits <= limit + 1
    most = 0
    for height, width in [(96, 128), (300, 300), (600, 84), (84, 600), (600, 200), (20, 20)]:
        for max_crops in (1, 2, 4):
            request = processor.prepare(picture(height, width), "1" * num_digits, max_crops)
            most = max(most, len(request.input_ids))
    assert most == processor.max_length
    # What is refused is refused whatever the tier and the image.
    for max_crops in (1, 4, None):
        with pytest.raises(QuestionError, match="tokens"):
            processor.prepare(picture(20, 20), "1" * (num_digits + 1), max_crops)


def accepted(processor: MolmoEProcessor, question: str) -> bool:
    try:
        processor.prepare(None, question)
    except QuestionError:
        return False
    return True


def test_lengths_without_room_for_a_question_are_refused(processor: MolmoEProcessor) -> None:
    with pytest.raises(ConfigError, match="max_length 45 leaves no room"):
        MolmoEProcessor(processor.image_processor, processor.tokenizer, max_length=45)
    for max_length in (0, -1, True, "200", 1.5):
        with pytest.raises(ConfigError, match="max_length"):
            MolmoEProcessor(processor.image_processor, processor.tokenizer, max_length=max_length)
    with pytest.raises(ConfigError, match="of 50 crops"):
        processor.prepare(picture(50, 64), "What?", max_crops=50)
    for max_crops in (0, -3, True, "4", 2.0):
        with pytest.raises(ConfigError, match="max_crops"):
            processor.prepare(picture(50, 64), "What?", max_crops=max_crops)


def test_tokenizers_without_the_special_tokens_are_refused(processor: MolmoEProcessor) -> None:
    document = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<im_col>"]
    from tokenizers import Tokenizer

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    with pytest.raises(ConfigError, match="<im_col>"):
        MolmoEProcessor(processor.image_processor, other)


def test_a_batch_pads_each_request_behind_with_minus_one(processor: MolmoEProcessor) -> None:
    requests = [
        processor.prepare(picture(50, 64), "What is in this picture, and where is the cat?"),
        processor.prepare(None, "Hello?"),
        processor.prepare(picture(70, 190), "What?"),
    ]
    batch = processor.collate(requests)
    for row, request in enumerate(requests):
        num_tokens = len(request.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * num_tokens + [0] * (
            batch["input_ids"].shape[1] - num_tokens
        )
        for name in TENSORS:
            alone = getattr(request, name)
            length = 0 if alone is None else len(alone)
            assert (batch[name][row, length:] == -1).all()
            if alone is not None:
                assert torch.equal(batch[name][row, :length], alone)
                assert batch[name].dtype == alone.dtype
    assert batch["input_ids"].dtype == batch["image_input_idx"].dtype == batch["attention_mask"].dtype == torch.int64
    with pytest.raises(ConfigError, match="no request"):
        processor.collate([])


def test_requests_of_different_geometries_are_not_batched(processor: MolmoEProcessor) -> None:
    other = MolmoEProcessor(MolmoEImageProcessor(48, 6, (2, 2), max_crops=4), processor.tokenizer, max_length=400)
    with pytest.raises(ConfigError, match="geometries"):
        collate_requests([p.prepare(picture(50, 64), "What?") for p in (processor, other)])


def test_a_call_is_prepare_and_collate(processor: MolmoEProcessor) -> None:
    images = [picture(50, 64), picture(70, 190)]
    expected = processor.collate([processor.prepare(image, "What?", 2) for image in images])
    for given in (images, [[image] for image in images]):
        batch = processor(images=given, text=["What?", "What?"], max_crops=2)
        assert set(batch) == set(processor.model_input_names) == set(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    single = processor(images[0], "What?")
    assert torch.equal(single["input_ids"][0], processor.prepare(images[0], "What?").input_ids)
    assert processor([images[0], None], ["What?", "Hello?"])["images"].shape[0] == 2


def test_calls_that_do_not_pair_images_with_questions_are_refused(processor: MolmoEProcessor) -> None:
    image = picture(50, 64)
    for images, text in (
        ([image, image], "What?"),
        ([image], ["What?", "Who?"]),
        ([[image, image]], ["What?"]),
        ([], []),
    ):
        with pytest.raises(QuestionError, match=r"one question|each question"):
            processor(images, text)
    with pytest.raises(QuestionError, match="NoneType"):
        processor(image)
    with pytest.raises(ConfigError, match="return_tensors"):
        processor(image, "What?", return_tensors="np")
    with pytest.raises(ConfigError, match="padding"):
        processor(image, "What?", padding=True)
    with pytest.raises(ImageError):
        processor(picture(1, 900), "What?")


def test_saved_processors_load_the_same(processor: MolmoEProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    image, question = picture(96, 128), "Which é number <im_col> is the largest? 12 34"
    expected = processor(image, question)
    loaded = MolmoEProcessor.from_pretrained(tmp_path)
    assert loaded.max_length == processor.max_length
    assert loaded.special_token_ids == processor.special_token_ids
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    batch = loaded(image, question)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert MolmoEProcessor.from_pretrained(tmp_path, max_length=150).max_length == 150
    # What was loaded saves again, and the tokenizer is one that transformers loads on its own.
    loaded.save_pretrained(tmp_path / "again")
    again = MolmoEProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(again(image, question)["input_ids"], expected["input_ids"])
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own(question)["input_ids"] == processor.tokenizer(question)["input_ids"]


@pytest.mark.parametrize("broken", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", [None, "", "{", '{"model": 3}'], ids=["missing", "empty", "cut", "other"])
def test_incomplete_processors_are_refused(
    processor: MolmoEProcessor, tmp_path: Path, broken: str, content: str | None
) -> None:
    processor.save_pretrained(tmp_path)
    (tmp_path / broken).unlink()
    if content is not None:
        (tmp_path / broken).write_text(content)
    with pytest.raises(CheckpointError, match="save_pretrained"):
        MolmoEProcessor.from_pretrained(tmp_path)


def test_tokenizer_layout_is_that_of_the_real_model(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(eos) == EOS_TOKEN
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(PAD_TOKEN) == 1
    assert tokenizer.convert_ids_to_tokens(list(range(eos + 1, eos + 6))) == list(IMAGE_TOKENS)
    assert len(tokenizer) == eos + 6
    assert eos < 320
    assert tokenizer.convert_ids_to_tokens(0) == "<|unused|>"
    assert tokenizer.decode([0, 1, eos, eos + 3], skip_special_tokens=True) == ""


def test_tokenizer_fills_the_vocabulary_when_the_texts_allow(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer(TEXTS, 300).eos_token_id == 299
    assert build_tokenizer([], 300).eos_token_id == 258, "bytes and special tokens alone"


def test_tokenizer_training_is_deterministic() -> None:
    first, second = (build_tokenizer(iter(TEXTS), 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_tokenizer_encodes_everything_and_loses_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    every_character = "".join(chr(code) for code in range(1, 0x2FF))
    for text in (every_character, "𝄞 \U0010ffff", "a" * 1000):
        ids = tokenizer(text)["input_ids"]
        assert all(isinstance(i, int) and 2 <= i < tokenizer.eos_token_id for i in ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"], "NFC"


def test_tokenizer_gives_each_digit_a_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("407407")["input_ids"]) == 6
    assert [tokenizer.decode([i]).strip() for i in tokenizer("40719")["input_ids"]] == list("40719")


@pytest.mark.parametrize("vocab_size", [0, 258, True, 300.0, "300"])
def test_tokenizer_sizes_without_room_for_bytes_are_refused(vocab_size: object) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        build_tokenizer(TEXTS, vocab_size)
