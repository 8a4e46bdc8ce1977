"""Speed: this project beside what a user would run instead, and beside the limit of the machine.

    make bench MODEL=bert-base-multilingual-uncased DATA=data/xnli
    python bench.py --model bert-base-multilingual-uncased --data data/xnli --out bench

Reads   a model folder (BERT; its weights may be random, speed does not know) and the English files of a data set.
Writes  OUT/bench.json and OUT/bench.md: for each piece of work this project's rate, the other's, and the ratio.
        Medians over passes of the same rows, the first pass not counted; the slowest ways have one pass (padded to 128,
        sentence-transformers, the search). Peak memory of the process in the passes; the models of one way at a time.
The limit is the rate of this machine's matrix products (2048 x 2048, measured right before and after the work, the
mean of both) over the operations that the unpadded tokens need. transformers' Trainer, sentence-transformers and
scikit-learn are needed here alone (requirements-bench.txt).
"""
import argparse
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sklearn.linear_model import LogisticRegression
from transformers import (AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel, DataCollatorWithPadding,
                          Trainer, TrainerCallback, TrainingArguments)

import train
from data import (collate, encode, encode_split, read_labels, read_split, sorted_batches, take, train_batches,
                  write_table)
from device import autocast, pick_device, pick_precision, to_device, versions
from extract import pool_all
from files import UserError, cli, in_range, markdown_table, write_atomic, write_json
from frozen import FrozenStates
from grid_search import confusion_matrices, train_models
from model import drop_pooler, keep_tokens, load_encoder, load_tokenizer, model_identity, predict
from ranking import micro_f1

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
        return torch.cuda.max_memory_allocated() / 2 ** 20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
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
    return max(products * 2 * size ** 3 / measure(lambda: [a @ b for _ in range(products)], 1)[0] for _ in range(5))


def with_limit(dtype, work):
    """What `work()` returns, and the product rate around it."""
    before = product_rate(dtype)
    found = work()
    return found, (before + product_rate(dtype)) / 2


def operations(config, lengths):
    """Multiplications and additions of one forward pass over rows of these lengths: (N,) -> a number."""
    size, inner = config.hidden_size, config.intermediate_size
    per_token = 2 * (4 * size ** 2 + 2 * size * inner) + 4 * lengths * size  # products, and attention's two
    return float(config.num_hidden_layers * (lengths * per_token).sum())


class Table:
    """The rows of the result, printed as they come."""

    def __init__(self):
        self.rows = []

    def add(self, work, beside, ours, theirs, unit, goal, memory=None, their_memory=None):
        """Rates (higher is better) of this project and of what stands beside it; their ratio against a goal."""
        self.rows.append({"work": work, "beside": beside, "ours": ours, "theirs": theirs, "unit": unit,
                          "ratio": ours / theirs, "goal": goal, "mib": memory, "their_mib": their_memory})
        print(f"{work} | {beside}: {ours:.4g} against {theirs:.4g} {unit}, {ours / theirs:.2f}x (goal {goal})",
              flush=True)

    def markdown(self):
        def number(value):
            return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

        return markdown_table(["work", "beside", "here", "there", "unit", "ratio", "goal", "MiB here", "MiB there"], [
            [r["work"], r["beside"], number(r["ours"]), number(r["theirs"]), r["unit"], f"{r['ratio']:.2f}", r["goal"],
             number(r["mib"]), number(r["their_mib"])] for r in self.rows])


# --- extraction --------------------------------------------------------------------------------------------------

def our_extraction(model, tokenizer, encoded, dtype, repeats):
    encoder, _ = load_encoder(model)
    drop_pooler(encoder)
    encoder.to(DEVICE).eval()

    def work():
        with torch.inference_mode(), autocast(DEVICE, dtype):
            for index in sorted_batches(encoded.lengths, 64):
                batch = to_device(collate(encoded, index, tokenizer.pad_token_id, 128), DEVICE)
                pool_all(encoder, batch).cpu().numpy().astype(np.float16)

    return measure(work, repeats)


def usual_extraction(model, tokenizer, rows):
    """What most notebooks do."""
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).to(DEVICE).eval()

    def work():
        with torch.no_grad():
            for start in range(0, len(rows.labels), 32):
                part = slice(start, start + 32)
                batch = tokenizer(rows.text_a[part], rows.text_b[part] if rows.text_b else None, padding="max_length",
                                  max_length=128, truncation=True, return_tensors="pt").to(DEVICE)
                mask = batch["attention_mask"][:, :, None].float()
                for states in encoder(**batch, output_hidden_states=True).hidden_states:
                    states.masked_fill(mask == 0, -1e9).amax(1).cpu().numpy()
                    ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()
                    states[:, 0].cpu().numpy()

    return measure(work, 1)


def bench_extraction(table, model, rows, dtype, repeats):
    tokenizer, count = load_tokenizer(model), len(rows.labels)
    encoded = encode(tokenizer, rows)
    (seconds, memory), limit = with_limit(dtype, lambda: our_extraction(model, tokenizer, encoded, dtype, repeats))
    rate = count / seconds
    few = take(rows, max(8, count // 8))
    seconds, theirs = usual_extraction(model, tokenizer, few)
    table.add("extraction, 13 layers x 3 poolings", "transformers, padded to 128, float32", rate,
              len(few.labels) / seconds, "rows/s", "9", memory, theirs)
    part = Transformer(model, max_seq_length=128)
    sentences = SentenceTransformer(modules=[part, Pooling(part.get_embedding_dimension())], device=str(DEVICE))
    texts = [" ".join(pair) for pair in zip(rows.text_a, rows.text_b)] if rows.text_b else rows.text_a
    seconds, theirs = measure(lambda: sentences.encode(texts, batch_size=32), 1)
    table.add("", "sentence-transformers encode (1 vector), float32", rate, count / seconds, "rows/s", "3.5", memory,
              theirs)
    need = operations(BertConfig.from_pretrained(model), encoded.lengths)
    table.add("", "the limit", rate, count * limit / need, "rows/s", "0.65")


# --- the search --------------------------------------------------------------------------------------------------

def plain_classifier(x, y, seed, classes=4, epochs=20):
    """One linear classifier, trained as most would: nn.Linear, dropout, Adam. x (N, D) -> the module."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(x.shape[1], classes)).to(DEVICE)
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
    x = random.normal(size=(layers, len(labels), size)) + 0.07 * centres[:, labels]  # F1 between 0.6 and 0.95
    features = torch.from_numpy(x.astype(np.float32)).to(DEVICE)
    y = torch.from_numpy(labels).to(DEVICE)
    fast, found = features.to(dtype), {}

    def ours():
        models = train_models(fast[:, :rows], y[:rows], classes, list(range(seeds)))
        found["f1"] = micro_f1(confusion_matrices(*models, fast[:, rows:], y[rows:], classes))  # (S, M)

    reset_peak()
    wait()
    start = time.perf_counter()
    ours()  # no pass to warm up: it has thousands of steps
    wait()
    seconds, memory = time.perf_counter() - start, peak()
    models = (2 ** layers - 1) * seeds
    subsets = [int(m) for m in random.permutation(np.arange(1, 2 ** layers))[:8]]
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
        scores.append((found["f1"][:, m].mean(), (model(used[rows:]).argmax(1) == y[rows:]).float().mean().item(),
                       other.score(array[rows:], labels[rows:])))
    f1 = 100 * np.mean(scores, 0)
    table.add(f"search: {rows:,} rows x {layers} layers x {size}, 20 epochs",
              f"one at a time, plain torch, float32 ({len(subsets)} of them; F1 {f1[1]:.1f}, here {f1[0]:.1f})",
              models / seconds, 1 / np.mean(plain), "models/s", "20", memory)
    table.add("", f"LogisticRegression one at a time (F1 {f1[2]:.1f})", models / seconds, 1 / np.mean(logistic),
              "models/s", "20", memory)
    table.add("", f"3,825 models in 90 s (here {3825 / models * seconds:.0f} s)", models / seconds, 3825 / 90,
              "models/s", "1")


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


def trainer(model, tokenizer, rows, batch_size, folder, tuned, repeats, dtype, labels=3):
    """transformers' Trainer on these rows: padded to 128 in float32, or tuned: dynamic padding, grouped by length."""
    texts = tokenizer(rows.text_a, rows.text_b, truncation=True, max_length=128,
                      padding=False if tuned else "max_length")
    data = [{**{key: values[i] for key, values in texts.items()}, "labels": rows.labels[i]}
            for i in range(len(rows.labels))]
    low = tuned and dtype != torch.float32
    settings = TrainingArguments(
        folder, num_train_epochs=1 + repeats, per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no", bf16=low and dtype == torch.bfloat16, fp16=low and dtype == torch.float16,
        train_sampling_strategy="group_by_length" if tuned else "random", use_cpu=DEVICE.type == "cpu",
        dataloader_pin_memory=DEVICE.type == "cuda")
    clock = Clock()
    module = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, dtype=torch.float32)
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    return Trainer(module, settings, data_collator=collator, train_dataset=data, callbacks=[clock]), clock


def our_steps(model, tokenizer, encoded, batch_size, dtype, head, layers=()):
    """train.py's State, an epoch of its steps as a function, and the rows as its encoder numbers their tokens."""
    labels = [str(i) for i in range(3)]
    classifier, *_ = train.build(model, labels, head, layers, None, "max", 0.1, None, 0, 0)
    new_ids = keep_tokens(classifier.encoder, np.unique(encoded.ids), tokenizer.pad_token_id)
    encoded = encoded._replace(ids=new_ids[encoded.ids])
    state = train.State(classifier.to(DEVICE), 0.0, dtype)

    def work(kept=None):
        classifier.train()
        for index in train_batches(encoded.lengths, batch_size, 0, 0):
            parts = list(train.micro_batches(encoded, index, tokenizer.pad_token_id, 128, DEVICE, 1, 0, 1, kept))
            train.train_step(classifier, state.optimizer, 1e-5, state.scaler, parts, len(index), dtype, 1.0, 1)

    return state, work, encoded


def our_training(model, tokenizer, encoded, batch_size, dtype, repeats, full):
    """Measure train.py's steps under the head that Trainer trains: ((seconds, MiB), limit), and with `full` its
    prediction: (seconds, MiB)."""
    state, work, encoded = our_steps(model, tokenizer, encoded, batch_size, dtype, "pooler")
    steps = with_limit(dtype, lambda: measure(work, repeats))
    return steps, full and measure(lambda: predict(state.model, encoded, tokenizer.pad_token_id, dtype), repeats)


def our_freezing(model, tokenizer, encoded, batch_size, dtype, repeats, head, layers, frozen):
    """Seconds of an epoch before freezing, after it, and with the frozen layers' states kept."""
    state, work, encoded = our_steps(model, tokenizer, encoded, batch_size, dtype, head, layers)
    before, _ = measure(work, repeats)
    state.freeze(frozen)
    after, _ = measure(work, repeats)
    with tempfile.TemporaryDirectory() as folder:
        kept = FrozenStates(state.model, encoded, frozen, Path(folder) / "states", tokenizer.pad_token_id, dtype, 128,
                            64, 0)
    return before, after, measure(lambda: work(kept), repeats)[0]


def bench_training(table, name, model, rows, batch_size, dtype, repeats, full):
    """Fine-tuning beside Trainer; with `full` evaluation and freezing too."""
    tokenizer, config, count = load_tokenizer(model), BertConfig.from_pretrained(model), len(rows.labels)
    encoded = encode(tokenizer, rows)
    ours = model, tokenizer, encoded, batch_size, dtype, repeats
    ((seconds, memory), limit), prediction = our_training(*ours, full)
    rate = count / seconds
    with tempfile.TemporaryDirectory() as folder:
        few = take(rows, max(2 * batch_size, count // 8))
        for tuned, part, passes, goal in ((False, few, 1, "6"), (True, rows, repeats, "1.25")):
            theirs, clock = trainer(model, tokenizer, part, batch_size, folder, tuned, passes, dtype)
            reset_peak()
            theirs.train()
            table.add(f"fine-tuning, {name}" * (not tuned), "Trainer tuned: dynamic padding, by length, same precision"
                      if tuned else "Trainer, padded to 128, float32", rate,
                      len(part.labels) / np.median(clock.seconds[1:]), "examples/s", goal, memory, peak())
            if tuned and full:
                order = np.argsort(-encoded.lengths, kind="stable")  # Trainer's own order would pad more
                texts = tokenizer(rows.text_a, rows.text_b, truncation=True, max_length=128)
                data = [{key: values[i] for key, values in texts.items()} for i in order]
                its = measure(lambda: theirs.predict(data), repeats)
            theirs = None  # its memory must not count in the next one's
            gc.collect()
    need = 3 * operations(config, encoded.lengths)
    table.add("", "the limit", rate, count * limit / need, "examples/s", "0.5")
    if full:
        table.add("evaluation", "Trainer.predict tuned: sorted, same precision", count / prediction[0], count / its[0],
                  "rows/s", "1.25", prediction[1], its[1])
        blocks = config.num_hidden_layers
        low, chosen = blocks // 2, sorted({blocks // 2, 2 * blocks // 3, blocks - 1})  # of 12: 6; 6 8 11
        for name, head, layers in (("", "pooler", ()), (", MC-BERT", "layers", chosen)):
            before, after, kept = our_freezing(*ours, head, layers, [*range(low + 1)])
            used = max(layers, default=blocks)  # a backward pass costs two forward ones:
            above = 3 * (used - low)
            for what, seconds, left in ((f"embeddings and lowest {low} frozen{name}", after, low + above),
                                        ("the same, --freeze-cache", kept, above)):
                table.add(what, f"before freezing (in operations: {3 * used / left:.2f})", count / seconds,
                          count / before, "examples/s", "1.6")


# --- tokens ------------------------------------------------------------------------------------------------------

def bench_tokens(table, model, rows, labels, count):
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "train.en.tsv", {name: [texts[i % len(texts)] for i in range(count)]
                                                    for name, texts in rows.columns(labels).items()})
        seconds = []
        for _ in range(2):
            start, used = time.perf_counter(), time.process_time()
            encode_split(tokenizer, "bench", folder, "train", "en", labels)
            seconds.append(time.perf_counter() - start)
            print(f"{count:,} rows: {seconds[-1]:.2f} s, {(time.process_time() - used) / seconds[-1]:.1f} cores busy")
    table.add(f"tokenising {count:,} rows, again", "the first time", 1 / seconds[1], 1 / seconds[0], "1/s", "")
    table.add("", "in 2 s", 1 / seconds[1], 1 / 2, "1/s", "1")


def small_bert(folder, model, layers=6, size=384):
    """A BERT of 6 x 384 with random weights and the model's own tokenizer, in `folder`."""
    config = BertConfig.from_pretrained(model, hidden_size=size, num_hidden_layers=layers, num_attention_heads=12,
                                        intermediate_size=4 * size)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder: hub name or folder")
    parser.add_argument("--data", required=True, help="data set folder with train.en.tsv")
    parser.add_argument("--out", required=True, help="folder for bench.json and bench.md")
    parser.add_argument("--only", nargs="+", choices=["extraction", "search", "small", "full", "tokens"],
                        default=["extraction", "search", "small", "full", "tokens"], help="parts (default: all)")
    parser.add_argument("--rows", type=in_range(int, 1), default=640,
                        help="rows of a pass, the small model's has four times as many (default: 640)")
    parser.add_argument("--search-rows", type=in_range(int, 1), default=4000,
                        help="train rows of the search (default: 4000)")
    parser.add_argument("--token-rows", type=in_range(int, 1), default=392_702,
                        help="rows to tokenise (default: 392702)")
    parser.add_argument("--batch-size", type=in_range(int, 1), default=32, help="rows of a training step (default: 32)")
    parser.add_argument("--repeats", type=in_range(int, 1), default=3, help="passes that count (default: 3)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="(default: auto)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    dtype = pick_precision(args.precision, DEVICE)
    labels = read_labels(args.data)
    everything = read_split(args.data, "train", "en", labels)
    rows = take(everything, args.rows)
    if len(labels) != 3 or rows.text_b is None:
        raise UserError(f"{args.data}: the bench wants pairs and three labels, as XNLI has")
    limit, table = product_rate(dtype), Table()
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, {dtype}: {limit / 1e12:.3f} TFLOP/s in matrix products")
    encoder = load_encoder(args.model)[0]
    config, identity = encoder.config, model_identity(encoder, load_tokenizer(args.model), args.model)
    del encoder
    if "extraction" in args.only:
        bench_extraction(table, args.model, rows, dtype, args.repeats)
    if "search" in args.only:
        bench_search(table, args.search_rows, 8, config.hidden_size, 4, dtype if dtype != torch.float16 else
                     torch.float32)
    if "small" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            bench_training(table, "6 x 384", small_bert(folder, args.model), take(everything, 4 * args.rows),
                           args.batch_size, dtype, args.repeats, False)
    if "full" in args.only:
        bench_training(table, f"{config.num_hidden_layers} x {config.hidden_size}", args.model, rows, args.batch_size,
                       dtype, args.repeats, True)
    if "tokens" in args.only:
        bench_tokens(table, args.model, everything, labels, args.token_rows)
    text = (f"{where}, {str(dtype).removeprefix('torch.')}, {limit / 1e12:.3f} TFLOP/s in matrix products; "
            f"passes of {len(rows.labels)} rows (6 x 384: four times as many)\n\n{table.markdown()}\n")
    write_json(Path(args.out) / "bench.json", {"where": where, "dtype": str(dtype), "product_rate": limit,
                                               "rows": table.rows, "model": identity, "versions": versions()})
    with write_atomic(Path(args.out) / "bench.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
