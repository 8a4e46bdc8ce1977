"""Phase 2: fine-tune the encoder with a classifier over chosen layers, and freeze layers on the go.

    python train.py --model bert-base-multilingual-uncased --data data/xnli --out runs/mc-bert-wf \\
        --layers 6 8 11 --pooling max --freeze-layers 9 11 12 --freeze-epoch 2
    python train.py --model bert-base-multilingual-uncased --data data/xnli --out runs/baseline --head pooler

Reads   DATA/train.LANG.tsv and DATA/dev.*.tsv (test.*.tsv only with --track-test), and the encoder.
Writes  OUT/run.json, OUT/metrics.jsonl, TensorBoard events, OUT/epochs/K/ (the model after epoch K: the last, and each
        that is best so far on some dev set), OUT/epochs/mean/ (the mean of the weights after each epoch), OUT/resume/.
        Stopped and started again with the same command it goes on.
Paper   sections 1.4 and 1.6; conclusions 1, 2, 6, 7 and 8.
"""

import argparse
import inspect
import json
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import (
    collate,
    encode,
    eval_batches,
    fingerprint,
    load_tokenizer,
    read_labels,
    read_sets,
    split_languages,
    take,
    tokenizer_identity,
    train_batches,
    train_language,
)
from lib.cpu import make_fast
from lib.devices import agree, autocast, pick_device, pick_precision, start_processes, to_device
from lib.encoders import (
    blocks,
    check_layers,
    check_length,
    cut_after,
    drop_pooler,
    keep_tokens,
    load_encoder,
    parameter_layers,
)
from lib.folders import claim, finish_folder, read_json, start_folder, versions, write_atomic
from lib.hub import revision
from lib.messages import UserError, cli, in_range, out_of_memory
from lib.run_log import Log
from lib.scores import best_epochs
from model import POOLINGS, Classifier, freeze_layers, predict, save_model

LOG_STEPS = 50  # train loss is logged every so many steps


# --- the pieces of a step ----------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, schedule, warmup=0.1):
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then linear decay to 0 or constant."""
    ramp = max(1, round(steps * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * (steps - step) / max(1, steps - ramp) if schedule == "linear" else peak


def make_optimizer(model, weight_decay):
    """Adam with decoupled weight decay, on matrices alone as BERT does; with 0 it is plain Adam. Not on embeddings: it
    would pull at the word pieces of languages that are evaluated and never trained on."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups = [
        {"params": [p for p in parameters if p in tables], "weight_decay": 0.0},
        {
            "params": [p for p in parameters if p.ndim > 1 and p not in tables],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def distributed(model):
    """The module to call in training: the model, or its DistributedDataParallel; to be made anew after freezing."""
    if not dist.is_initialized():
        return model
    named = inspect.signature(DistributedDataParallel).parameters
    buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    )  # before torch 2.13
    return DistributedDataParallel(model, **{buffers: False})


def micro_batches(encoded, rows, pad_id, limit, device, accumulate):
    """This process's share of a global batch, as `accumulate` batches on the device, and whether each is the last; a
    share without rows is one row whose label is -1, which counts for nothing."""
    rank, world = start_processes()
    parts = np.array_split(rows[rank::world], max(1, min(accumulate, len(rows[rank::world]))))
    for part in parts:
        batch = collate(encoded, part if len(part) else rows[:1], pad_id, limit)
        batch["labels"] = batch["labels"] if len(part) else np.full(1, -1)
        yield to_device(batch, device), part is parts[-1]


def freezing_is_due(when, epoch, metrics, source):
    """Whether layers are to be frozen by now: `when` epochs are done; or, for "auto", an evaluation's mean accuracy on
    the dev sets of the languages other than `source` was below the best before it."""
    if when != "auto":
        return when is not None and epoch >= when
    means = {}
    for row in metrics:
        if row["split"] == "dev" and row["language"] != source:
            means.setdefault(row["step"], []).append(row["accuracy"])
    means = [
        round(float(np.mean(accuracies)), 9) for accuracies in means.values()
    ]  # or a tie may look like a fall
    return any(mean < max(means[:i]) for i, mean in enumerate(means) if i)


# --- the run -----------------------------------------------------------------------------------------------------


def fit(args, model, tokenizer, train_set, sets, readers, out, dtype):
    """Train `model` on an Encoded; evaluate it on `sets`, {(split, language): Encoded}, and save it after each epoch.

    args: the parsed flags; readers: of parameter_layers(). Returns 0, or the number of the signal that stopped it.
    """
    device, (rank, world), pad_id = (
        next(model.parameters()).device,
        start_processes(),
        tokenizer.pad_token_id,
    )
    per_epoch = -(-len(train_set.labels) // args.batch_size)
    steps = args.epochs * per_epoch
    optimizer = make_optimizer(model, args.weight_decay)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, metrics, totals, mean = load_state(out, model, optimizer, scaler)
    trained, frozen, model = distributed(model), [], model.train()
    with Stop() as stop, closing(Log(out, step, steps)) as log:
        for epoch in range(step // per_epoch, args.epochs):
            for rows in train_batches(train_set.lengths, args.batch_size, args.seed, epoch)[
                step - epoch * per_epoch :
            ]:
                if not frozen and freezing_is_due(
                    args.freeze_epoch, epoch, metrics, args.train_language
                ):
                    frozen = sorted(args.freeze_layers)  # paper, section 1.6
                    for parameter in freeze_layers(model.encoder, frozen, readers):
                        optimizer.state.pop(
                            parameter, None
                        )  # AdamW and clipping skip what has no gradient
                    trained = distributed(
                        model
                    )  # which waits for the gradients of trained parameters only
                    log.say(
                        f"layers {' '.join(map(str, frozen))} are frozen from here on, {trainable(model):,} "
                        "parameters to train"
                    )
                torch.manual_seed(
                    (args.seed * 1_000_003 + step) * 1024 + rank
                )  # a stopped run draws the same dropout
                for batch, last in micro_batches(
                    train_set, rows, pad_id, args.max_length, device, args.accumulate
                ):
                    with nullcontext() if last or world == 1 else trained.no_sync():
                        with autocast(device, dtype):
                            logits = trained(batch)  # (B, C)
                        loss = F.cross_entropy(
                            logits.float(), batch["labels"], reduction="sum", ignore_index=-1
                        )
                        scaler.scale(
                            loss * (world / len(rows))
                        ).backward()  # DDP averages over processes
                    totals += torch.stack(
                        [
                            loss.detach(),
                            (logits.argmax(1) == batch["labels"]).sum(),
                            (batch["labels"] >= 0).sum(),
                        ]
                    )
                rate = learning_rate(step, steps, args.lr, args.schedule)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                step += 1

                # --- all that follows is logging, evaluating and saving ---
                ends = step == (epoch + 1) * per_epoch
                evaluates, saves = (
                    ends or n and step % n == 0 for n in (args.eval_steps, args.save_steps)
                )
                asked = stop.asked()  # in every process, at every step: it is a collective
                log.step(len(rows))
                if not (evaluates or saves or asked or step % LOG_STEPS == 0):
                    continue
                loss, accuracy = running_means(totals)
                check_finite(loss, model, step, args.lr, out)
                speed = log.train(step, loss, accuracy, rate)
                if evaluates:
                    scores = {
                        ("train", ""): (accuracy, loss),
                        **evaluate(model, sets, pad_id, dtype, args.max_length),
                    }
                    metrics += metric_rows(scores, step / per_epoch, step, rate, frozen, speed)
                    log.evaluation(metrics[-len(scores) :], metrics)
                    totals.zero_()
                if ends and rank == 0:
                    mean = update_mean(mean, model, epoch + 1)
                    save_epoch(
                        model,
                        tokenizer,
                        out / "epochs",
                        epoch + 1,
                        args.keep_all,
                        best_epochs(metrics, args.train_language),
                    )
                if (saves or asked) and rank == 0:
                    save_state(
                        out,
                        model,
                        optimizer,
                        scaler,
                        step=step,
                        metrics=metrics,
                        totals=totals,
                        mean=mean,
                    )
                agree()  # no process runs ahead of a save
                if asked and step < steps:
                    log.say(
                        f"stopped by {signal.Signals(asked).name} after step {step}, the state is saved"
                    )
                    return asked
                log.restart()
    if rank == 0:
        model.load_state_dict(mean, strict=False)
        save_model(model, tokenizer, out / "epochs" / "mean")
    return 0


def evaluate(model, sets, pad_id, dtype, limit):
    """Accuracy and mean cross-entropy on each set: {(split, language): (accuracy, loss)}. Leaves the model training."""
    scores = {}
    for (split, language), encoded in sets.items():
        logits = torch.from_numpy(
            predict(
                model,
                eval_batches(encoded, pad_id, limit),
                len(encoded.labels),
                dtype,
                f"{split} {language}" if start_processes()[0] == 0 else None,
            )
        )
        labels = torch.from_numpy(encoded.labels)
        scores[split, language] = (
            (logits.argmax(1) == labels).double().mean().item(),
            F.cross_entropy(logits, labels).item(),
        )
    model.train()
    return scores


def trainable(model):
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def running_means(totals):
    """Mean loss and accuracy since the last evaluation, over all processes; the first then has the totals of all."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, right, rows = totals.tolist()
    if start_processes()[0] > 0:
        totals.zero_()
    return loss / rows, right / rows


def check_finite(loss, model, step, lr, out):
    """UserError when the loss or a weight is not a finite number."""
    if not np.isfinite(loss) or not all(weight.isfinite().all() for weight in model.parameters()):
        problem = "a weight is not finite" if np.isfinite(loss) else f"the loss is {loss}"
        raise UserError(
            f"{problem} at step {step}: lower --lr (now {lr}) or give --precision fp32; "
            f"a state from before is kept in {out}, if one was saved"
        )


def metric_rows(scores, epoch, step, rate, frozen, speed):
    """The rows of metrics.jsonl for one evaluation."""
    return [
        {
            "epoch": int(epoch) if epoch == int(epoch) else round(epoch, 4),
            "step": step,
            "split": split,
            "language": language,
            "accuracy": accuracy,
            "loss": loss,
            "lr": rate,
            "frozen_layers": frozen,
            "examples_per_second": round(speed, 1),
        }
        for (split, language), (accuracy, loss) in scores.items()
    ]


# --- what is saved, so that a run goes on as if it had never stopped ---------------------------------------------
# What is random in a step depends on (seed, step, process) alone; what is frozen and which epochs are best follow from
# the flags and the metrics. The rest is here.


def save_state(out, model, optimizer, scaler, **more):
    """Replace OUT/resume/state.pt in one move; the previous one stays until the new one is whole."""
    with write_atomic(out / "resume" / "state.pt", "wb") as file:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                **more,
            },
            file,
        )


def load_state(out, model, optimizer, scaler):
    """Steps done, rows of metrics, totals (loss, right answers and rows since the last evaluation; the first process
    has those of all) and the mean of the weights, of OUT/resume/state.pt, or those to begin with. UserError when it is
    cut short or broken."""
    path, device = out / "resume" / "state.pt", next(model.parameters()).device
    if not path.exists():
        return 0, [], torch.zeros(3, dtype=torch.float64, device=device), {}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        totals = saved["totals"].to(device) * (start_processes()[0] == 0)
    except Exception as error:
        raise UserError(
            f"{path} is damaged or cut short ({type(error).__name__}): there is no going on from it; "
            "--overwrite starts anew"
        ) from None
    if start_processes()[0] == 0:
        print(f"going on after step {saved['step']}")
    return saved["step"], saved["metrics"], totals, saved["mean"]


def update_mean(mean, model, count):
    """The mean of all float weights after each of `count` epochs, from that of one less (Schmidt et al. 2023): no label
    of a target language is looked at. On the CPU, in float32."""
    weights = {
        name: weight.detach().cpu()
        for name, weight in model.state_dict().items()
        if weight.is_floating_point()
    }
    return {
        name: weight.clone() if count == 1 else mean[name] + (weight - mean[name]) / count
        for name, weight in weights.items()
    }


def save_epoch(model, tokenizer, folder, epoch, keep_all, best):
    """Save the model after an epoch, and drop those that are neither the last nor the best by anything."""
    save_model(model, tokenizer, folder / str(epoch))
    for path in folder.iterdir():
        if not keep_all and path.name not in map(str, {epoch, *best.values()}):
            shutil.rmtree(path)
    if epoch == 1:
        check_saved(tokenizer, folder / "1")


def check_saved(tokenizer, folder):
    """UserError when the tokenizer that was saved does not give the token ids of the one that was trained with."""
    saved, text = (
        load_tokenizer(folder),
        "".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)[:2000]),
    )
    for part in (text, text.upper(), " ".join(text)):
        if saved(part)["input_ids"] != tokenizer(part)["input_ids"]:
            raise UserError(
                f"{folder}: the tokenizer, saved and loaded again, gives other token ids: save it with "
                f"this version of transformers ({versions()['transformers']}) first"
            )


class Stop:
    """SIGTERM and Ctrl-C, looked at between steps. torchrun, Slurm and terminals send them to all processes, often
    twice within milliseconds: only a Ctrl-C that comes a second later stops at once."""

    def __enter__(self):
        self.number, self.since = 0, 0.0
        self.group = (
            dist.new_group(backend="gloo") if dist.is_initialized() else None
        )  # the GPU need not wait
        self.before = {
            number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def note(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() > self.since + 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.since = number, time.monotonic()

    def asked(self):
        """The signal that any process got so far, or 0: the same answer in all of them."""
        highest = torch.tensor(self.number)
        if self.group:
            dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        return int(
            highest
        )  # and not self.number, which a signal can change meanwhile in this process alone

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- setting up --------------------------------------------------------------------------------------------------


def build(args, labels, pairs):
    """The model to train, how many blocks its encoder had, parameter_layers(), and a line on what it is made of."""
    torch.manual_seed(args.seed)  # the first weights of whatever the file does not hold
    encoder, pretrained_pooler = load_encoder(args.model)
    count = top = len(blocks(encoder))
    if args.head == "pooler":
        note = "BERT's own head" + (
            " on the pretrained pooler"
            if pretrained_pooler
            else "; the model has no pretrained pooler, it starts at random"
        )
    else:
        check_layers(args.layers, count, "--layers")
        drop_pooler(encoder)
        cut_after(encoder, top := max(args.layers))
        note = f"{args.pooling} pooling of layers {' '.join(map(str, args.layers))}"
        note += " mixed" * (args.combine == "mix") + f", the {count - top} above cut off" * (
            top < count
        )
    readers = parameter_layers(encoder, top)
    for name, parameter in encoder.named_parameters():  # what the cut left and nobody reads
        if name not in readers and not (args.head == "pooler" and name.startswith("pooler.")):
            parameter.requires_grad = False
    if shared := [
        f"{name} (layers {first} to {last})"
        for name, (first, last) in readers.items()
        if first < last
    ]:
        note += f"\nread by several layers, frozen when all of these are: {', '.join(shared)}"
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout) and args.encoder_dropout is not None:
            module.p = args.encoder_dropout
    torch.manual_seed(args.seed)
    return (
        Classifier(
            encoder,
            labels,
            args.head,
            args.layers,
            args.pooling,
            args.combine,
            args.dropout,
            args.hidden,
            pairs,
        ),
        count,
        readers,
        note,
    )


def describe(args, model, count, note, dtype, lengths):
    """What is printed at the start: device, precision, attention, layers used, cut and frozen, what is trained."""
    device, (_, world) = next(model.parameters()).device, start_processes()
    reason = (
        {
            torch.bfloat16: "the hardware has it",
            torch.float16: "the GPU has no bf16",
            torch.float32: "the hardware has no bf16",
        }[dtype]
        if args.precision == "auto"
        else "as asked"
    )
    batches = train_batches(lengths, args.batch_size, args.seed, 0)
    padded = sum(len(rows) * -(-lengths[rows].max() // 8) * 8 for rows in batches)
    print(f"{type(model.encoder).__name__}, {count} blocks: {note}")
    if args.freeze_layers:
        print(f"layers to freeze: {' '.join(map(str, args.freeze_layers))}")
    if noop := [layer for layer in args.freeze_layers if layer > max(model.layers)]:
        print(
            f"freezing layer {' '.join(map(str, noop))} is a no-op: "
            "it is above the highest layer pooled and was cut off"
        )
    print(
        f"{len(model.encoder.kept_rows):,} of {len(model.encoder.whole_table):,} word pieces are in the data; "
        f"the others stay as they are\n{trainable(model):,} parameters to train, {args.epochs} epochs of "
        f"{len(batches):,} steps, {1 - lengths.sum() / padded:.1%} of the tokens are padding\n"
        f"{f'{world} processes on {device.type}' if world > 1 else device}, {str(dtype).removeprefix('torch.')} "
        f"products ({reason})"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    some, any_number, rate = in_range(int, 1), in_range(int, 0), in_range(float, 0, below=1)
    add = parser.add_argument_group("files").add_argument
    add("--model", required=True, help="encoder: hub name or folder")
    add("--data", required=True, help="data set folder (python data.py --help)")
    add("--out", required=True, help="run folder to write")
    add("--overwrite", action="store_true", help="delete the run that is in OUT and start anew")
    add(
        "--train-language",
        metavar="LANG",
        help="source language: train on train.LANG.tsv (default: en, or the only one there is)",
    )
    add(
        "--track-test",
        action="store_true",
        help="evaluate on the test sets too, as the paper's Figure 5 does, and "
        "keep the epoch best on the other languages' ones, for evaluate.py --epoch test; nothing else looks at them",
    )
    add(
        "--max-train-rows",
        type=some,
        metavar="N",
        help="train on N rows, spread evenly (default: all)",
    )
    add(
        "--max-eval-rows",
        type=some,
        metavar="N",
        help="evaluate on N rows of each file (default: all)",
    )
    add = parser.add_argument_group("the classifier").add_argument
    add(
        "--head",
        choices=["layers", "pooler"],
        default="layers",
        help="pooled states of chosen layers (default), or BERT's own [CLS] pooler, the baseline",
    )
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="K",
        help="layers to pool, 0 is the embeddings (default: 6 8 11)",
    )
    add("--pooling", choices=list(POOLINGS), help="over the tokens (default: max)")
    add(
        "--combine",
        choices=["concat", "mix"],
        default="concat",
        help="the layers' pooled states side by side "
        "(default, the paper's way), or one vector, their sum with learned softmax weights",
    )
    add(
        "--layers-from",
        metavar="FILE",
        help="take --layers and --pooling from the best.json of grid_search.py",
    )
    add("--dropout", type=rate, default=0.1, help="on the classifier's input (default: 0.1)")
    add(
        "--encoder-dropout",
        type=rate,
        metavar="P",
        help="inside the encoder (default: what its configuration says)",
    )
    add(
        "--hidden",
        type=any_number,
        default=0,
        help="units of a hidden layer in the classifier (default: 0: none)",
    )
    add = parser.add_argument_group("freezing on the go").add_argument
    add(
        "--freeze-layers",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="freeze exactly these layers, 0 is the embeddings (the paper: 9 11 12); needs --freeze-epoch",
    )
    add(
        "--freeze-epoch",
        metavar="N|auto",
        help="freeze once N epochs are done (the paper: 2; 0: from the start), or "
        "at the first evaluation whose mean accuracy on the other languages' dev sets falls below the best so far "
        "(auto: that looks at labels in the target languages, so it is the joint protocol, not zero-shot)",
    )
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=some, default=5, help="passes over the train rows (default: 5)")
    add(
        "--lr",
        type=in_range(float, above=0),
        default=2e-5,
        help="Adam's highest learning rate (default: 2e-5)",
    )
    add(
        "--schedule",
        choices=["linear", "constant"],
        default="linear",
        help="after 10 %% of the steps of linear warm-up: linear decay to 0 (default), or constant",
    )
    add(
        "--batch-size",
        type=some,
        default=32,
        help="rows an optimizer step, over all processes (default: 32)",
    )
    add(
        "--accumulate",
        type=some,
        default=1,
        metavar="N",
        help="split each batch into N parts, to save memory; the gradient stays the same (default: 1)",
    )
    add(
        "--weight-decay",
        type=in_range(float, 0),
        default=0.0,
        help="decoupled, on matrices but for embeddings (default: 0)",
    )
    add("--max-length", type=int, default=128, help="tokens a row may have (default: 128)")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of matrix products (default: auto: bf16 where the hardware has it, else fp16 on a GPU)",
    )
    add(
        "--compile",
        choices=["default", "reduce-overhead"],
        help="run the model through torch.compile, not anew "
        "for each length; reduce-overhead: with CUDA graphs (a GPU, no --accumulate)",
    )
    add(
        "--seed",
        type=in_range(int, 0, below=2**32),
        default=0,
        help="of the classifier's weights, row order and dropout (default: 0)",
    )
    add = parser.add_argument_group("evaluating and saving").add_argument
    add(
        "--eval-steps",
        type=any_number,
        default=0,
        metavar="N",
        help="evaluate every N steps too, not only each epoch",
    )
    add(
        "--save-steps",
        type=any_number,
        default=0,
        metavar="N",
        help="save the state every N steps too (default: each epoch)",
    )
    add("--keep-all", action="store_true", help="keep the models after all epochs")
    return check_args(parser.parse_args(argv), parser)


def check_args(args, parser):
    """Refuse flags that do not fit together; read --layers-from."""
    if args.layers_from and (args.layers or args.pooling):
        parser.error(
            "--layers-from gives the layers and the pooling: leave out --layers and --pooling"
        )
    if args.head == "pooler" and (
        args.layers or args.pooling or args.layers_from or args.combine == "mix"
    ):
        parser.error(
            "--head pooler reads [CLS] of the last layer: leave out --layers, --pooling, --layers-from and "
            "--combine"
        )
    if bool(args.freeze_layers) != (args.freeze_epoch is not None):
        parser.error("--freeze-layers K ... and --freeze-epoch N|auto need each other")
    if args.freeze_epoch not in (None, "auto"):
        if not args.freeze_epoch.isdecimal() or int(args.freeze_epoch) >= args.epochs:
            parser.error(
                f"--freeze-epoch {args.freeze_epoch}: expected 0 to {args.epochs - 1} (of --epochs "
                f"{args.epochs}), or auto"
            )
        args.freeze_epoch = int(args.freeze_epoch)
    if args.compile == "reduce-overhead" and (args.accumulate > 1 or not torch.cuda.is_available()):
        parser.error(
            "--compile reduce-overhead needs a GPU, and --accumulate 1: a CUDA graph's gradients are its own"
        )
    if args.layers_from:
        best = read_json(args.layers_from, "grid_search.py", {"layers": [int], "pooling": str})
        args.layers, args.pooling = best["layers"], best["pooling"]
        if not args.layers or args.pooling not in POOLINGS:
            raise UserError(
                f"{args.layers_from}: expected layer numbers and one of {', '.join(POOLINGS)}, "
                f"got {args.layers!r} and {args.pooling!r}"
            )
    args.layers, args.pooling = args.layers or [6, 8, 11], args.pooling or "max"
    return args


def main(argv=None):
    args = parse_args(argv)
    out, device, (rank, world) = Path(args.out), pick_device(), start_processes()
    dtype = pick_precision(args.precision, device)
    labels = read_labels(args.data)
    source = args.train_language = train_language(args.data, args.train_language)
    keys = [("dev", language) for language in split_languages(args.data, "dev", source)]
    keys += [
        ("test", language)
        for language in split_languages(args.data, "test", source)
        if args.track_test
    ]
    if (
        not keys
        or args.freeze_epoch == "auto"
        and not any(key[0] == "dev" and key[1] != source for key in keys)
    ):
        raise UserError(
            f"{args.data} has no dev file"
            + f" in another language than {source}, which --freeze-epoch auto needs" * bool(keys)
        )
    keys.insert(0, ("train", source))
    rows = read_sets(args.data, keys, labels)
    pairs = rows["train", source].text_b is not None
    tokenizer = load_tokenizer(args.model)
    model, count, readers, note = build(args, labels, pairs)
    check_length(model.encoder, args.max_length)
    check_layers(args.freeze_layers, count, "--freeze-layers")
    where = ("model", "data", "out", "overwrite", "layers_from")  # not compared: what is in them is
    description = {
        "arguments": {k: v for k, v in vars(args).items() if k not in where},
        "revision": revision(args.model),
        "tokenizer": tokenizer_identity(tokenizer),
        "labels": labels,
        "pairs": pairs,
        "data": fingerprint(args.data, keys),
        "precision": str(dtype).removeprefix("torch."),
        "processes": world,
    }
    start = (
        ["torchrun", "--nproc-per-node", os.getenv("LOCAL_WORLD_SIZE", str(world))]
        if world > 1
        else ["python"]
    )
    command = shlex.join([*start, "train.py", *(sys.argv[1:] if argv is None else argv)])
    with claim(out, rank):
        if agree(
            rank == 0
            and start_folder(
                out,
                "run.json",
                "train.py",
                description,
                {
                    "model": args.model,
                    "data_folder": args.data,
                    "versions": versions(),
                    "command": command,
                },
                args.overwrite,
            )
        ):
            if rank == 0:
                print(f"{out} is complete already: nothing to do")
            return 0
        sets = {
            key: encode(
                tokenizer,
                take(found, args.max_train_rows if key[0] == "train" else args.max_eval_rows),
                args.max_length,
            )
            for key, found in rows.items()
        }
        del rows
        used = np.unique(np.concatenate([np.unique(part.ids) for part in sets.values()]))
        new_ids = keep_tokens(model.encoder, used, tokenizer.pad_token_id)
        sets = {key: part._replace(ids=new_ids[part.ids]) for key, part in sets.items()}
        train_set = sets.pop(("train", source))
        model.to(device)
        if device.type == "cpu" and not args.compile:  # which fails on its views of random bits
            make_fast(model)
        if args.compile:
            torch.compiler.reset()
            torch.compiler.config.recompile_limit = (
                64  # 8 are soon used up: one row, evaluation, freezing
            )
            model.compile(
                dynamic=True, mode=args.compile
            )  # in place: after freezing it compiles itself anew
        if rank == 0:
            describe(args, model, count, note, dtype, train_set.lengths)
        advice = (
            "leave out --compile or give a smaller batch"
            if args.compile == "reduce-overhead"
            else f"with --accumulate {2 * args.accumulate} (and --overwrite) the gradient is the same in half the memory"
        )
        with out_of_memory(
            f"the step has --batch-size {args.batch_size} in --accumulate {args.accumulate} parts; "
            + advice
        ):
            number = fit(args, model, tokenizer, train_set, sets, readers, out, dtype)
        if rank == 0 and number:
            print(f"to go on:\n{command}")
        elif rank == 0:
            finish_folder(out, "run.json")
            metrics = [
                json.loads(line)
                for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            best = best_epochs(metrics, source)
            print(
                f"{out}: done; best epoch "
                + ", ".join(
                    f"{best[name]} by {what}"
                    for name, what in ((source, f"dev {source}"), ("joint", "the others' dev"))
                    if name in best
                )
            )
    return 128 + number if number else 0


if __name__ == "__main__":
    cli(main)
