"""Pre-train a miniature multilingual BERT on row-parallel text: masked language modelling on single
sentences, and on pairs of translations (TLM).

    python sample/make_data.py
    python sample/pretrain.py --data sample/parallel --vocab sample/vocab.txt --out sample/model

Reads   DATA/SPLIT.LANG.tsv (a data set folder whose files are row-parallel), and the WordPiece
        vocabulary; where VOCAB does not exist it is trained on DATA first. The trainer gives
        another one each time: keep the file.
Writes  OUT/model.safetensors (float16), OUT/config.json, the tokenizer, OUT/pretrain.json (command,
        loss, seconds).
Follows Lample and Conneau (2019), section 3.3, with BERT's masking; 12 blocks, so that layer
        numbers mean what they mean in the paper. The same vocabulary, seed and number of threads
        give the same weights on the same machine.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer
from transformers import AutoModelForMaskedLM, BertConfig, BertTokenizer

from data import encode, fingerprint, read_labels, read_split, split_languages
from lib.devices import autocast, pick_device, pick_precision
from lib.folders import versions, write_atomic, write_json
from lib.messages import UserError, cli, in_range, progress_bar

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_vocabulary(path, texts, size):
    """Train and write a lower-casing, accent-stripping WordPiece vocabulary of `size` pieces, as
    M-BERT uncased has."""
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        texts, vocab_size=size, min_frequency=2, limit_alphabet=size // 2, special_tokens=SPECIAL
    )
    pieces = trainer.get_vocab()
    with write_atomic(path) as file:
        file.writelines(f"{piece}\n" for piece in sorted(pieces, key=pieces.get))


def examples(encoded, random, pairs):
    """Endless training examples: (ids, where the second text begins). A share `pairs` of them are
    TLM's.

    encoded: an Encoded for each language, row-parallel. A pair is a row in one language and its
    translation in another.
    """

    def row(language, i):
        return encoded[language].ids[encoded[language].starts[i] : encoded[language].starts[i + 1]]

    while True:
        i, first, other = (
            random.integers(len(encoded[0].labels)),
            *random.permutation(len(encoded))[:2],
        )
        if random.random() < pairs:
            yield np.concatenate([row(first, i), row(other, i)[1:]]), len(row(first, i))
        else:
            yield row(first, i), len(row(first, i))


def batches(stream, random, tokens, limit, pool=4096):
    """Endless batches of one rounded width each: ids (B, T), 0 for padding, and the second text's
    beginning (B,).

    B is tokens / T, so that there is one shape for each width: `pool` examples are sorted, and
    those that do not fill a batch wait for the next pool.
    """
    waiting = {}
    while True:
        ready = []
        for ids, second in (next(stream) for _ in range(pool)):
            width = -(-min(len(ids), limit) // 8) * 8
            group = waiting.setdefault(width, [])
            group.append((ids[:limit], second))
            if len(group) == max(1, tokens // width):
                ready.append((width, waiting.pop(width)))
        for k in random.permutation(len(ready)):
            width, group = ready[k]
            yield (
                np.stack([np.pad(ids, (0, width - len(ids))) for ids, _ in group]),
                np.array([second for _, second in group]),
            )


def mask_tokens(ids, random, vocabulary, rate, mask_id):
    """BERT's masking: `rate` of the real tokens are predicted; 80 % become [MASK], 10 % another
    piece, 10 % stay.

    ids (B, T) -> changed ids (B, T), flat positions (K,) and what stood there (K,); K is a multiple
    of 32, so that there are few shapes.
    """
    real = np.flatnonzero(ids >= len(SPECIAL))
    count = max(32, int(rate * len(real)) // 32 * 32)
    positions = np.sort(random.permutation(real)[:count])
    changed, coin = ids.copy().reshape(-1), random.random(len(positions))
    changed[positions[coin < 0.8]] = mask_id
    swap = positions[coin >= 0.9]
    changed[swap] = random.integers(len(SPECIAL), vocabulary, len(swap))
    return changed.reshape(ids.shape), positions, ids.reshape(-1)[positions]


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="data set folder with row-parallel files")
    parser.add_argument("--split", default="train", help="which files (default: train)")
    parser.add_argument(
        "--vocab",
        required=True,
        help="vocab.txt; trained on DATA and written when it does not exist",
    )
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument(
        "--vocab-size",
        type=in_range(int, 1),
        default=6000,
        help="word pieces of a new vocabulary (default: 6000)",
    )
    parser.add_argument("--hidden-size", type=in_range(int, 1), default=96, help="(default: 96)")
    parser.add_argument("--blocks", type=in_range(int, 1), default=12, help="(default: 12)")
    parser.add_argument(
        "--heads", type=in_range(int, 1), default=4, help="attention heads (default: 4)"
    )
    parser.add_argument(
        "--steps", type=in_range(int, 1), default=3000, help="optimizer steps (default: 3000)"
    )
    parser.add_argument(
        "--tokens",
        type=in_range(int, 1),
        default=4096,
        help="tokens a step, padding included (default: 4096)",
    )
    parser.add_argument(
        "--pairs",
        type=float,
        default=0.8,
        help="share of examples that are translation pairs (default: 0.8)",
    )
    parser.add_argument(
        "--mask-rate",
        type=in_range(float, above=0, below=1),
        default=0.4,
        help="share of tokens predicted: high, so that a translation has to be read (default: 0.4)",
    )
    parser.add_argument(
        "--lr",
        type=in_range(float, above=0),
        default=2e-3,
        help="AdamW's highest learning rate (default: 2e-3)",
    )
    parser.add_argument(
        "--max-length",
        type=in_range(int, 3),
        default=128,
        help="positions of the model, in tokens (default: 128)",
    )
    parser.add_argument("--seed", type=in_range(int, 0), default=0, help="(default: 0)")
    args = parser.parse_args(argv)
    if args.hidden_size % args.heads:
        parser.error(f"--heads {args.heads}: does not divide --hidden-size {args.hidden_size}")
    if not 0 <= args.pairs <= 1:
        parser.error(f"--pairs {args.pairs}: expected 0 to 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    start, device = time.perf_counter(), pick_device()
    dtype = pick_precision("auto", device)
    labels, languages = read_labels(args.data), split_languages(args.data, args.split)
    if len(languages) < 2:
        raise UserError(
            f"{args.data} has {args.split} in {' '.join(languages) or 'no language'}: "
            "two or more are needed"
        )
    rows = [read_split(args.data, args.split, language, labels) for language in languages]
    if len({tuple(part.labels) for part in rows}) > 1:
        raise UserError(
            f"{args.data}: the {args.split} files are not row-parallel, their labels differ"
        )
    if not Path(args.vocab).exists():
        texts = [text for part in rows for text in part.text_a + (part.text_b or [])]
        train_vocabulary(args.vocab, texts, args.vocab_size)
    tokenizer = BertTokenizer(
        vocab=args.vocab, do_lower_case=True, model_max_length=args.max_length
    )
    encoded = [encode(tokenizer, part, args.max_length) for part in rows]

    torch.manual_seed(args.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden_size,
        hidden_dropout_prob=0.0,
        max_position_embeddings=args.max_length,
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        args.steps,
        pct_start=0.1,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    random = np.random.default_rng(args.seed)
    stream = batches(examples(encoded, random, args.pairs), random, args.tokens, args.max_length)
    seen, losses = 0, []
    bar = progress_bar(iterable=range(args.steps), unit="step")
    for step in bar:
        ids, second = next(stream)  # (B, T), (B,)
        changed, positions, targets = mask_tokens(
            ids, random, len(tokenizer), args.mask_rate, tokenizer.mask_token_id
        )
        types = (np.arange(ids.shape[1]) >= second[:, None]) & (ids > 0)
        changed, mask, types, positions, targets = (
            torch.from_numpy(array.astype(np.int64)).to(device)
            for array in (changed, ids > 0, types, positions, targets)
        )
        with autocast(device, dtype):
            states = model.bert(
                changed, attention_mask=mask, token_type_ids=types
            ).last_hidden_state
            logits = model.cls(states.flatten(0, 1)[positions])  # (K, vocabulary)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += int(np.count_nonzero(ids))
        if step % 50 == 0 or step == args.steps - 1:
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens=f"{seen / 1e6:.1f}M", refresh=False)
    if not np.isfinite(losses[-1]):
        raise UserError(f"the loss is {losses[-1]}: lower --lr (now {args.lr})")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = (
        0.1  # for fine-tuning, as BERT has
    )
    model.bert.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    seconds = time.perf_counter() - start
    write_json(
        Path(args.out) / "pretrain.json",
        {
            "command": shlex.join(
                ["python", "sample/pretrain.py", *(sys.argv[1:] if argv is None else argv)]
            ),
            "languages": languages,
            "rows": len(rows[0].text_a),
            "tokens": seen,
            "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "loss": round(float(np.mean(losses[-5:])), 4),
            "inputs": fingerprint(args.data, [(args.split, language) for language in languages]),
            "versions": versions(),
        },
    )
    print(
        f"{args.out}: {sum(p.numel() for p in model.bert.parameters()):,} parameters, "
        f"{seen / 1e6:.1f}M tokens, {seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    cli(main)
