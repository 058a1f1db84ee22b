"""Round trips, the end-of-document rule and the errors of the tokenizers."""

import json
import sys

import numpy as np
import pytest

from piperjax.training.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, open_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["", "hello", "  def f(x):\n\treturn x\r\n", "Grüße, 你好 🙂\0", "<|endoftext|> is not the end"]


def write_tokenizer(path, special=("<|endoftext|>",)):
    """Writes a small byte-level BPE tokenizer.json that would truncate, pad and decorate if it were let."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["hello world, def return", *TEXTS], trainer)
    if special:
        last = special[-1]
        pairs = [(last, tokenizer.token_to_id(last))]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{last} $A", None, pairs)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


def test_bytes_that_are_no_text_decode_visibly():
    assert ByteTokenizer().decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_round_trip(tmp_path, text):
    tokenizer = HuggingFaceTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(np.append(ids, tokenizer.end_of_document)) == text


def test_batch_equals_single_encoding(tmp_path):
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))):
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_end_of_document_token_rule(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", special=("<stop>", "</s>"))
    by_name = HuggingFaceTokenizer(path)
    assert by_name.end_of_document == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    by_configuration = HuggingFaceTokenizer(path)
    assert by_configuration.end_of_document == 0
    assert HuggingFaceTokenizer(path, end_of_document="</s>").end_of_document == 1
    assert by_name.fingerprint != by_configuration.fingerprint


def test_open_tokenizer(tmp_path):
    assert isinstance(open_tokenizer("bytes"), ByteTokenizer)
    path = write_tokenizer(tmp_path / "tokenizer.json")
    from_file, from_directory = open_tokenizer(str(path)), open_tokenizer(str(tmp_path))
    assert from_file.fingerprint == from_directory.fingerprint


def _missing(directory):
    return directory / "nothing.json", "no tokenizer at .*nothing.json; give the path of a tokenizer.json"


def _bare_directory(directory):
    return directory, "holds no tokenizer.json; give the path of the file itself"


def _binary(directory):
    path = directory / "tokenizer.model"
    path.write_bytes(b"\x0a\xff\x00sentencepiece")
    return path, r"tokenizer.model is not a tokenizer.json .*save_pretrained\(\)"


def _other_json(directory):
    path = directory / "config.json"
    path.write_text('{"vocab_size": 5}')
    return path, r"config.json is not a tokenizer.json of the Hugging Face tokenizers library \("


def _empty(directory):
    path = directory / "tokenizer.json"
    path.write_text("")
    return path, "tokenizer.json is not a tokenizer.json of"


def _no_end(directory):
    path = write_tokenizer(directory / "tokenizer.json", special=())
    return path, r"has no end-of-document token: none of <\|endoftext\|>, .* is in its vocabulary; add one"


def _broken_configuration(directory):
    path = write_tokenizer(directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text("{")
    return path, "tokenizer_config.json is not valid JSON .*; mend it, or remove it"


@pytest.mark.parametrize(
    "case", [_missing, _bare_directory, _binary, _other_json, _empty, _no_end, _broken_configuration]
)
def test_errors(tmp_path, case):
    path, sentence = case(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        open_tokenizer(str(path))


def test_unknown_end_of_document(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="has no token '<end>' to end documents with; name one of its own"):
        HuggingFaceTokenizer(path, end_of_document="<end>")


def test_absent_library(tmp_path, monkeypatch):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="needs the package 'tokenizers', which is not installed"):
        open_tokenizer(str(path))


def test_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"must lie in 0..256, got 3..257; decode with the tokenizer that"):
        ByteTokenizer().decode([3, 257])
