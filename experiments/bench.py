"""Speed: this project beside what a user would run instead, and beside the limit of the machine.

    make bench MODEL=bert-base-multilingual-uncased DATA=data/xnli
    python -m experiments.bench --model bert-base-multilingual-uncased --data data/xnli --out bench

Reads   a model folder (BERT; its weights may be random, speed does not know) and the train file of
        a data set.
Writes  OUT/bench.json and OUT/bench.md: for each piece of work this project's rate, the other's,
        and the ratio. Medians over passes of the same rows, the first pass not counted; the slowest
        ways have one pass (padded to 128, sentence-transformers, the search). Peak memory of the
        process in the passes; the models of one way at a time. Fine-tuning is train.py itself: the
        seconds of an epoch's steps, without set-up, evaluation and saving.
The limit is the rate of this machine's matrix products (2048 x 2048, measured right before and
after the work, the mean of both) over the operations that the unpadded tokens need. transformers'
Trainer, sentence-transformers and scikit-learn are needed here alone (requirements-bench.txt).
"""

import contextlib
import gc
import io
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
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
    Rows,
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
from lib.messages import UserError, cli, in_range, make_parser
from lib.tables import markdown_table
from model import Classifier, Settings, predict

DEVICE = pick_device()


# --- measuring ------------------------------------------------------------------------------------


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
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024


def timed(work):
    """What `work()` returns, and its seconds."""
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def measure(work, repeats):
    """Median seconds of `work()` over `repeats` passes after one that is not counted, and peak
    memory (MiB)."""
    work()
    reset_peak()
    seconds = [timed(work)[1] for _ in range(repeats)]
    return float(np.median(seconds)), peak()


def product_rate(dtype, size=2048, products=8):
    """Operations a second of this machine's matrix products, the best of five."""
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    seconds = [measure(lambda: [a @ b for _ in range(products)], 1)[0] for _ in range(5)]
    return products * 2 * size**3 / min(seconds)


def with_limit(dtype, work):
    """What `work()` returns, and the product rate around it."""
    before = product_rate(dtype)
    result = work()
    return result, (before + product_rate(dtype)) / 2


def operations(config, lengths):
    """Multiplications and additions of one forward pass over rows of these lengths (N,)."""
    size, inner = config.hidden_size, config.intermediate_size
    products = 2 * (4 * size**2 + 2 * size * inner)
    attention = 4 * lengths * size  # its two products
    return float(config.num_hidden_layers * (lengths * (products + attention)).sum())


def number(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Table:
    """The rows of the result, printed as they come."""

    def __init__(self):
        self.rows = []

    def add(self, work, beside, ours, theirs, unit, goal, memory=None, their_memory=None):
        """Rates (higher is better) of this project and of what stands beside it; a ratio's goal."""
        ratio = ours / theirs
        row = {"work": work, "beside": beside, "ours": ours, "theirs": theirs, "unit": unit}
        row |= {"ratio": ratio, "goal": goal, "mib": memory, "their_mib": their_memory}
        self.rows.append(row)
        rates = f"{ours:.4g} against {theirs:.4g} {unit}"
        print(f"{work} | {beside}: {rates}, {ratio:.2f}x (goal {goal})", flush=True)

    def markdown(self):
        header = "work,beside,here,there,unit,ratio,goal,MiB here,MiB there".split(",")
        cells = []
        for row in self.rows:
            rates = number(row["ours"]), number(row["theirs"]), row["unit"]
            ratio = f"{row['ratio']:.2f}", row["goal"]
            memory = number(row["mib"]), number(row["their_mib"])
            cells.append([row["work"], row["beside"], *rates, *ratio, *memory])
        return markdown_table(header, cells)


# --- extraction -----------------------------------------------------------------------------------


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


def joined_texts(rows):
    """Single texts; of pairs both in one."""
    if rows.text_b is None:
        return rows.text_a
    return [" ".join(pair) for pair in zip(rows.text_a, rows.text_b)]


def bench_extraction(table, model, rows, dtype, repeats):
    tokenizer, count = load_tokenizer(model), len(rows.labels)
    encoded = encode(tokenizer, rows)
    (seconds, memory), limit = with_limit(
        dtype, lambda: our_extraction(model, tokenizer, encoded, dtype, repeats)
    )
    rate = count / seconds

    few = take(rows, max(8, count // 8))
    seconds, their_memory = usual_extraction(model, tokenizer, few)
    theirs = len(few.labels) / seconds
    work, beside = "extraction, 13 layers x 3 poolings", "transformers, padded to 128, float32"
    table.add(work, beside, rate, theirs, "rows/s", "9", memory, their_memory)

    part = Transformer(model, max_seq_length=128)
    pooling = Pooling(part.get_embedding_dimension())
    sentences = SentenceTransformer(modules=[part, pooling], device=str(DEVICE))
    texts = joined_texts(rows)
    seconds, their_memory = measure(lambda: sentences.encode(texts, batch_size=32), 1)
    beside = "sentence-transformers encode (1 vector), float32"
    table.add("", beside, rate, count / seconds, "rows/s", "3.5", memory, their_memory)

    needed = operations(BertConfig.from_pretrained(model), encoded.lengths)
    table.add("", "the limit", rate, count * limit / needed, "rows/s", "0.65")


# --- the search -----------------------------------------------------------------------------------


def random_features(rows, layers, size, classes):
    """Features (L, N, D) and labels (N,) of which small classifiers reach an F1 of 0.6 to 0.95."""
    random = np.random.default_rng(0)
    labels = random.integers(classes, size=rows)
    centres = random.normal(size=(layers, classes, size))
    features = random.normal(size=(layers, rows, size)) + 0.07 * centres[:, labels]
    return torch.from_numpy(features.astype(np.float32)).to(DEVICE), labels


def plain_classifier(x, y, seed, classes=4, epochs=20):
    """One linear classifier as most would train it: x (N, D), y (N,) -> the module."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(x.shape[1], classes)
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), linear).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=DEVICE).split(128):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def bench_search(table, rows, size, dtype, layers=8, classes=4, seeds=5):
    features, labels = random_features(rows + 1000, layers, size, classes)
    y, fast = torch.from_numpy(labels).to(DEVICE), features.to(dtype)

    # all models at once
    def ours():
        train = fast[:, :rows], y[:rows]
        weights = train_models(*train, classes, list(range(seeds)), 1e-3, Recipe(), dtype)
        return f1_scores(weights, fast[:, rows:], y[rows:], classes)[0]  # (S, M)

    reset_peak()
    f1, seconds = timed(ours)
    memory, models = peak(), (2**layers - 1) * seeds
    rate = models / seconds

    # eight of them, one at a time
    plain, logistic, scores = [], [], []
    for m in np.random.default_rng(1).permutation(np.arange(1, 2**layers))[:8]:
        used = torch.cat([features[k] for k in range(layers) if m >> k & 1], dim=1)  # (N, D)
        model, spent = timed(lambda used=used: plain_classifier(used[:rows], y[:rows], 0, classes))
        plain.append(spent)
        array, classic = used.cpu().numpy(), LogisticRegression(max_iter=1000)
        _, spent = timed(lambda a=array, fit=classic.fit: fit(a[:rows], labels[:rows]))
        logistic.append(spent)
        right = (model(used[rows:]).argmax(1) == y[rows:]).float().mean().item()
        scores.append((f1[:, m].mean(), right, classic.score(array[rows:], labels[rows:])))
    here, one, other = 100 * np.mean(scores, 0)

    work = f"search: {rows:,} rows x {layers} layers x {size}, 20 epochs"
    beside = f"one at a time, plain torch, float32 (8 of them; F1 {one:.1f}, here {here:.1f})"
    table.add(work, beside, rate, 1 / np.mean(plain), "models/s", "20", memory)
    beside = f"LogisticRegression one at a time (F1 {other:.1f})"
    table.add("", beside, rate, 1 / np.mean(logistic), "models/s", "20", memory)
    beside = f"3,825 models in 90 s (here {3825 / rate:.0f} s)"
    table.add("", beside, rate, 3825 / 90, "models/s", "1")


# --- fine-tuning ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """What is fine-tuned, by train.py and by transformers' Trainer."""

    name: str
    model: str
    rows: Rows
    batch_size: int
    precision: str
    repeats: int  # epochs that count, after a first one

    @property
    def dtype(self):
        return pick_precision(self.precision, DEVICE)


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


def trainer(job, tokenizer, folder, tuned, compiled=False):
    """transformers' Trainer and its Clock: padded to 128 in float32; or tuned: dynamic padding,
    grouped by length, our precision."""
    rows = job.rows
    padding = False if tuned else "max_length"
    limits = {"truncation": True, "max_length": 128}
    texts = tokenizer(rows.text_a, rows.text_b, padding=padding, **limits)
    data = []
    for i, label in enumerate(rows.labels):
        data.append({key: values[i] for key, values in texts.items()} | {"labels": label})
    settings = TrainingArguments(
        folder,
        num_train_epochs=1 + job.repeats,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=2 * job.batch_size,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        bf16=tuned and job.dtype == torch.bfloat16,
        fp16=tuned and job.dtype == torch.float16,
        train_sampling_strategy="group_by_length" if tuned else "random",
        use_cpu=DEVICE.type == "cpu",
        dataloader_pin_memory=DEVICE.type == "cuda",
        torch_compile=compiled,
    )
    clock = Clock()
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, num_labels=3, dtype=torch.float32
    )
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    theirs = Trainer(model, settings, collator, data, callbacks=[clock])
    return theirs, clock


class Steps(train.Log):
    """train.py's log, which keeps the seconds of each epoch's steps, and the last one's memory."""

    seconds, memory = [], 0.0

    def restart_clock(self):
        reset_peak()
        wait()
        super().restart_clock()

    def train(self, *numbers):
        wait()
        Steps.seconds.append(time.perf_counter() - self.clock)
        Steps.memory = peak()
        return super().train(*numbers)


def our_training(job, epochs, *flags):
    """Seconds of the steps of each of train.py's epochs (a list), and the last one's memory.

    Nothing is saved; what is evaluated, one row, is not counted.
    """
    Steps.seconds = []
    names = [f"class {label}" for label in job.rows.labels]
    columns = {"text_a": job.rows.text_a, "text_b": job.rows.text_b, "label": names}
    nothing_saved = mock.patch.multiple(
        train,
        Log=Steps,
        LOG_STEPS=1 << 30,
        update_mean=lambda *_: {},
        save_epoch=mock.DEFAULT,
        save_state=mock.DEFAULT,
        save_model=mock.DEFAULT,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        nothing_saved,
    ):
        data = Path(folder)
        (data / "labels.txt").write_text("".join(f"{name}\n" for name in sorted(set(names))))
        write_columns(data / "train.en.tsv", columns)
        write_columns(data / "dev.en.tsv", {name: part[:1] for name, part in columns.items()})
        command = ["--model", job.model, "--data", data, "--out", data / "run"]
        command += ["--batch-size", job.batch_size, "--precision", job.precision]
        train.main([str(flag) for flag in (*command, "--epochs", epochs, *flags)])
    gc.collect()
    return Steps.seconds, Steps.memory


def bench_training(table, job, compiled):
    """Fine-tuning beside Trainer, plain and, where asked, compiled."""
    tokenizer, count = load_tokenizer(job.model), len(job.rows.labels)

    def ours(*flags):
        seconds, memory = our_training(job, 1 + job.repeats, "--head", "pooler", *flags)
        return count / np.median(seconds[1:]), memory

    def beside(tuned, part, what, goal, compiled=False):
        """Add a line: our rate and memory beside those of a Trainer."""
        gc.collect()  # the last one's memory must not count
        with tempfile.TemporaryDirectory() as folder:
            theirs, clock = trainer(part, tokenizer, folder, tuned, compiled)
            reset_peak()
            theirs.train()
        their_rate = len(part.rows.labels) / np.median(clock.seconds[1:])
        work = "" if tuned else f"fine-tuning, {job.name}"
        table.add(work, what, rate, their_rate, "examples/s", goal, memory, peak())

    (rate, memory), limit = with_limit(job.dtype, ours)
    few = job._replace(rows=take(job.rows, max(2 * job.batch_size, count // 8)), repeats=1)
    beside(False, few, "Trainer, padded to 128, float32", "6")
    tuned = "Trainer tuned: dynamic padding, by length, same precision"
    beside(True, job, tuned, "1.25")
    encoded = encode(tokenizer, job.rows)
    needed = 3 * operations(BertConfig.from_pretrained(job.model), encoded.lengths)
    table.add("", "the limit", rate, count * limit / needed, "examples/s", "0.5")
    if compiled:
        plain, (rate, memory) = rate, ours("--compile")
        work = f"fine-tuning, {job.name}, --compile"
        table.add(work, "not compiled", rate, plain, "examples/s", "")
        beside(True, job, f"{tuned}, compiled", "1.25", compiled=True)


def their_prediction(job, tokenizer, order):
    """Median seconds and peak memory (MiB) of Trainer.predict on the rows in this order."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, _ = trainer(job, tokenizer, folder, tuned=True)
        data = [theirs.train_dataset[i] for i in order]
        return measure(lambda: theirs.predict(data), job.repeats)


def bench_evaluation(table, job):
    """Predicting all rows with BERT's own head, as evaluate.py does, beside Trainer.predict."""
    tokenizer, count = load_tokenizer(job.model), len(job.rows.labels)
    encoded = encode(tokenizer, job.rows)
    by_length = np.argsort(-encoded.lengths, kind="stable")  # its own order would pad more
    their_seconds, their_memory = their_prediction(job, tokenizer, by_length.tolist())
    gc.collect()  # its memory must not count in ours
    settings = Settings(["a", "b", "c"], head="pooler")
    classifier = Classifier(load_encoder(job.model)[0], settings).to(DEVICE)

    def ours():
        batches = eval_batches(encoded, tokenizer.pad_token_id, 128)
        predict(classifier, batches, count, job.dtype)

    seconds, memory = measure(ours, job.repeats)
    rates = count / seconds, count / their_seconds
    beside = "Trainer.predict tuned: sorted, same precision"
    table.add("evaluation", beside, *rates, "rows/s", "1.25", memory, their_memory)


def bench_freezing(table, job):
    """Steps before and after the lower half is frozen, in one run."""
    blocks = BertConfig.from_pretrained(job.model).num_hidden_layers
    low, half = blocks // 2, 1 + job.repeats
    chosen = sorted({low, 2 * blocks // 3, blocks - 1})  # of 12: 6 8 11
    for name, flags, used in (
        ("", ["--head", "pooler"], blocks),
        (", MC-BERT", ["--layers", *chosen], max(chosen)),
    ):
        freezing = ["--freeze-layers", *range(low + 1), "--freeze-epoch", half]
        seconds, _ = our_training(job, 2 * half, *flags, *freezing)
        before, after = np.median(seconds[1:half]), np.median(seconds[half + 1 :])
        operations = 3 * used / (low + 3 * (used - low))  # a backward pass costs two forward ones
        count = len(job.rows.labels)
        work = f"embeddings and lowest {low} frozen{name}"
        beside = f"before freezing (in operations: {operations:.2f})"
        table.add(work, beside, count / after, count / before, "examples/s", "1.6")


# --- tokens ---------------------------------------------------------------------------------------


def bench_tokens(table, model, rows, count):
    tokenizer = load_tokenizer(model)
    repeats = -(-count // len(rows.text_a))
    many = take(Rows(rows.text_a * repeats, rows.text_b * repeats), count)
    few = take(many, max(1, count // 8))
    _, seconds = timed(lambda: encode(tokenizer, many))
    _, their_seconds = timed(
        lambda: tokenizer(few.text_a, few.text_b, truncation=True, max_length=128)
    )
    rates = count / seconds, len(few.text_a) / their_seconds
    beside = "the tokenizer, an eighth of them in one call"
    table.add(f"tokenising {count:,} rows", beside, *rates, "rows/s", "")


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


PARTS = ["extraction", "search", "small", "full", "tokens"]


def parse_args(argv):
    parser = make_parser(__doc__)
    add, positive = parser.add_argument, in_range(int, 1)
    add("--model", required=True, help="encoder: hub name or folder")
    add("--data", required=True, help="data set folder: pairs, three labels")
    add("--out", required=True, help="folder for bench.json and bench.md")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    add(
        "--rows",
        type=positive,
        default=640,
        help="rows of a pass, the small model's has four times as many (default: 640)",
    )
    add(
        "--search-rows",
        type=positive,
        default=4000,
        help="train rows of the search (default: 4000)",
    )
    add(
        "--token-rows",
        type=positive,
        default=392_702,
        help="rows to tokenise (default: 392702)",
    )
    add("--batch-size", type=positive, default=32, help="rows of a training step (default: 32)")
    add("--repeats", type=positive, default=3, help="passes that count (default: 3)")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="(default: auto)",
    )
    add("--compile", action="store_true", help="fine-tune compiled too, beside Trainer's")
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
    where = f"{torch.get_num_threads()} CPU threads"
    if DEVICE.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, {dtype}: {limit / 1e12:.3f} TFLOP/s in matrix products")
    config = load_encoder(args.model)[0].config
    size = f"{config.num_hidden_layers} x {config.hidden_size}"
    how = args.batch_size, args.precision, args.repeats

    if "extraction" in args.only:
        bench_extraction(table, args.model, rows, dtype, args.repeats)
    if "search" in args.only:
        products = torch.float32 if dtype == torch.float16 else dtype
        bench_search(table, args.search_rows, config.hidden_size, products)
    if "small" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            more = take(everything, 4 * args.rows)
            small = Job("6 x 384", small_bert(folder, args.model), more, *how)
            bench_training(table, small, args.compile)
    if "full" in args.only:
        full = Job(size, args.model, rows, *how)
        bench_training(table, full, args.compile)
        bench_evaluation(table, full)
        bench_freezing(table, full)
    if "tokens" in args.only:
        bench_tokens(table, args.model, everything, args.token_rows)

    text = f"""\
{where}, {str(dtype).removeprefix("torch.")}, {limit / 1e12:.3f} TFLOP/s in matrix products;
passes of {len(rows.labels)} rows (6 x 384: four times as many)

{table.markdown()}
"""
    about = {"where": where, "dtype": str(dtype), "product_rate": limit, "rows": table.rows}
    about |= {"model": revision(args.model), "versions": versions()}
    write_json(Path(args.out) / "bench.json", about)
    with write_atomic(Path(args.out) / "bench.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
