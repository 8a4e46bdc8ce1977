"""Phase 2: fine-tune the encoder with a classifier over chosen layers, and freeze layers on the go.

    python train.py --model bert-base-multilingual-uncased --data data/xnli --out runs/mc-bert-wf \\
        --layers 6 8 11 --pooling max --freeze-layers 9 11 12 --freeze-epoch 2
    python train.py --model bert-base-multilingual-uncased --data data/xnli --out runs/baseline --head pooler

Reads   DATA/train.LANG.tsv and DATA/dev.*.tsv (test.*.tsv only with --track-test), and the encoder.
Writes  OUT/run.json, OUT/metrics.jsonl, TensorBoard events, OUT/epochs/K/ (the model after epoch K: the last, and each
        that is best so far on some dev set), OUT/resume/; DATA/.tokens/, token ids for the next time.
        Stopped and started again with the same command it goes on.
Paper   sections 1.4 and 1.6; conclusions 1, 2, 6, 7 and 8.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data import collate, encode_split, fingerprint, read_labels, split_languages, split_path, train_batches
from device import agree, autocast, out_of_memory, pick_device, pick_precision, start_processes, to_device, versions
from files import UserError, claim, cli, finish_folder, in_range, progress_bar, read_json, start_folder, write_atomic
from frozen import FrozenStates
from model import (POOLINGS, Classifier, blocks, check_layers, cut_after, drop_pooler, freeze_layers, keep_tokens,
                   layer_parameters, load_encoder, load_tokenizer, model_identity, predict, save_model, token_limit)


# --- the pieces of a step ----------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, schedule, warmup=0.1):
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then linear decay to 0 or constant."""
    ramp = max(1, round(steps * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * (steps - step) / max(1, steps - ramp) if schedule == "linear" else peak


def make_optimizer(model, weight_decay):
    """Adam with decoupled weight decay, on matrices alone as BERT does; with 0 it is plain Adam."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def wrap(model, world):
    """The module to call in training: the model, or its DistributedDataParallel; to be made anew after freezing."""
    return DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model


def train_step(wrapped, optimizer, rate, scaler, batches, rows, dtype, clip, world):
    """One optimizer step on one global batch of `rows` rows, of which `batches` are this process's micro-batches.

    The gradient is that of the mean cross-entropy over all rows. Returns this process's summed loss and number of
    right answers, as tensors on the device: nothing here waits for it.
    """
    loss_sum, right = 0.0, 0
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last or world == 1 else wrapped.no_sync():
            with autocast(batch["labels"].device, dtype):
                logits = wrapped(batch)                                                           # (B, C)
            loss = F.cross_entropy(logits.float(), batch["labels"], reduction="sum", ignore_index=-1)
            scaler.scale(loss * (world / rows)).backward()  # DDP averages over processes
        loss_sum += loss.detach()
        right += (logits.argmax(1) == batch["labels"]).sum()
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, right


def micro_batches(encoded, rows, pad_id, limit, device, accumulate, rank, world, kept=None):
    """This process's share of a global batch, as `accumulate` batches on the device; a share without rows is one row
    whose label is -1, which counts for nothing. `kept`: the FrozenStates to begin with."""
    mine = rows[rank::world]
    for part in np.array_split(mine, min(accumulate, max(1, len(mine)))):
        shown = part if len(part) else rows[:1]
        batch = collate(encoded, shown, pad_id, limit)
        batch["labels"] = batch["labels"] if len(part) else np.full(1, -1)
        if kept:
            batch["states"] = kept.of(batch, shown)
        yield to_device(batch, device)


# --- evaluation and what is kept ---------------------------------------------------------------------------------

def evaluate(model, sets, pad_id, dtype, limit, batch_size):
    """Accuracy and mean cross-entropy on each set: {(split, language): (accuracy, loss)}. Leaves the model training."""
    scores = {}
    for key, encoded in sets.items():
        logits = torch.from_numpy(predict(model, encoded, pad_id, dtype, limit, batch_size, f"{key[0]} {key[1]}"
                                          if start_processes()[0] == 0 else None))
        labels = torch.from_numpy(encoded.labels)
        scores[key] = ((logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item())
    model.train()
    return scores


def choosing_scores(scores):
    """What epochs are chosen by: each language's dev accuracy; `joint` and, where test is tracked, `test`: the mean of
    the non-English dev and test sets."""
    chosen = {language: accuracy for (split, language), (accuracy, _) in scores.items() if split == "dev"}
    for name, wanted in (("joint", "dev"), ("test", "test")):
        others = [accuracy for (split, language), (accuracy, _) in scores.items()
                  if split == wanted and language != "en"]
        if others:
            chosen[name] = float(np.mean(others))
    return chosen


def best_epochs(history):
    """{protocol: epoch}, from {epoch: choosing_scores()}: the best epoch by each; ties go to the earlier one."""
    protocols = next(iter(history.values()), {})
    return {name: max(history, key=lambda epoch: (round(history[epoch][name], 9), -epoch)) for name in protocols}


class State:
    """All that a stopped run needs to go on as if it had never stopped: weights, optimizer, scaler, and where it was.

    What is random in a step depends on (seed, step, process) alone and needs no saving.
    """

    def __init__(self, model, weight_decay, dtype, freeze_lr=0.0):
        self.freeze_lr = freeze_lr
        self.model, self.optimizer = model, make_optimizer(model, weight_decay)
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.step, self.frozen = 0, []  # optimizer steps done; layers frozen
        self.weight_decay, self.decay = weight_decay, 1.0  # decay: of embedding rows that the data does not use
        self.metrics, self.history = [], {}  # rows; {epoch: choosing_scores()}
        self.best_joint = -1.0  # for automatic freezing
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, rows since the last evaluation

    def freeze(self, layers):
        """Freeze these layers now: their weights cannot move any more, and the optimizer forgets them.

        The control of --freeze-lr: they go on instead, at that factor times the others' learning rate.
        """
        if self.freeze_lr:
            slow = {id(parameter) for parameter in layer_parameters(self.model.encoder, layers)}
            for group in list(self.optimizer.param_groups):
                chosen = [p for p in group["params"] if id(p) in slow]
                group["params"] = [p for p in group["params"] if id(p) not in slow]
                if chosen:
                    self.optimizer.add_param_group({**group, "params": chosen, "scale": self.freeze_lr})
        else:
            for parameter in freeze_layers(self.model.encoder, layers):
                self.optimizer.state.pop(parameter, None)
            for group in self.optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        self.frozen = sorted(layers)

    def save(self, folder):
        """Replace resume/state.pt in one move; the previous one stays until the new one is whole."""
        plain = {key: getattr(self, key) for key in ("step", "frozen", "decay", "metrics", "history", "best_joint",
                                                     "totals")}
        with write_atomic(Path(folder) / "resume" / "state.pt", "wb") as file:
            torch.save(plain | {key: getattr(self, key).state_dict() for key in ("model", "optimizer", "scaler")}, file)

    def load(self, folder):
        """Go on from resume/state.pt where there is one. UserError when it is cut short or broken."""
        path = Path(folder) / "resume" / "state.pt"
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location=self.totals.device, weights_only=True)
            self.model.load_state_dict(saved.pop("model"))
            self.freeze(saved["frozen"])
            self.optimizer.load_state_dict(saved.pop("optimizer"))
            self.scaler.load_state_dict(saved.pop("scaler"))
        except Exception as error:
            raise UserError(f"{path} is damaged or cut short ({type(error).__name__}): there is no going on from it; "
                            "--overwrite starts anew") from None
        if dist.is_initialized() and dist.get_rank():
            saved.pop("totals")  # the first process has them all
        self.__dict__.update(saved)


class StopRequest:
    """SIGTERM or Ctrl-C, noted, and looked at between steps; the second one stops at once."""

    def __init__(self, world):
        self.number = 0
        self.group = dist.new_group(backend="gloo") if world > 1 else None  # asks on the CPU: the GPU need not wait
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def asked(self):
        """The signal that any process got so far, or 0: the same answer in all of them."""
        if not self.group:
            return self.number
        highest = torch.tensor(self.number)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        return int(highest)  # and not self.number, which a signal can change meanwhile in this process alone

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- the run -----------------------------------------------------------------------------------------------------

def draw_layers(number, count, seed, flag):
    """`number` different layers out of 1 to `count`, by `seed`. UserError when there are not so many."""
    if number > count:
        raise UserError(f"{flag} {number}: the model has layers 1 to {count}")
    random = np.random.default_rng([seed, {"--random-layers": 15, "--random-freeze": 16}[flag]])  # each has its own
    return sorted((1 + random.permutation(count)[:number]).tolist())


def build(name, labels, head, layers, random_layers, pooling, dropout, encoder_dropout, hidden, seed):
    """The model to train, its tokenizer, how many blocks the encoder had, and a line on where its parts come from."""
    tokenizer = load_tokenizer(name)
    torch.manual_seed(seed)  # the first weights of whatever the file does not hold
    encoder, pretrained_pooler = load_encoder(name)
    count = len(blocks(encoder))
    layers = draw_layers(random_layers, count, seed, "--random-layers") if random_layers else layers
    if head == "pooler":
        note = "BERT's own head on the pretrained pooler" if pretrained_pooler else \
               "BERT's own head; the model has no pretrained pooler, it starts at random"
    else:
        check_layers(layers, count, "--layers")
        drop_pooler(encoder)
        cut_after(encoder, max(layers))
        cut = f", the {count - max(layers)} above cut off" if max(layers) < count else ""
        note = f"{pooling} pooling of layers {' '.join(map(str, layers))}{cut}"
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout) and encoder_dropout is not None:
            module.p = encoder_dropout
    torch.manual_seed(seed)
    return Classifier(encoder, labels, head, layers, pooling, dropout, hidden), tokenizer, count, note


def describe(model, count, freeze_layers, note, dtype, world):
    """What is printed at the start: layers used, cut and frozen, and how many parameters are trained."""
    print(f"{type(model.encoder).__name__}, {count} blocks: {note}")
    noop = [layer for layer in freeze_layers if layer > len(blocks(model.encoder))]
    if freeze_layers:
        print(f"layers to freeze: {' '.join(map(str, freeze_layers))}")
    if noop:
        print(f"freezing layer {' '.join(map(str, noop))} is a no-op: "
              "it is above the highest layer pooled and was cut off")
    device = next(model.parameters()).device
    where = f"{world} processes on {device.type}" if world > 1 else device
    print(f"{len(model.encoder.kept_rows):,} of {len(model.encoder.whole_table):,} word pieces are in the data; "
          "the others rest")
    print(f"{trainable(model):,} parameters to train; {str(dtype).removeprefix('torch.')} products, {where}")


def trainable(model):
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def gather_totals(totals):
    """Sum a tensor over the processes of torchrun; the first has it all then, the others zeros. Returns the sum."""
    if not dist.is_initialized():
        return totals.tolist()
    dist.all_reduce(totals)
    found = totals.tolist()
    if dist.get_rank():
        totals.zero_()
    return found


def record(state, scores, epoch, rate, speed, out, writer):
    """Add an evaluation's rows to metrics.jsonl and to TensorBoard, and print it as one line."""
    frozen = [] if state.freeze_lr else state.frozen
    for (split, language), (accuracy, loss) in scores.items():
        state.metrics.append({
            "epoch": int(epoch) if epoch == int(epoch) else round(epoch, 4), "step": state.step, "split": split,
            "language": language, "accuracy": accuracy, "loss": loss, "lr": rate,
            "frozen_layers": frozen, "examples_per_second": round(speed, 1)})
        if split != "train":
            writer.add_scalar(f"accuracy/{split}/{language}", accuracy, state.step)
            writer.add_scalar(f"loss/{split}/{language}", loss, state.step)
    with write_atomic(out / "metrics.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in state.metrics)
    writer.add_scalar("frozen layers", len(frozen), state.step)
    writer.add_text("frozen layers", " ".join(map(str, frozen)) or "none", state.step)
    writer.flush()
    shown = {}
    for (split, language), (accuracy, _) in scores.items():
        shown.setdefault(split, []).append(f"{language} {100 * accuracy:.1f}".strip())
    tqdm.write(f"epoch {epoch:.4g}  " + "  ".join(f"{split}: {' '.join(values)}" for split, values in shown.items())
               + f"  ({speed:.0f} examples/s)")


def fit(state, train_set, sets, out, keep, *, pad_id, dtype, epochs, lr, batch_size, accumulate, schedule, clip,
        freeze_layers, freeze_epoch, freeze_cache, max_length, eval_batch_size, eval_steps, save_steps, log_steps,
        seed):
    """Train state.model on an Encoded and evaluate it on `sets`, {(split, language): Encoded}.

    `keep(epoch, best)` is called after each epoch, to save the model and to drop the epochs that are not in `best`.
    Returns 0, or the number of the signal that stopped it after the state was saved.
    """
    rank, world = start_processes()
    model, device = state.model.train(), state.totals.device
    wrapped = wrap(model, world)
    writer = SummaryWriter(out, purge_step=state.step + 1) if rank == 0 else None
    per_epoch = -(-len(train_set.labels) // batch_size)
    bar = progress_bar(total=epochs * per_epoch, initial=state.step, unit="step", disable=rank > 0, smoothing=0.05)
    since, clock, stop = state.step, time.perf_counter(), StopRequest(world)
    kept = None  # the FrozenStates of --freeze-cache

    def end():
        bar.close()
        stop.restore()
        if writer:
            writer.close()

    def freeze_now(why):
        nonlocal wrapped
        state.freeze(freeze_layers)
        wrapped = wrap(model, world)
        if rank == 0:
            done = "slowed down" if state.freeze_lr else "frozen"
            tqdm.write(f"{why}: layers {' '.join(map(str, freeze_layers))} are {done} from here on, "
                       f"{trainable(model):,} parameters to train")

    for epoch in range(state.step // per_epoch, epochs):
        for rows in train_batches(train_set.lengths, batch_size, seed, epoch)[state.step - epoch * per_epoch:]:
            if freeze_epoch == epoch and not state.frozen:
                freeze_now(f"{epoch} epochs done")
            if freeze_cache and state.frozen and not kept:
                kept = FrozenStates(model, train_set, state.frozen, out / "resume" / ".frozen.tmp", pad_id, dtype,
                                    max_length, eval_batch_size, seed)
                since, clock = state.step, time.perf_counter()
            rate = learning_rate(state.step, epochs * per_epoch, lr, schedule)
            torch.manual_seed((seed * 1_000_003 + state.step) * 1024 + rank)  # dropout's numbers
            parts = list(micro_batches(train_set, rows, pad_id, max_length, device, accumulate, rank, world, kept))
            loss, right = train_step(wrapped, state.optimizer, rate, state.scaler, parts, len(rows), dtype, clip, world)
            for i, value in enumerate((loss, right, len(rows[rank::world]))):
                state.totals[i] += value
            state.decay *= 1 - rate * state.weight_decay * (state.freeze_lr if 0 in state.frozen else 1)
            state.step += 1

            # --- all that follows is logging, evaluating and saving ---
            bar.update()
            ends = state.step == (epoch + 1) * per_epoch
            evaluates, saves = (ends or n and state.step % n == 0 for n in (eval_steps, save_steps))
            asked = stop.asked()  # in every process, at every step: it is a collective
            saves = saves or asked
            if not (evaluates or saves or state.step % log_steps == 0):
                continue
            loss_sum, right_sum, row_sum = gather_totals(state.totals)
            if problem := not_finite(loss_sum, model if saves else None):
                end()
                raise UserError(f"{problem} at step {state.step}: lower --lr (now {lr}) or give --precision fp32; "
                                f"a state from before is kept in {out}, if one was saved")
            speed = (state.step - since) * batch_size / (time.perf_counter() - clock)
            if rank == 0:
                log_train(writer, bar, state.step, loss_sum / row_sum, right_sum / row_sum, rate, speed)
            if evaluates:
                scores = {("train", ""): (right_sum / row_sum, loss_sum / row_sum)}
                scores |= evaluate(model, sets, pad_id, dtype, max_length, eval_batch_size)
                chosen_by = choosing_scores(scores)
                if rank == 0:
                    record(state, scores, state.step / per_epoch, rate, speed, out, writer)
                if freeze_epoch == "auto" and not state.frozen and chosen_by["joint"] < state.best_joint:
                    freeze_now(f"mean non-English dev accuracy fell below {100 * state.best_joint:.1f}")
                state.best_joint = max(state.best_joint, chosen_by.get("joint", -1.0))
                state.totals.zero_()
            if ends:
                state.history[epoch + 1] = chosen_by
                if rank == 0:
                    keep(epoch + 1, {epoch + 1, *best_epochs(state.history).values()})
            if saves and rank == 0:
                state.save(out)
            agree(0)  # no process runs ahead of a save
            if asked and state.step < epochs * per_epoch:
                end()
                return asked
            since, clock = state.step, time.perf_counter()
    end()
    return 0


def not_finite(loss, model):
    """What is not a finite number, the loss or (where a model is given) a weight, as a phrase; None when all are."""
    if not np.isfinite(loss):
        return f"the loss is {loss}"
    if model is not None and not all(weight.isfinite().all() for weight in model.parameters()):
        return "a weight is not finite"
    return None


def log_train(writer, bar, step, loss, accuracy, rate, speed):
    """Show how training goes on the progress bar and in TensorBoard."""
    bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{100 * accuracy:.1f}", lr=f"{rate:.1e}", refresh=False)
    for tag, v in (("train/loss", loss), ("train/accuracy", accuracy), ("lr", rate), ("examples per second", speed)):
        writer.add_scalar(tag, v, step)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--model", required=True, help="encoder: hub name or folder")
    group.add_argument("--data", required=True, help="data set folder (python data.py --help)")
    group.add_argument("--out", required=True, help="run folder to write")
    group.add_argument("--overwrite", action="store_true", help="delete what is in OUT and start anew")
    group.add_argument("--train-language", default="en", metavar="LANG",
                       help="train on train.LANG.tsv (default: en; another is Translate-Train, not zero-shot)")
    group.add_argument("--track-test", action="store_true",
                       help="evaluate on the test sets too, as the paper's Figure 5 does, and keep the epoch that is "
                            "best on the non-English ones, for evaluate.py --epoch test; nothing else looks at them")
    group.add_argument("--max-train-rows", type=in_range(int, 1), metavar="N",
                       help="train on N rows, spread evenly (default: all)")
    group.add_argument("--max-eval-rows", type=in_range(int, 1), metavar="N",
                       help="evaluate on N rows of each file (default: all)")
    group = parser.add_argument_group("the classifier")
    group.add_argument("--head", choices=["layers", "pooler"], default="layers",
                       help="pooled states of chosen layers (default), or BERT's own [CLS] pooler, the baseline")
    group.add_argument("--layers", type=int, nargs="+", metavar="K",
                       help="layers to pool, 0 is the embeddings (default: 6 8 11)")
    group.add_argument("--pooling", choices=POOLINGS, help="over the tokens (default: max)")
    group.add_argument("--random-layers", type=in_range(int, 1), metavar="N",
                       help="a control: pool N layers drawn by --seed from all but the embeddings")
    group.add_argument("--layers-from", metavar="FILE",
                       help="take --layers and --pooling from the best.json of grid_search.py")
    group.add_argument("--dropout", type=in_range(float, 0, below=1), default=0.1,
                       help="on the classifier's input (default: 0.1)")
    group.add_argument("--encoder-dropout", type=in_range(float, 0, below=1), metavar="P",
                       help="inside the encoder (default: what its configuration says)")
    group.add_argument("--hidden", type=in_range(int, 0), default=0,
                       help="units of a hidden layer in the classifier (default: 0: none)")
    group = parser.add_argument_group("freezing on the go")
    group.add_argument("--freeze-layers", type=int, nargs="+", default=[], metavar="K",
                       help="freeze exactly these layers, 0 is the embeddings (the paper: 9 11 12); needs "
                            "--freeze-epoch")
    group.add_argument("--freeze-epoch", metavar="N|auto",
                       help="freeze once N epochs are done (the paper: 2; 0: from the start), or at the first "
                            "evaluation whose mean accuracy on the non-English dev sets falls below the best so far "
                            "(auto: that looks at labels in the target languages, so it is the joint protocol, not "
                            "zero-shot)")
    group.add_argument("--random-freeze", type=in_range(int, 1), metavar="N",
                       help="a control: instead of --freeze-layers, freeze N layers drawn by --seed")
    group.add_argument("--freeze-lr", type=in_range(float, 0, below=1), default=0.0, metavar="F",
                       help="a control: instead of freezing, go on with those layers at F times the learning rate "
                            "(default: 0: freeze)")
    group.add_argument("--freeze-cache", action="store_true",
                       help="once the lowest layers are frozen, the embeddings among them, run them a last time and "
                            "keep their states of all train rows on OUT's disk until the run ends (tokens x hidden "
                            "size x 2 bytes, 4 with fp32): steps then begin above them. Faster, and not quite as the "
                            "paper has it: dropout in them is drawn once, not at each step")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=in_range(int, 1), default=5, help="passes over the train rows (default: 5)")
    group.add_argument("--lr", type=in_range(float, above=0), default=2e-5,
                       help="Adam's highest learning rate (default: 2e-5)")
    group.add_argument("--schedule", choices=["linear", "constant"], default="linear",
                       help="after 10 %% of the steps of linear warm-up: linear decay to 0 (default), or constant")
    group.add_argument("--batch-size", type=in_range(int, 1), default=32,
                       help="rows an optimizer step, over all processes (default: 32)")
    group.add_argument("--accumulate", type=in_range(int, 1), default=1, metavar="N",
                       help="split each batch into N parts, to save memory; the gradient stays the same (default: 1)")
    group.add_argument("--weight-decay", type=in_range(float, 0), default=0.0,
                       help="decoupled, on matrices alone (default: 0)")
    group.add_argument("--clip", type=in_range(float, above=0), default=1.0,
                       help="highest norm of the gradient (default: 1; inf: any)")
    group.add_argument("--max-length", type=int, default=128, help="tokens a row may have (default: 128)")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                       help="of matrix products (default: auto: bf16 where the hardware has it, else fp16 on a GPU)")
    group.add_argument("--compile", choices=["default", "reduce-overhead"],
                       help="run the model through torch.compile, once for all lengths; reduce-overhead: with CUDA "
                            "graphs (a GPU, no --accumulate)")
    group.add_argument("--seed", type=in_range(int, 0, below=2 ** 32), default=0,
                       help="of the classifier's weights, row order and dropout (default: 0)")
    group = parser.add_argument_group("evaluating and saving")
    group.add_argument("--eval-steps", type=in_range(int, 0), default=0, metavar="N",
                       help="evaluate every N steps too, not only each epoch")
    group.add_argument("--save-steps", type=in_range(int, 0), default=0, metavar="N",
                       help="save the state every N steps too (default: each epoch)")
    group.add_argument("--keep-epochs", type=in_range(int, 1), nargs="+", default=[], metavar="K",
                       help="keep the models after these epochs too")
    group.add_argument("--log-steps", type=in_range(int, 1), default=50, metavar="N",
                       help="log train loss every N steps (default: 50)")
    group.add_argument("--eval-batch-size", type=in_range(int, 1), default=64,
                       help="rows of 24 tokens at once in evaluation; of longer ones fewer, of shorter ones more "
                            "(default: 64)")
    args = parser.parse_args(argv)
    check_args(args, parser)
    args.layers, args.pooling = args.layers or [6, 8, 11], args.pooling or "max"
    return args


def check_args(args, parser):
    """Refuse flags that do not fit together; --freeze-epoch as a number, --layers-from read."""
    if args.layers_from and (args.layers or args.pooling):
        parser.error("--layers-from gives the layers and the pooling: leave out --layers and --pooling")
    if args.random_layers and (args.layers or args.layers_from) or args.random_freeze and args.freeze_layers:
        parser.error("--random-layers and --random-freeze draw the layers: leave out --layers, --layers-from and "
                     "--freeze-layers")
    if args.head == "pooler" and (args.layers or args.pooling or args.layers_from or args.random_layers):
        parser.error("--head pooler reads [CLS] of the last layer: leave out --layers, --pooling, --layers-from and "
                     "--random-layers")
    if bool(args.freeze_layers or args.random_freeze) != (args.freeze_epoch is not None):
        parser.error("--freeze-layers K ... (or --random-freeze N) and --freeze-epoch N|auto need each other")
    if args.freeze_epoch not in (None, "auto"):
        if not args.freeze_epoch.isdecimal():
            parser.error(f"--freeze-epoch {args.freeze_epoch}: expected a number of epochs, 0 or more, or auto")
        args.freeze_epoch = int(args.freeze_epoch)
    if any(epoch > args.epochs for epoch in args.keep_epochs):
        parser.error(f"--keep-epochs {' '.join(map(str, args.keep_epochs))}: expected epochs from 1 to {args.epochs}")
    if isinstance(args.freeze_epoch, int) and args.freeze_epoch >= args.epochs:
        parser.error(f"--freeze-epoch {args.freeze_epoch}: of {args.epochs} epochs, so nothing would ever be frozen; "
                     f"expected 0 to {args.epochs - 1}, or auto")
    if args.freeze_lr and args.freeze_epoch is None:
        parser.error(f"--freeze-lr {args.freeze_lr}: needs layers to freeze and --freeze-epoch")
    if args.freeze_cache and (0 not in args.freeze_layers or args.freeze_lr or args.compile):
        parser.error("--freeze-cache needs 0 among --freeze-layers, and goes with neither --freeze-lr nor --compile")
    if args.freeze_cache and os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        parser.error("--freeze-cache keeps one file in memory for all processes: it goes on one machine only")
    if args.compile == "reduce-overhead" and (args.accumulate > 1 or not torch.cuda.is_available()):
        parser.error("--compile reduce-overhead needs a GPU, and --accumulate 1: a CUDA graph's gradients are its own")
    if args.layers_from:
        best = read_json(args.layers_from, {"layers": [int], "pooling": str})
        args.layers, args.pooling = best["layers"], best["pooling"]
        if not args.layers or args.pooling not in POOLINGS:
            raise UserError(f"{args.layers_from}: expected layer numbers and one of {', '.join(POOLINGS)}, "
                            f"got {args.layers!r} and {args.pooling!r}")


def read_tokens(encoder, tokenizer, identity, folder, labels, keys, max_length, train_rows, eval_rows):
    """The token ids of each (split, language) in `keys`, {key: Encoded}; the encoder keeps the word pieces in them."""
    tokens = {(split, language): encode_split(
                  tokenizer, identity, folder, split, language, labels, max_length,
                  train_rows if split == "train" else eval_rows) for split, language in keys}
    tokenizer.backend_tokenizer.no_truncation()  # tokenising leaves it on, kept token ids do not: save it alike
    used = np.unique(np.concatenate([np.unique(part.ids) for part in tokens.values()]))
    new_ids = keep_tokens(encoder, used, tokenizer.pad_token_id)
    return {key: part._replace(ids=new_ids[part.ids]) for key, part in tokens.items()}


def main(argv=None):
    args = parse_args(argv)
    out, device, (rank, world) = Path(args.out), pick_device(), start_processes()
    dtype = pick_precision(args.precision, device)
    labels = read_labels(args.data)
    model, tokenizer, count, note = build(args.model, labels, args.head, args.layers, args.random_layers,
                                          args.pooling, args.dropout, args.encoder_dropout, args.hidden, args.seed)
    freeze_layers = args.freeze_layers
    if args.random_freeze:
        freeze_layers = draw_layers(args.random_freeze, count, args.seed, "--random-freeze")
    token_limit(model.encoder, args.max_length)
    check_layers(freeze_layers, count, "--freeze-layers")
    sets = [("dev", language) for language in split_languages(args.data, "dev")]
    sets += [("test", language) for language in split_languages(args.data, "test") if args.track_test]
    if not sets or args.freeze_epoch == "auto" and not any(key[0] == "dev" and key[1] != "en" for key in sets):
        raise UserError(f"{args.data} has no dev file"
                        + " in another language than English, which --freeze-epoch auto needs" * bool(sets))
    files = [split_path(args.data, "train", args.train_language).name,
             *(f"{split}.{language}.tsv" for split, language in sets)]
    description = {"arguments": {k: v for k, v in vars(args).items() if k not in ("out", "overwrite", "log_steps")},
                   **model_identity(model.encoder, tokenizer, args.model), "labels": labels,
                   "data": fingerprint(args.data, files), "precision": str(dtype).removeprefix("torch."),
                   "processes": world}
    start = ["torchrun", "--nproc-per-node", str(world)] if world > 1 else ["python"]
    command = shlex.join([*start, "train.py", *(sys.argv[1:] if argv is None else argv)])
    with claim(out) if rank == 0 else nullcontext():
        if agree(rank == 0 and start_folder(out, "run.json", description, {"versions": versions(), "command": command},
                                            args.overwrite)):
            if rank == 0:
                print(f"{out} is complete already: nothing to do")
            return 0
        tokens = read_tokens(model.encoder, tokenizer, description["tokenizer"], args.data, labels,
                             [("train", args.train_language), *sets], args.max_length, args.max_train_rows,
                             args.max_eval_rows)
        state = State(model.to(device), args.weight_decay, dtype, args.freeze_lr)
        if args.compile:
            model.compile(dynamic=True, mode=args.compile)  # in place: after freezing it compiles itself anew
        if rank == 0:
            describe(model, count, freeze_layers, note, dtype, world)
        state.load(out)
        if state.step and rank == 0:
            print(f"going on after step {state.step}")

        def keep(epoch, wanted):
            save_model(model, tokenizer, out / "epochs" / str(epoch), state.decay)
            for path in (out / "epochs").iterdir():
                if path.name not in map(str, {*wanted, *args.keep_epochs}):
                    shutil.rmtree(path)

        names = ("epochs lr batch_size accumulate schedule clip freeze_epoch freeze_cache max_length eval_batch_size "
                 "eval_steps save_steps log_steps seed").split()
        with out_of_memory(f"the step has --batch-size {args.batch_size} in --accumulate {args.accumulate} parts; with "
                           f"--accumulate {2 * args.accumulate} (and --overwrite) the gradient is the same in half "
                           "the memory. For "
                           f"evaluation there is --eval-batch-size (now {args.eval_batch_size})"):
            number = fit(state, tokens.pop(("train", args.train_language)), tokens, out, keep,
                         freeze_layers=freeze_layers, pad_id=tokenizer.pad_token_id, dtype=dtype,
                         **{name: getattr(args, name) for name in names})
        if number:
            if rank == 0:
                print(f"stopped by {signal.Signals(number).name} after step {state.step}, the state is saved; "
                      f"to go on:\n{command}")
            return 128 + number
        if rank == 0:
            finish_folder(out, "run.json")
            best = best_epochs(state.history)
            print(f"{out}: done; best epoch "
                  + ", ".join(f"{epoch} by {name}" for name, epoch in best.items() if name in ("en", "joint")))
    return 0


if __name__ == "__main__":
    cli(main)
