"""What the tests share: a tiny encoder with a vocabulary of its own, a small data set, and a way to
run a script."""

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from lib import messages

torch.set_num_threads(1)  # models this small gain nothing from more

STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SHARED = ROOT.parent / "shared" / "data"
WORDS = {  # a toy world: the same twelve words in three languages, the first eight decide the label
    "en": "money refund agent person parcel late cancel order please my the now".split(),
    "de": "geld erstattung berater mensch paket spaet kuendigen bestellung bitte mein das "
    "jetzt".split(),
    "zh": "钱 退款 客服 人 包裹 迟 取消 订单 请 我的 这 现在".split(),
}
LABELS = ["refund", "agent", "delivery", "cancel"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\""


def make_tokenizer(folder):
    """Save a fast WordPiece tokenizer of the toy words and of single letters. Returns its size."""
    words = [word for language in WORDS.values() for word in language]
    letters = sorted(set("".join(words) + LETTERS))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += dict.fromkeys(words + letters + [f"##{letter}" for letter in letters])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")
    }
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)
    return len(pieces)


def make_model(folder, family="bert", blocks=5, seed=0, **more):
    """Save an encoder with random weights and its tokenizer: 5 blocks, hidden size 36, 3 heads.
    Returns the folder."""
    sizes = dict(num_attention_heads=3, intermediate_size=52, max_position_embeddings=64)
    if family == "distilbert":
        sizes = dict(n_heads=3, hidden_dim=52, max_position_embeddings=64)
    if family == "xlm-roberta":
        sizes |= dict(max_position_embeddings=66, type_vocab_size=1, pad_token_id=0)
    sizes |= dict(vocab_size=make_tokenizer(folder), hidden_size=36, num_hidden_layers=blocks)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**sizes, **more})
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def toy_rows(language, count, seed):
    """(text, class) rows of 3 to 9 toy words; one of the first four pairs decides the class."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(count):
        label = int(random.integers(4))
        words = [int(random.integers(8, 12)) for _ in range(random.integers(2, 9))]
        words.insert(int(random.integers(len(words))), 2 * label + int(random.integers(2)))
        rows.append((" ".join(WORDS[language][i] for i in words), label))
    return rows


def make_data(folder, train=60, dev=13, test=17, languages=("en", "de", "zh")):
    """Write a toy data set folder, row-parallel in dev and test. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    for seed, (split, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
        for language in languages if split != "train" else ("en",):
            lines = ["text\tlabel\n"]
            for text, label in toy_rows(language, count, seed):
                lines.append(f"{text}\t{LABELS[label]}\n")
            (folder / f"{split}.{language}.tsv").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def make_pairs(data, folder):
    """A copy of a toy data set with each text cut in two. Returns the folder."""
    shutil.copytree(data, folder)
    for path in Path(folder).glob("*.tsv"):
        lines = ["text_a\ttext_b\tlabel\n"]
        for text, label in table(path):
            first, _, second = text.partition(" ")
            lines.append(f"{first}\t{second}\t{label}\n")
        path.write_text("".join(lines), encoding="utf-8")
    return folder


def table(path):
    """The cells of a .tsv file, row by row, without its header."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines[1:]]


def refused(result, *phrases):
    """A script() ended with status 2, and all `phrases` are in the last line that it printed."""
    status, _, error = result
    line = error.strip().splitlines()[-1]
    assert status == 2 and ".py: error: " in line, result
    for phrase in phrases:
        assert phrase in line, line


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def still_model(tmp_path_factory):
    """An encoder without dropout."""
    return make_model(tmp_path_factory.mktemp("still"), **STILL)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train", "--flag", value, ...) runs a script in this process as a user would:
    (exit status, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name.rsplit('.')[-1]}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            messages.cli(module.main)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    yield run
    signal.signal(signal.SIGTERM, before)
