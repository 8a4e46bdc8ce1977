"""Speed: this project beside what a user would run instead, and beside the limit of the machine.

    make bench MODEL=bert-base-multilingual-uncased DATA=data/xnli
    python -m experiments.bench --model bert-base-multilingual-uncased --data data/xnli --out bench [--compile default]

Reads   a model folder (BERT; its weights may be random, speed does not know) and the train file of a data set.
Writes  OUT/bench.json and OUT/bench.md: for each piece of work this project's rate, the other's, and the ratio.
        Medians over passes of the same rows, the first pass not counted; the slowest ways have one pass (padded to 128,
        sentence-transformers, the search). Peak memory of the process in the passes; the models of one way at a time.
        Fine-tuning is train.py itself: the seconds of an epoch's steps, without set-up, evaluation and saving.
The limit is the rate of this machine's matrix products (2048 x 2048, measured right before and after the work, the
mean of both) over the operations that the unpadded tokens need. transformers' Trainer, sentence-transformers and
scikit-learn are needed here alone (requirements-bench.txt).
"""

import argparse
import contextlib
import gc
import io
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import train
from data import (
    collate,
    encode,
    eval_batches,
    load_tokenizer,
    read_labels,
    read_split,
    sorted_batches,
    take,
    train_language,
)
from extract import pool_all, to_dtype
from grid_search import Recipe, f1_scores, train_models
from lib.archives import write_columns
from lib.devices import autocast, pick_device, pick_precision, to_device
from lib.encoders import drop_pooler, load_encoder
from lib.folders import versions, write_atomic, write_json
from lib.hub import revision
from lib.messages import UserError, cli, in_range
from lib.tables import markdown_table
from model import Classifier, predict

DEVICE = pick_device()


# --- measuring ---------------------------------------------------------------------------------------------------


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def reset_peak():
    """Begin to measure peak memory anew: on a GPU its own, else the process's (Linux)."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    """Peak memory since reset_peak(), in MiB."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def measure(work, repeats):
    """Median seconds of `work()` over `repeats` passes after one that is not counted, and peak memory (MiB)."""
    work()
    reset_peak()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), peak()


def product_rate(dtype, size=2048, products=8):
    """Operations a second of this machine's matrix products, the best of five."""
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return max(
        products * 2 * size**3 / measure(lambda: [a @ b for _ in range(products)], 1)[0]
        for _ in range(5)
    )


def with_limit(dtype, work):
    """What `work()` returns, and the product rate around it."""
    before = product_rate(dtype)
    found = work()
    return found, (before + product_rate(dtype)) / 2


def operations(config, lengths):
    """Multiplications and additions of one forward pass over rows of these lengths: (N,) -> a number."""
    size, inner = config.hidden_size, config.intermediate_size
    per_token = (
        2 * (4 * size**2 + 2 * size * inner) + 4 * lengths * size
    )  # products, and attention's two
    return float(config.num_hidden_layers * (lengths * per_token).sum())


class Table:
    """The rows of the result, printed as they come."""

    def __init__(self):
        self.rows = []

    def add(self, work, beside, ours, theirs, unit, goal, memory=None, their_memory=None):
        """Rates (higher is better) of this project and of what stands beside it; their ratio against a goal."""
        self.rows.append(
            {
                "work": work,
                "beside": beside,
                "ours": ours,
                "theirs": theirs,
                "unit": unit,
                "ratio": ours / theirs,
                "goal": goal,
                "mib": memory,
                "their_mib": their_memory,
            }
        )
        print(
            f"{work} | {beside}: {ours:.4g} against {theirs:.4g} {unit}, {ours / theirs:.2f}x (goal {goal})",
            flush=True,
        )

    def markdown(self):
        def number(value):
            return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

        return markdown_table(
            ["work", "beside", "here", "there", "unit", "ratio", "goal", "MiB here", "MiB there"],
            [
                [
                    r["work"],
                    r["beside"],
                    number(r["ours"]),
                    number(r["theirs"]),
                    r["unit"],
                    f"{r['ratio']:.2f}",
                    r["goal"],
                    number(r["mib"]),
                    number(r["their_mib"]),
                ]
                for r in self.rows
            ],
        )


# --- extraction --------------------------------------------------------------------------------------------------


def our_extraction(model, tokenizer, encoded, dtype, repeats):
    encoder, _ = load_encoder(model)
    drop_pooler(encoder)
    encoder.to(DEVICE).eval()

    def work():
        with torch.inference_mode(), autocast(DEVICE, dtype):
            for index in sorted_batches(encoded.lengths, 64):
                batch = to_device(collate(encoded, index, tokenizer.pad_token_id, 128), DEVICE)
                to_dtype(pool_all(encoder, batch), "float16", "bench")

    return measure(work, repeats)


def usual_extraction(model, tokenizer, rows):
    """What most notebooks do."""
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).to(DEVICE).eval()

    def work():
        with torch.no_grad():
            for start in range(0, len(rows.labels), 32):
                part = slice(start, start + 32)
                batch = tokenizer(
                    rows.text_a[part],
                    rows.text_b[part] if rows.text_b else None,
                    padding="max_length",
                    max_length=128,
                    truncation=True,
                    return_tensors="pt",
                ).to(DEVICE)
                mask = batch["attention_mask"][:, :, None].float()
                for states in encoder(**batch, output_hidden_states=True).hidden_states:
                    states.masked_fill(mask == 0, -1e9).amax(1).cpu().numpy()
                    ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()
                    states[:, 0].cpu().numpy()

    return measure(work, 1)


def bench_extraction(table, model, rows, dtype, repeats):
    tokenizer, count = load_tokenizer(model), len(rows.labels)
    encoded = encode(tokenizer, rows)
    (seconds, memory), limit = with_limit(
        dtype, lambda: our_extraction(model, tokenizer, encoded, dtype, repeats)
    )
    rate = count / seconds
    few = take(rows, max(8, count // 8))
    seconds, theirs = usual_extraction(model, tokenizer, few)
    table.add(
        "extraction, 13 layers x 3 poolings",
        "transformers, padded to 128, float32",
        rate,
        len(few.labels) / seconds,
        "rows/s",
        "9",
        memory,
        theirs,
    )
    part = Transformer(model, max_seq_length=128)
    sentences = SentenceTransformer(
        modules=[part, Pooling(part.get_embedding_dimension())], device=str(DEVICE)
    )
    texts = (
        [" ".join(pair) for pair in zip(rows.text_a, rows.text_b)] if rows.text_b else rows.text_a
    )
    seconds, theirs = measure(lambda: sentences.encode(texts, batch_size=32), 1)
    table.add(
        "",
        "sentence-transformers encode (1 vector), float32",
        rate,
        count / seconds,
        "rows/s",
        "3.5",
        memory,
        theirs,
    )
    need = operations(BertConfig.from_pretrained(model), encoded.lengths)
    table.add("", "the limit", rate, count * limit / need, "rows/s", "0.65")


# --- the search --------------------------------------------------------------------------------------------------


def plain_classifier(x, y, seed, classes=4, epochs=20):
    """One linear classifier, trained as most would: nn.Linear, dropout, Adam. x (N, D) -> the module."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(x.shape[1], classes)).to(
        DEVICE
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=DEVICE).split(128):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def bench_search(table, rows, layers, size, classes, dtype, seeds=5):
    random = np.random.default_rng(0)
    labels = random.integers(classes, size=rows + 1000)
    centres = random.normal(size=(layers, classes, size))
    x = (
        random.normal(size=(layers, len(labels), size)) + 0.07 * centres[:, labels]
    )  # F1 between 0.6 and 0.95
    features = torch.from_numpy(x.astype(np.float32)).to(DEVICE)
    y = torch.from_numpy(labels).to(DEVICE)
    fast, found = features.to(dtype), {}

    def ours():
        weights = train_models(fast[:, :rows], y[:rows], classes, range(seeds), 1e-3, Recipe())
        found["f1"], _ = f1_scores(weights, fast[:, rows:], y[rows:], classes)  # (S, M)

    reset_peak()
    wait()
    start = time.perf_counter()
    ours()  # no pass to warm up: it has thousands of steps
    wait()
    seconds, memory = time.perf_counter() - start, peak()
    models = (2**layers - 1) * seeds
    subsets = [int(m) for m in random.permutation(np.arange(1, 2**layers))[:8]]
    plain, logistic, scores = [], [], []
    for m in subsets:
        used = torch.cat([features[k] for k in range(layers) if m >> k & 1], dim=1)
        start = time.perf_counter()
        model = plain_classifier(used[:rows], y[:rows], 0, classes)
        wait()
        plain.append(time.perf_counter() - start)
        array = used.cpu().numpy()
        start = time.perf_counter()
        other = LogisticRegression(max_iter=1000).fit(array[:rows], labels[:rows])
        logistic.append(time.perf_counter() - start)
        scores.append(
            (
                found["f1"][:, m].mean(),
                (model(used[rows:]).argmax(1) == y[rows:]).float().mean().item(),
                other.score(array[rows:], labels[rows:]),
            )
        )
    f1 = 100 * np.mean(scores, 0)
    table.add(
        f"search: {rows:,} rows x {layers} layers x {size}, 20 epochs",
        f"one at a time, plain torch, float32 ({len(subsets)} of them; F1 {f1[1]:.1f}, here {f1[0]:.1f})",
        models / seconds,
        1 / np.mean(plain),
        "models/s",
        "20",
        memory,
    )
    table.add(
        "",
        f"LogisticRegression one at a time (F1 {f1[2]:.1f})",
        models / seconds,
        1 / np.mean(logistic),
        "models/s",
        "20",
        memory,
    )
    table.add(
        "",
        f"3,825 models in 90 s (here {3825 / models * seconds:.0f} s)",
        models / seconds,
        3825 / 90,
        "models/s",
        "1",
    )


# --- fine-tuning -------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Seconds of each epoch of a Trainer."""

    def __init__(self):
        self.seconds = []

    def on_epoch_begin(self, *_, **__):
        wait()
        self.start = time.perf_counter()

    def on_epoch_end(self, *_, **__):
        wait()
        self.seconds.append(time.perf_counter() - self.start)


def trainer(
    model, tokenizer, rows, batch_size, folder, tuned, repeats, dtype, compiled=None, labels=3
):
    """transformers' Trainer on these rows: padded to 128 in float32, or tuned: dynamic padding, grouped by length."""
    texts = tokenizer(
        rows.text_a,
        rows.text_b,
        truncation=True,
        max_length=128,
        padding=False if tuned else "max_length",
    )
    data = [
        {**{key: values[i] for key, values in texts.items()}, "labels": rows.labels[i]}
        for i in range(len(rows.labels))
    ]
    low = tuned and dtype != torch.float32
    settings = TrainingArguments(
        folder,
        num_train_epochs=1 + repeats,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        bf16=low and dtype == torch.bfloat16,
        fp16=low and dtype == torch.float16,
        train_sampling_strategy="group_by_length" if tuned else "random",
        use_cpu=DEVICE.type == "cpu",
        dataloader_pin_memory=DEVICE.type == "cuda",
        torch_compile=compiled is not None,
        torch_compile_mode=compiled,
    )
    clock = Clock()
    module = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=labels, dtype=torch.float32
    )
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    return Trainer(
        module, settings, data_collator=collator, train_dataset=data, callbacks=[clock]
    ), clock


class Steps(train.Log):
    """train.py's log, which keeps the seconds of each epoch's steps, and the last epoch's peak memory."""

    seconds, memory = [], 0.0

    def restart(self):
        reset_peak()
        wait()
        super().restart()

    def train(self, *numbers):
        wait()
        Steps.seconds.append(time.perf_counter() - self.clock)
        Steps.memory = peak()
        return super().train(*numbers)


def our_training(model, rows, batch_size, precision, epochs, *flags):
    """Seconds of the steps of each of train.py's epochs (a list), and the last one's peak memory (MiB).

    Nothing is saved; what is evaluated, one row, is not counted.
    """
    Steps.seconds, classes = [], sorted(set(rows.labels))
    names = {
        "text_a": rows.text_a,
        "text_b": rows.text_b,
        "label": [f"class {i}" for i in rows.labels],
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.multiple(
            train,
            Log=Steps,
            LOG_STEPS=1 << 30,
            update_mean=lambda *_: {},
            save_epoch=mock.DEFAULT,
            save_state=mock.DEFAULT,
            save_model=mock.DEFAULT,
        ),
    ):
        (Path(folder) / "labels.txt").write_text("".join(f"class {i}\n" for i in classes))
        for split, count in (("train", len(rows.labels)), ("dev", 1)):
            write_columns(
                Path(folder) / f"{split}.en.tsv",
                {name: column[:count] for name, column in names.items()},
            )
        train.main(
            [
                str(flag)
                for flag in (
                    "--model",
                    model,
                    "--data",
                    folder,
                    "--out",
                    Path(folder) / "run",
                    "--batch-size",
                    batch_size,
                    "--precision",
                    precision,
                    "--epochs",
                    epochs,
                    *flags,
                )
            ]
        )
    gc.collect()
    return Steps.seconds, Steps.memory


def our_prediction(model, tokenizer, encoded, dtype, repeats):
    """Median seconds and peak memory (MiB) of predicting all rows with BERT's own head, as evaluate.py does."""
    classifier = Classifier(load_encoder(model)[0], range(3), head="pooler").to(DEVICE)
    return measure(
        lambda: predict(
            classifier,
            eval_batches(encoded, tokenizer.pad_token_id, 128),
            len(encoded.labels),
            dtype,
        ),
        repeats,
    )


def bench_training(table, name, model, rows, batch_size, precision, repeats, compiled, full):
    """Fine-tuning beside Trainer, plain and compiled; with `full` evaluation and freezing too."""
    tokenizer, config, count = (
        load_tokenizer(model),
        BertConfig.from_pretrained(model),
        len(rows.labels),
    )
    encoded, dtype = encode(tokenizer, rows), pick_precision(precision, DEVICE)

    def ours(*flags):
        return our_training(
            model, rows, batch_size, precision, 1 + repeats, "--head", "pooler", *flags
        )

    (seconds, memory), limit = with_limit(dtype, ours)
    rate = plain = count / np.median(seconds[1:])
    with tempfile.TemporaryDirectory() as folder:
        few = take(rows, max(2 * batch_size, count // 8))
        ways = [(False, None, few, 1, "6"), (True, None, rows, repeats, "1.25")]
        ways += [(True, mode, rows, repeats, "1.25") for mode in compiled]
        for tuned, mode, part, passes, goal in ways:
            if mode:
                seconds, memory = ours("--compile", mode)
                rate = count / np.median(seconds[1:])
                table.add(
                    f"fine-tuning, {name}, --compile {mode}",
                    "not compiled",
                    rate,
                    plain,
                    "examples/s",
                    "",
                )
            theirs, clock = trainer(
                model, tokenizer, part, batch_size, folder, tuned, passes, dtype, mode
            )
            reset_peak()
            theirs.train()
            table.add(
                f"fine-tuning, {name}" * (not tuned),
                "Trainer, padded to 128, float32"
                if not tuned
                else "Trainer tuned: dynamic padding, by length, same precision"
                + ", compiled" * (mode is not None),
                rate,
                len(part.labels) / np.median(clock.seconds[1:]),
                "examples/s",
                goal,
                memory,
                peak(),
            )
            if tuned and not mode:
                need = 3 * operations(config, encoded.lengths)
                table.add("", "the limit", rate, count * limit / need, "examples/s", "0.5")
            if tuned and not mode and full:
                order = np.argsort(
                    -encoded.lengths, kind="stable"
                )  # Trainer's own order would pad more
                texts = tokenizer(rows.text_a, rows.text_b, truncation=True, max_length=128)
                data = [{key: values[i] for key, values in texts.items()} for i in order]
                its = measure(lambda: theirs.predict(data), repeats)
            theirs = None  # its memory must not count in the next one's
            gc.collect()
    if full:
        seconds, memory = our_prediction(model, tokenizer, encoded, dtype, repeats)
        table.add(
            "evaluation",
            "Trainer.predict tuned: sorted, same precision",
            count / seconds,
            count / its[0],
            "rows/s",
            "1.25",
            memory,
            its[1],
        )
        blocks = config.num_hidden_layers
        low, chosen = (
            blocks // 2,
            sorted({blocks // 2, 2 * blocks // 3, blocks - 1}),
        )  # of 12: 6; 6 8 11
        for name, flags, used in (
            ("", ["--head", "pooler"], blocks),
            (", MC-BERT", ["--layers", *chosen], max(chosen)),
        ):
            seconds, _ = our_training(
                model,
                rows,
                batch_size,
                precision,
                2 * (1 + repeats),
                *flags,
                "--freeze-layers",
                *range(low + 1),
                "--freeze-epoch",
                1 + repeats,
            )
            before, after = (
                np.median(part[1:]) for part in (seconds[: 1 + repeats], seconds[1 + repeats :])
            )
            in_operations = (
                3 * used / (low + 3 * (used - low))
            )  # a backward pass costs two forward ones
            table.add(
                f"embeddings and lowest {low} frozen{name}",
                f"before freezing (in operations: {in_operations:.2f})",
                count / after,
                count / before,
                "examples/s",
                "1.6",
            )


# --- tokens ------------------------------------------------------------------------------------------------------


def bench_tokens(table, model, rows, count):
    tokenizer = load_tokenizer(model)
    many = type(rows)(*([texts[i % len(texts)] for i in range(count)] for texts in rows))
    few, rates = take(many, max(1, count // 8)), []
    for part, work in (
        (many, lambda: encode(tokenizer, many)),
        (few, lambda: tokenizer(few.text_a, few.text_b, truncation=True, max_length=128)),
    ):
        start = time.perf_counter()
        work()
        rates.append(len(part.labels) / (time.perf_counter() - start))
    table.add(
        f"tokenising {count:,} rows",
        "the tokenizer, an eighth of them in one call",
        *rates,
        "rows/s",
        "",
    )


def small_bert(folder, model, layers=6, size=384):
    """A BERT of 6 x 384 with random weights and the model's own tokenizer, in `folder`."""
    config = BertConfig.from_pretrained(
        model,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * size,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="encoder: hub name or folder")
    parser.add_argument("--data", required=True, help="data set folder: pairs, three labels")
    parser.add_argument("--out", required=True, help="folder for bench.json and bench.md")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["extraction", "search", "small", "full", "tokens"],
        default=["extraction", "search", "small", "full", "tokens"],
        help="parts (default: all)",
    )
    parser.add_argument(
        "--rows",
        type=in_range(int, 1),
        default=640,
        help="rows of a pass, the small model's has four times as many (default: 640)",
    )
    parser.add_argument(
        "--search-rows",
        type=in_range(int, 1),
        default=4000,
        help="train rows of the search (default: 4000)",
    )
    parser.add_argument(
        "--token-rows",
        type=in_range(int, 1),
        default=392_702,
        help="rows to tokenise (default: 392702)",
    )
    parser.add_argument(
        "--batch-size",
        type=in_range(int, 1),
        default=32,
        help="rows of a training step (default: 32)",
    )
    parser.add_argument(
        "--repeats", type=in_range(int, 1), default=3, help="passes that count (default: 3)"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="(default: auto)",
    )
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=["default", "reduce-overhead"],
        default=[],
        metavar="MODE",
        help="fine-tune compiled too, beside Trainer compiled alike: default, reduce-overhead (a GPU)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    dtype = pick_precision(args.precision, DEVICE)
    labels = read_labels(args.data)
    everything = read_split(args.data, "train", train_language(args.data), labels)
    rows = take(everything, args.rows)
    if len(labels) != 3 or rows.text_b is None:
        raise UserError(f"{args.data}: the bench wants pairs and three labels, as XNLI has")
    limit, table = product_rate(dtype), Table()
    where = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{where}, {dtype}: {limit / 1e12:.3f} TFLOP/s in matrix products")
    encoder = load_encoder(args.model)[0]
    config, identity = encoder.config, revision(encoder, args.model)
    del encoder
    if "extraction" in args.only:
        bench_extraction(table, args.model, rows, dtype, args.repeats)
    if "search" in args.only:
        bench_search(
            table,
            args.search_rows,
            8,
            config.hidden_size,
            4,
            dtype if dtype != torch.float16 else torch.float32,
        )
    if "small" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            bench_training(
                table,
                "6 x 384",
                small_bert(folder, args.model),
                take(everything, 4 * args.rows),
                args.batch_size,
                args.precision,
                args.repeats,
                args.compile,
                False,
            )
    if "full" in args.only:
        bench_training(
            table,
            f"{config.num_hidden_layers} x {config.hidden_size}",
            args.model,
            rows,
            args.batch_size,
            args.precision,
            args.repeats,
            args.compile,
            True,
        )
    if "tokens" in args.only:
        bench_tokens(table, args.model, everything, args.token_rows)
    text = (
        f"{where}, {str(dtype).removeprefix('torch.')}, {limit / 1e12:.3f} TFLOP/s in matrix products; "
        f"passes of {len(rows.labels)} rows (6 x 384: four times as many)\n\n{table.markdown()}\n"
    )
    write_json(
        Path(args.out) / "bench.json",
        {
            "where": where,
            "dtype": str(dtype),
            "product_rate": limit,
            "rows": table.rows,
            "model": identity,
            "versions": versions(),
        },
    )
    with write_atomic(Path(args.out) / "bench.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
