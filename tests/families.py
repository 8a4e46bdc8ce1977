"""Small encoders of every supported family, batches for them, and what plain transformers make of
them."""

import numpy as np
import pytest
import torch
from conftest import WORDS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from lib.encoders import load_encoder
from lib.messages import UserError
from model import Classifier, Settings

BLOCKS, HIDDEN = 5, 36
SIZES = dict(
    hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=3, intermediate_size=52
)
XLMR = dict(
    max_position_embeddings=130, type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2
)
FAMILIES = {  # the README's list: what tells each encoder from BERT
    "bert": {},
    "xlm-roberta": XLMR,
    "roberta": XLMR,
    "distilbert": dict(n_heads=3, hidden_dim=52),
    "deberta-v2": dict(  # mDeBERTa's: relative positions alone, shared projections
        relative_attention=True,
        position_buckets=8,
        type_vocab_size=0,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "electra": dict(embedding_size=20),  # with a projection of the embeddings
    "xlm-roberta-xl": XLMR,  # pre-norm, with a norm after the last block
    "modernbert": dict(  # a final norm, two kinds of blocks
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        global_attn_every_n_layers=2,
        local_attention=6,
    ),
}


def xlmr_tokenizer(folder):
    """Save a tokenizer as XLM-R's: <s> 0, <pad> 1, </s> 2, <unk> 3. Returns its size."""
    words = [f"▁{word}" for language in WORDS.values() for word in language]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *words, *sorted(set("".join(words))), "<mask>"]
    scores = [(piece, -float(i % 7) - 1) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    special = dict(cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="<mask>", **special
    ).save_pretrained(folder)
    return len(pieces)


def make_family(folder, family):
    """Save an encoder of a family, with a tokenizer. Returns the folder."""
    settings = FAMILIES[family]
    size = xlmr_tokenizer(folder) if settings is XLMR else make_tokenizer(folder)
    sizes = {"vocab_size": size, "max_position_embeddings": 64, **SIZES, **settings}
    if family == "distilbert":
        del sizes["num_attention_heads"], sizes["intermediate_size"]
    torch.manual_seed(0)
    encoder = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    for name, parameter in encoder.named_parameters():
        if "norm" in name.lower():  # so that one norm more or less shows
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)
    encoder.save_pretrained(folder)
    return str(folder)


def token_rows():
    """Seven token rows of 3 to 13 tokens, and where the second text of each begins."""
    random = np.random.default_rng(0)
    lengths = (7, 3, 13, 5, 8, 4, 11)
    return [([2, *random.integers(5, 60, n - 2).tolist(), 3], n // 2) for n in lengths]


def batch_of(rows, width=0, family="bert"):
    """A batch as collate() makes it, padded by hand to the longest row, or to `width` tokens."""
    width = max(width, *(len(ids) for ids, _ in rows))
    shape, pad = (len(rows), width), FAMILIES[family].get("pad_token_id", 0)
    batch = {"input_ids": torch.full(shape, pad)}
    batch["attention_mask"], batch["token_type_ids"] = torch.zeros(2, *shape, dtype=torch.int64)
    for i, (ids, second) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["token_type_ids"][i, second : len(ids)] = 1
    return batch


@torch.no_grad()
def plain_states(folder, batch):
    """hidden_states of plain transformers: a tuple of (B, T, D)."""
    encoder, inputs = AutoModel.from_pretrained(folder).eval(), dict(batch)
    if encoder.config.model_type not in ("bert", "electra"):
        del inputs["token_type_ids"]
    output = encoder(**inputs, output_hidden_states=True)
    return output.hidden_states or (output.last_hidden_state,)  # of an encoder without a block


def eval_encoder(folder):
    return load_encoder(folder)[0].eval()


def eval_classifier(folder, seed=0, **settings):
    """A Classifier over the encoder of a folder, in eval mode."""
    torch.manual_seed(seed)
    settings = {"labels": ["refund", "agent", "delivery"], "layers": [1, 3, 4], **settings}
    return Classifier(eval_encoder(folder), Settings(**settings)).eval()


def fails(match, call, *arguments):
    """The message of the UserError that call(*arguments) raises: one line that holds `match`."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert match in message and "\n" not in message, message
    return message
