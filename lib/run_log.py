"""What a run shows: the bar, TensorBoard, metrics.jsonl."""

import json
import time

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib.devices import start_processes
from lib.folders import write_atomic
from lib.messages import progress_bar


class Log:
    """What the first process shows of a run: the progress bar, lines on the screen, TensorBoard, metrics.jsonl."""

    def __init__(self, out, step, steps):
        self.out, self.writer = (
            out,
            SummaryWriter(out, purge_step=step + 1) if start_processes()[0] == 0 else None,
        )
        self.bar = progress_bar(
            total=steps, initial=step, unit="step", disable=not self.writer, smoothing=0.05
        )
        self.restart()

    def close(self):
        self.bar.close()
        if self.writer:
            self.writer.close()

    def restart(self):
        """Measure the speed from here on: not with evaluations and saves."""
        self.rows, self.clock = 0, time.perf_counter()

    def step(self, rows):
        """One more step, of so many rows."""
        self.rows += rows
        self.bar.update()

    def say(self, sentence):
        if self.writer:
            tqdm.write(sentence)

    def scalars(self, step, values):
        for tag, value in values.items() if self.writer else ():
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
        """An evaluation's rows, in all places; `metrics` are the rows so far, these too."""
        if not self.writer:
            return
        step, frozen, shown = rows[0]["step"], rows[0]["frozen_layers"], {}
        for row in rows:
            shown.setdefault(row["split"], []).append(
                f"{row['language']} {100 * row['accuracy']:.1f}".strip()
            )
            self.scalars(
                step,
                {
                    f"{kind}/{row['split']}/{row['language']}": row[kind]
                    for kind in ("accuracy", "loss")
                    if row["split"] != "train"
                },
            )
        self.scalars(step, {"frozen layers": len(frozen)})
        self.writer.add_text("frozen layers", " ".join(map(str, frozen)) or "none", step)
        self.writer.flush()
        with write_atomic(self.out / "metrics.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in metrics)
        shown = "  ".join(f"{split}: {' '.join(accuracies)}" for split, accuracies in shown.items())
        self.say(f"epoch {rows[0]['epoch']:.4g}  {shown}")
