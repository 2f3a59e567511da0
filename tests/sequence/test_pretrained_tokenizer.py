"""A pretrained tokenizer keeps its own conventions: the ids, starts, ends and texts are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as TextTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmgen.cli.export import export
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import MMGenModel, build_model
from mmgen.sequence.document import TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer, size_token
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.loop import train

GRIDS = [(2, 2), (3, 2)]
START, END, STOP = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = ["picture 12", f"{START}user\na cat{END}", "no specials at all", f"a{STOP}b", ""]


def pretrained(folder: Path, begins: bool) -> Path:
    """A tiny Llama with random weights and a chat tokenizer; `begins` chooses whether texts begin with BOS."""
    text = TextTokenizer(models.BPE())
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    text.train_from_iterator([f"picture {i}" for i in range(40)], trainer)
    text.add_special_tokens([AddedToken(name, special=True) for name in (START, END, STOP)])
    if begins:
        text.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, text.token_to_id(START))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=text, bos_token=START, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), num_key_value_heads=2, initializer_range=0.3, **sizes))
    model.generation_config.eos_token_id = [fast.eos_token_id, text.token_to_id(STOP)]
    model.generation_config.pad_token_id = fast.pad_token_id
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["without BOS", "with BOS"])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return pretrained(tmp_path / "llama", request.param)


def begins(backbone: Path) -> bool:
    return len(AutoTokenizer.from_pretrained(backbone)("a").input_ids) > len(
        AutoTokenizer.from_pretrained(backbone)("a", add_special_tokens=False).input_ids
    )


def test_texts_have_the_ids_of_transformers(backbone: Path, tmp_path: Path) -> None:
    """Also after saving and loading, and as `AutoTokenizer` reads the saved files, with the chat template."""
    theirs, ours = AutoTokenizer.from_pretrained(backbone), Tokenizer.load(backbone / "tokenizer.json", GRIDS)
    (tmp_path / "saved").mkdir()
    assert {path.name for path in ours.save(tmp_path / "saved" / "tokenizer.json")} == {
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    again, as_theirs = (
        Tokenizer.load(tmp_path / "saved" / "tokenizer.json", GRIDS),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    expected = [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expected
    assert [ours.encode(text) for text in TEXTS] == [again.encode(text) for text in TEXTS] == expected
    assert [as_theirs(text, add_special_tokens=False).input_ids for text in TEXTS] == expected
    assert again == ours
    messages = [{"role": "user", "content": "draw"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == f"{START}user\ndraw{END}\n"
    assert as_theirs.apply_chat_template(messages, tokenize=False) == f"{START}user\ndraw{END}\n"


def test_start_end_padding_and_stops_are_its_own(backbone: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(backbone), Tokenizer.load(backbone / "tokenizer.json", GRIDS)
    assert ours.start == ([theirs.bos_token_id] if begins(backbone) else [])
    assert (ours.eos, ours.pad) == (theirs.eos_token_id, theirs.eos_token_id)
    assert ours.stops == {theirs.eos_token_id, theirs.convert_tokens_to_ids(STOP)}
    assert ours.added == 2 + len(GRIDS)
    assert "<|bos|>" not in ours.vocabulary
    strip = Writer(ours, "shared").document([TextSegment(ours.encode("picture 3"))])
    assert strip.ids == [*theirs("picture 3").input_ids, theirs.eos_token_id]


def test_text_never_becomes_a_token_of_mmgen(backbone: Path) -> None:
    ours = Tokenizer.load(backbone / "tokenizer.json", GRIDS)
    for text in ("<|boi|>", f"a{size_token((2, 2))}b <|eoi|>", f"{START}<|boi|>"):
        for ids in (ours.encode(text), ours.encode_batch([text])[0]):
            assert not set(ids) & {ours.boi, ours.eoi, *ours.grid}
            assert ours._text.decode(ids, skip_special_tokens=False) == text


def settings(config: Config, backbone: Path) -> Config:
    changes = {
        "model": {"backbone": {"pretrained": str(backbone)}},
        "data": {"tokenizer": str(backbone / "tokenizer.json")},
    }
    return override(config, changes)


def fresh(config: Config) -> tuple[MMGenModel, Tokenizer]:
    tokenizer = Tokenizer.of(config)
    return build_model(config, len(tokenizer)).eval(), tokenizer


def test_greedy_text_before_training_is_that_of_transformers(config: Config, backbone: Path) -> None:
    config = settings(config, backbone)
    model, tokenizer = fresh(config)
    theirs, words = AutoModelForCausalLM.from_pretrained(backbone), AutoTokenizer.from_pretrained(backbone)
    sample = config.sample.model_copy(update={"max_new_tokens": 12, "temperature": 0.0})
    ended = 0
    for prompt in ("picture 1", "a cat", "picture 31 and", f"{START}user\nhello{END}\n", "zebra", "x"):
        inputs = words(prompt, return_tensors="pt").input_ids
        # Generated text in mmgen has at least one token.
        expected = theirs.generate(inputs, do_sample=False, max_new_tokens=12, min_new_tokens=1)[0, inputs.shape[1] :]
        found = Decoder(model, tokenizer, sample).generate([Request([prompt], "text")])[0]
        assert found.text == words.decode(expected, skip_special_tokens=True).strip(), prompt
        ended += len(expected) < 12
    assert ended < 6


def test_new_tokens_start_at_the_mean_of_the_others(config: Config, backbone: Path) -> None:
    model, tokenizer = fresh(settings(config, backbone))
    theirs = AutoModelForCausalLM.from_pretrained(backbone)
    for ours, old in (
        (model.backbone.get_input_embeddings().weight, theirs.get_input_embeddings().weight),
        (model.backbone.get_output_embeddings().weight, theirs.get_output_embeddings().weight),
    ):
        known = len(tokenizer) - tokenizer.added
        torch.testing.assert_close(ours[:known], old[:known])
        torch.testing.assert_close(ours[known:], old[:known].mean(0).expand(tokenizer.added, -1))


def test_a_run_of_an_earlier_version_continues(config: Config, backbone: Path) -> None:
    """It knew no roles: its documents begin with <|bos|>, and its checkpoints have no tokenizer_config.json."""
    config = settings(config, backbone)
    described = (backbone / "tokenizer_config.json").rename(backbone / "hidden")
    assert train(config) == 0
    folder = checkpoint.latest(config.run.dir)
    assert folder is not None
    assert not (folder / "tokenizer_config.json").exists()
    described.rename(backbone / "tokenizer_config.json")
    assert train(override(config, {"train": {"steps": config.train.steps + 1}})) == 0
    assert checkpoint.load_model(config.run.dir / "checkpoints" / "latest")[1].start


def test_a_run_trains_saves_exports_and_continues(config: Config, backbone: Path, tmp_path: Path) -> None:
    config = settings(config, backbone)
    assert train(config) == 0
    folder = checkpoint.latest(config.run.dir)
    assert folder is not None
    model, tokenizer = checkpoint.load_model(folder)
    assert tokenizer == Tokenizer.of(config)
    assert tokenizer.stops == Tokenizer.of(config).stops
    assert train(override(config, {"train": {"steps": config.train.steps + 1}})) == 0
    assert export(config=config, out=tmp_path / "out") == 0
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words(TEXTS[1]).input_ids == AutoTokenizer.from_pretrained(backbone)(TEXTS[1]).input_ids
    assert Decoder(model, tokenizer, config.sample).generate([Request(["a"], "image")])[0].images
