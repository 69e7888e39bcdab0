"""Going on from a finished model: new words, what stays, and stopping in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pacevlm.data.digit_tasks import load_digits
from pacevlm.data.elements import ELEMENTS
from pacevlm.knobs import KnobSpace
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe.processing import PROMPT_PREFIX, PROMPT_SUFFIX, MolmoEProcessor
from pacevlm.models.molmoe.tokenization import EOS_TOKEN, IMAGE_TOKENS
from pacevlm.request.run import run_forced
from recipes.embedded_model.continuing import extend_tokenizer, load_for_training, new_words
from recipes.embedded_model.trainer import EASY, EmbeddedTrainer, Stage

BEGINNING = (Stage("language", 1, 2, 1e-3, (2,), EASY, 2, warmup=1),)
TASKS = (("knowledge", 0.4), ("thought", 0.3), ("detail", 0.2))
FURTHER = (
    Stage(
        "tasks",
        4,
        2,
        1e-3,
        (2, 6),
        EASY,
        2,
        warmup=1,
        heads_weight=0.0,
        flatness_weight=0.1,
        spread_weight=0.5,
        tasks=TASKS,
    ),
    Stage("after", 2, 2, 1e-3, (2,), EASY, 2, warmup=1, heads_weight=0.0),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trainer = EmbeddedTrainer(folder / "run", BEGINNING)
    trainer.run()
    trainer.export(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def tokenizers(finished: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    old = MolmoEProcessor.from_pretrained(finished).tokenizer
    return old, extend_tokenizer(old, new_words())


def test_every_new_word_is_one_token_and_reads_as_itself(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    _, extended = tokenizers
    extended.save_pretrained(tmp_path)
    for tokenizer in (extended, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert set(tokenizer.get_vocab().values()) == set(range(len(tokenizer)))  # no id twice, none left out
        for word in new_words():
            (token_id,) = tokenizer(word, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode([token_id]) == word
    assert {f" {element.name}" for element in ELEMENTS} <= set(new_words())
    assert {f" {element.symbol}" for element in ELEMENTS} <= set(new_words())


def test_old_tokens_keep_their_ids_and_old_texts_their_tokens(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    old, extended = tokenizers
    vocabulary = extended.get_vocab()
    assert all(vocabulary[token] == token_id for token, token_id in old.get_vocab().items())
    for token in (EOS_TOKEN, *IMAGE_TOKENS):
        assert extended.convert_tokens_to_ids(token) == old.convert_tokens_to_ids(token)
        text = f"a {token} b"  # in a question it is text
        options = {"add_special_tokens": False, "split_special_tokens": True}
        assert extended(text, **options)["input_ids"] == old(text, **options)["input_ids"]
    for example in load_digits("train", 60, "uniform"):
        text = PROMPT_PREFIX + example.question + PROMPT_SUFFIX + " " + example.references[0]
        assert extended(text)["input_ids"] == old(text)["input_ids"]
    again = extend_tokenizer(extended, new_words())
    assert again.get_vocab() == vocabulary


def test_what_was_learned_is_copied_and_new_rows_are_small(finished: Path, tmp_path: Path) -> None:
    before = EmbeddedTrainer(finished.parent / "run", BEGINNING).state.model.state_dict()
    model, processor, first_new = load_for_training(finished)
    assert model.training
    assert first_new < model.config.vocab_size == len(processor.tokenizer) <= model.config.embedding_size
    for name, tensor in model.state_dict().items():
        if name in ("model.transformer.wte.embedding", "lm_head.weight"):
            torch.testing.assert_close(tensor[:first_new], before[name][:first_new], atol=1e-3, rtol=1e-3)  # float16
            new = tensor[first_new:]
            assert 0.05 < new.std() < 0.2
            assert len(new.unique(dim=0)) == len(new)
        else:
            torch.testing.assert_close(tensor, before[name], atol=1e-3, rtol=1e-3)
    again = load_for_training(finished)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    EmbeddedTrainer(tmp_path / "run", FURTHER, continue_from=finished).export(tmp_path / "model")
    same, _, none_new = load_for_training(tmp_path / "model")  # nothing is new to a model that has all words
    assert (same.config.vocab_size, none_new) == (model.config.vocab_size, model.config.vocab_size)


def test_going_on_resumes_to_the_bit_and_holds_the_new_output_rows(finished: Path, tmp_path: Path) -> None:
    whole = EmbeddedTrainer(tmp_path / "whole", FURTHER, continue_from=finished)
    first_new = whole.first_new
    drawn = whole.state.model.lm_head.weight[first_new:].detach().clone()
    trained = whole.run().state_dict()
    assert torch.equal(trained["lm_head.weight"][first_new:], drawn)
    learned = trained["model.transformer.wte.embedding"][first_new:]
    assert not torch.equal(learned, load_for_training(finished)[0].model.transformer.wte.embedding[first_new:])

    stopped = EmbeddedTrainer(tmp_path / "parts", FURTHER, continue_from=finished)
    stopped.should_stop = True  # as a signal does: one step more, which is kept
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert (stopped.state.stage, stopped.state.step) == (0, 1)
    resumed = EmbeddedTrainer(tmp_path / "parts", FURTHER, continue_from=finished)
    assert (resumed.state.stage, resumed.state.step) == (0, 1)
    parts = resumed.run().state_dict()
    assert all(torch.equal(parts[name], trained[name]) for name in trained)


def test_the_exported_model_answers_about_elements(finished: Path, tmp_path: Path) -> None:
    trainer = EmbeddedTrainer(tmp_path / "run", FURTHER, continue_from=finished)
    trainer.export(tmp_path / "model")
    space = KnobSpace(num_blocks=(1, 2))
    model = ElasticModel.from_pretrained(tmp_path / "model", knob_space=space, block_order="early_exit")
    example = load_digits("test", 1, "knowledge=1")[0]
    assert isinstance(run_forced(model, example.source, example.question, space.full).answer, str)
