"""This package is the data: text in files to batches of token sequences."""

from piperjax.training.data.corpus import Corpus, find_corpus
from piperjax.training.data.dataset import Dataset, load_dataset, unigram_entropy
from piperjax.training.data.loader import Batch, TrainBatches, ValidationBatches
from piperjax.training.data.packing import PackedSequences
from piperjax.training.data.shards import default_cache_dir
from piperjax.training.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, open_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "Dataset",
    "HuggingFaceTokenizer",
    "PackedSequences",
    "Tokenizer",
    "TrainBatches",
    "ValidationBatches",
    "default_cache_dir",
    "find_corpus",
    "load_dataset",
    "open_tokenizer",
    "unigram_entropy",
]
