"""The data tools as tests run them, and the documents that they wrote, read back by megatron-core."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import preprocess_data

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TEXTS = [
    "def f(x):\n    return  x + 1  # two  spaces\n\n\n",
    " leading space, tab\t, trailing space ",
    "digits 1234567890, accents é ü ñ, a letter not in training: 漢, a null: \0.",
    "windows\r\nline\r\nends",
]


def run_tool(name: str, *args: object, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def preprocess(*args: object) -> str:
    """The tool in this process, where megatron-core is imported once."""
    return preprocess_data.preprocess(preprocess_data.parse([str(arg) for arg in args]))


def load(prefix: Path, key: str = "text") -> list[np.ndarray]:
    """A dataset's documents, read by megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(f"{prefix}_{key}_document")
    assert len(dataset) == len(dataset.document_indices) - 1  # one sequence a document
    return [np.array(dataset[i]) for i in range(len(dataset))]


def files(prefix: Path, key: str = "text") -> list[bytes]:
    """A dataset's .bin and .idx."""
    return [Path(f"{prefix}_{key}_document.{end}").read_bytes() for end in ("bin", "idx")]


def save_hf_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int, **special: str) -> Path:
    """A byte-level BPE trained on `texts`, as transformers saves it; `special`: its tokens, like eos_token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
    return folder
