"""What the first process shows of a run: the banner, the progress bar, lines on the screen,
TensorBoard, metrics.jsonl."""

import json
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib.devices import describe_device, start_processes
from lib.folders import write_text
from lib.messages import progress_bar


class Log:
    """Shows a run; the other processes' show nothing."""

    def __init__(self, out):
        self.out = out
        self.shows = start_processes()[0] == 0
        self.writer = self.bar = None

    def start(self, step, steps):
        """The run has done `step` of `steps` steps."""
        if self.shows:
            self.writer = SummaryWriter(self.out, purge_step=step + 1)
        self.bar = progress_bar(
            total=steps, initial=step, unit="step", disable=not self.shows, smoothing=0.05
        )
        self.restart_clock()

    def close(self):
        """End the bar's line and write what TensorBoard has not got yet, after an error too."""
        for part in (self.bar, self.writer):
            if part is not None:
                part.close()

    def restart_clock(self):
        """Measure the speed from here on: not with evaluations and saves."""
        self.rows, self.clock = 0, time.perf_counter()

    def step(self, rows):
        """One more step, of so many rows."""
        self.rows += rows
        self.bar.update()

    def say(self, sentence):
        if self.shows:
            tqdm.write(sentence)

    def scalars(self, step, values):
        """Numbers for TensorBoard, by tag."""
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def train(self, step, loss, accuracy, rate):
        """How training goes; returns its examples a second."""
        speed = self.rows / (time.perf_counter() - self.clock)
        self.scalars(
            step,
            {
                "train/loss": loss,
                "train/accuracy": accuracy,
                "lr": rate,
                "examples per second": speed,
            },
        )
        self.bar.set_postfix_str(
            f"{speed:.0f} examples/s, loss {loss:.3f}, accuracy {100 * accuracy:.1f}, "
            f"lr {rate:.1e}",
            refresh=False,
        )
        return speed

    def evaluation(self, rows, metrics):
        """An evaluation's rows, in all places; `metrics` are all rows so far, these too."""
        if not self.shows:
            return
        step, shown = rows[0]["step"], {}
        for row in rows:
            name = f"{row['split']}/{row['language']}"
            if row["split"] != "train":  # which train() has shown
                values = {f"accuracy/{name}": row["accuracy"], f"loss/{name}": row["loss"]}
                self.scalars(step, values)
            accuracy = f"{row['language']} {100 * row['accuracy']:.1f}"
            shown.setdefault(row["split"], []).append(accuracy.strip())
        self.scalars(step, {"frozen layers": len(rows[0]["frozen_layers"])})
        self.writer.flush()
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
        line = "  ".join(f"{split}: {' '.join(texts)}" for split, texts in shown.items())
        self.say(f"epoch {rows[0]['epoch']:.4g}  {line}")


def metric_rows(scores, epoch, step, rate, frozen, speed):
    """An evaluation's rows of metrics.jsonl.

    scores: {(split, language): (accuracy, loss)}; epoch: how many are done, an int at the end of
    one; frozen: layers; speed: examples a second.
    """
    rows = []
    for (split, language), (accuracy, loss) in scores.items():
        rows.append(
            {
                "epoch": epoch,
                "step": step,
                "split": split,
                "language": language,
                "accuracy": accuracy,
                "loss": loss,
                "lr": rate,
                "frozen_layers": frozen,
                "examples_per_second": round(speed, 1),
            }
        )
    return rows


def trainable(model):
    """Number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def precision_line(dtype, asked):
    """Device and precision of matrix products, with the reason."""
    reason = "as asked"
    if asked == "auto":
        reason = {
            torch.bfloat16: "the hardware has it",
            torch.float16: "the GPU has no bf16",
            torch.float32: "the hardware has no bf16",
        }[dtype]
    return f"{describe_device()}, {str(dtype).removeprefix('torch.')} products ({reason})"


def data_line(model):
    """What is trained."""
    kept, whole = len(model.encoder.kept_rows), len(model.encoder.whole_table)
    return (
        f"{kept:,} of {whole:,} word pieces are in the data; the others stay as they are\n"
        f"{trainable(model):,} parameters to train"
    )
