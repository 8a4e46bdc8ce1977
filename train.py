"""Phase 2: fine-tune the encoder with a classifier over chosen layers, and freeze layers on the go.

    python train.py --model bert-base-multilingual-uncased --data data/xnli --out runs/mc-bert-wf \\
        --layers 6 8 11 --pooling max --freeze-layers 9 11 12 --freeze-epoch 2
    python train.py --model bert-base-multilingual-uncased --data data/xnli --out runs/baseline \\
        --head pooler

Reads   DATA/train.LANG.tsv and DATA/dev.*.tsv (test.*.tsv only with --track-test), and the encoder.
Writes  OUT/run.json, OUT/metrics.jsonl, TensorBoard events, OUT/epochs/K/ (the model after epoch K:
        the last, and each that is best so far on some dev set), OUT/epochs/mean/ (the mean of the
        weights after each epoch), OUT/resume/. Stopped and started again with the same command it
        goes on.
Paper   sections 1.4 and 1.6; conclusions 1, 2, 6, 7 and 8.
"""

import inspect
import shlex
import shutil
import signal
import sys
from contextlib import closing
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
from lib.devices import (
    autocast,
    broadcast,
    pick_device,
    pick_precision,
    start_processes,
    to_device,
    wait_for_all,
)
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
from lib.folders import (
    finish_folder,
    lock,
    read_json,
    read_run,
    start_folder,
    versions,
    write_atomic,
)
from lib.hub import revision
from lib.messages import StopSignal, UserError, cli, in_range, make_parser, out_of_memory
from lib.run_log import Log, data_line, metric_rows, precision_line, trainable
from lib.scores import best_epochs, mean_accuracies
from model import POOLINGS, Classifier, Settings, freeze_layers, predict, save_model

# Entries of run.json that may be others when a run goes on; what --precision came to may not.
MAY_DIFFER = (
    "model",
    "data_folder",
    "versions",
    "command",
    "arguments.precision",
    "arguments.save_steps",
    "arguments.keep_all",
)
LOG_STEPS = 10  # the processes add up what they count, and log it, every so many steps

# --- the pieces of a step -------------------------------------------------------------------------


def learning_rate(step, steps, peak, schedule, warmup=0.1):
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then linear decay or constant."""
    ramp = max(1, round(steps * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    if schedule == "linear":
        return peak * (steps - step) / max(1, steps - ramp)
    return peak


def make_optimizer(model, weight_decay):
    """Adam with decoupled weight decay, on matrices alone as BERT does; with 0 it is plain Adam.

    Not on embeddings: it would pull at the word pieces of languages that are evaluated and never
    trained on.
    """
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    embeddings, matrices, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter in tables:
            embeddings.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": embeddings, "weight_decay": 0.0},
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def distributed(model):
    """The module to call in training: the model, or its DistributedDataParallel.

    To be made anew after freezing: it waits for a gradient of each parameter that was trained when
    it was made.
    """
    if not dist.is_initialized():
        return model
    named = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers"
    if sync not in named:  # before torch 2.13
        sync = "broadcast_buffers"
    return DistributedDataParallel(model, **{sync: False})


def micro_batches(encoded, rows, pad_id, max_length, device, accumulate):
    """This process's share of a global batch, in `accumulate` parts: (batch, is it the last?).

    A process without rows runs one whose label is -1, which counts for nothing: the others wait for
    its gradients.
    """
    rank, world = start_processes()
    share = rows[rank::world]
    parts = np.array_split(share, max(1, min(accumulate, len(share))))
    for i, part in enumerate(parts):
        if len(part):
            batch = collate(encoded, part, pad_id, max_length)
        else:
            batch = collate(encoded, rows[:1], pad_id, max_length)
            batch["labels"] = np.full(1, -1)
        yield to_device(batch, device), i == len(parts) - 1


def layers_due(layers, when, epoch, metrics, source):
    """Which of `layers` are to be frozen by now (paper, section 1.6): none yet, or all.

    All, once `when` epochs are done; or, for "auto", once an evaluation's mean accuracy on the dev
    sets of the languages other than `source` was below the best before it.
    """
    if when == "auto":
        languages = {row["language"] for row in metrics if row["split"] == "dev"} - {source}
        means = list(mean_accuracies(metrics, "dev", languages, by="step").values())
        due = any(means[i] < max(means[:i]) for i in range(1, len(means)))
    else:
        due = when is not None and epoch >= when
    if not due:
        return []
    return sorted(layers)


# --- the run --------------------------------------------------------------------------------------


def fit(args, model, tokenizer, readers, train_set, sets, stop, log):
    """Train `model` on an Encoded; evaluate it on `sets` and save it after each epoch.

    args: the flags; readers: of parameter_layers(); sets: {(split, language): Encoded}. Returns 0,
    or the number of the signal that stopped it.
    """
    out, pad_id = Path(args.out), tokenizer.pad_token_id
    device, (rank, world) = pick_device(), start_processes()
    dtype, source = pick_precision(args.precision, device), args.train_language
    steps_per_epoch = -(-len(train_set.labels) // args.batch_size)
    steps = args.epochs * steps_per_epoch

    optimizer = make_optimizer(model, args.weight_decay)
    # in this order: the sum of clipping's norm depends on it in the last digit
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, metrics, totals, mean_weights = load_state(out, model, optimizer, scaler)
    log.start(step, steps)
    wrapped, frozen = distributed(model), []
    model.train()

    for epoch in range(step // steps_per_epoch, args.epochs):
        batches = train_batches(train_set.lengths, args.batch_size, args.seed, epoch)
        for rows in batches[step - epoch * steps_per_epoch :]:
            # freezing on the go (paper, section 1.6); "auto" may fall due in the midst of an epoch
            due = layers_due(args.freeze_layers, args.freeze_epoch, epoch, metrics, source)
            if due != frozen:
                frozen = due
                for parameter in freeze_layers(model.encoder, frozen, readers):
                    optimizer.state.pop(parameter, None)  # AdamW and clipping skip it from now on
                wrapped = distributed(model)
                log.say(frozen_line(frozen, model))

            # forward and backward, part by part
            torch.manual_seed((args.seed * 1_000_003 + step) * 1024 + rank)  # the same when resumed
            parts = micro_batches(train_set, rows, pad_id, args.max_length, device, args.accumulate)
            for batch, last in parts:
                wrapped.require_backward_grad_sync = last  # DDP's
                with autocast(device, dtype):
                    logits = wrapped(batch)  # (B, C)
                labels = batch["labels"]
                loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-1)
                scaler.scale(loss * (world / len(rows))).backward()  # DDP averages over processes
                right = (logits.argmax(1) == labels).sum()
                totals += torch.stack([loss.detach(), right, (labels >= 0).sum()])

            # the step
            rate = learning_rate(step, steps, args.lr, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            log.step(len(rows))

            # all that follows is logging, evaluating and saving
            end_of_epoch = step == (epoch + 1) * steps_per_epoch
            evaluate_now = end_of_epoch or (args.eval_steps and step % args.eval_steps == 0)
            save_now = end_of_epoch or (args.save_steps and step % args.save_steps == 0)
            stop_now = 0
            if world == 1:  # several processes agree on it in add_up(), every LOG_STEPS steps
                stop_now = stop.number
            if not (evaluate_now or save_now or stop_now or step % LOG_STEPS == 0):
                continue
            mean_loss, accuracy, stop_now = add_up(totals, stop.number)
            if evaluate_now or save_now or not np.isfinite(mean_loss):
                check_finite(mean_loss, model, step, args)
            speed = log.train(step, mean_loss, accuracy, rate)
            if evaluate_now:
                scores = {("train", ""): (accuracy, mean_loss)}
                scores |= score_sets(model, sets, pad_id, dtype, args.max_length)
                done = epoch + 1 if end_of_epoch else round(step / steps_per_epoch, 4)
                metrics += metric_rows(scores, done, step, rate, frozen, speed)
                log.evaluation(metrics[-len(scores) :], metrics)
                totals.zero_()
            if end_of_epoch and rank == 0:
                mean_weights = update_mean(mean_weights, model, epoch + 1)
                best = best_epochs(metrics, source)
                save_epoch(model, tokenizer, out / "epochs", epoch + 1, args.keep_all, best)
            if (save_now or stop_now) and rank == 0:
                progress = {
                    "step": step,
                    "metrics": metrics,
                    "totals": totals,
                    "mean": mean_weights,
                }
                save_state(out, model, optimizer, scaler, progress)
            if evaluate_now or save_now or stop_now:
                wait_for_all()  # no process runs ahead of a save
                log.restart_clock()
            if stop_now and step < steps:
                name = signal.Signals(stop_now).name
                log.say(f"stopped by {name} after step {step}, the state is saved")
                log.say("the same command, without --overwrite, goes on")
                return stop_now
    if rank == 0:
        model.load_state_dict(mean_weights, strict=False)
        save_model(model, tokenizer, out / "epochs" / "mean")
    return 0


def frozen_line(frozen, model):
    layers = " ".join(map(str, frozen))
    return f"layers {layers} are frozen from here on, {trainable(model):,} parameters to train"


def score_sets(model, sets, pad_id, dtype, max_length):
    """Accuracy and mean cross-entropy on each set; leaves the model training.

    sets: {(split, language): Encoded}. Returns {(split, language): (accuracy, loss)}.
    """
    scores = {}
    for (split, language), encoded in sets.items():
        desc = None  # no progress bar
        if start_processes()[0] == 0:
            desc = f"{split} {language}"
        batches = eval_batches(encoded, pad_id, max_length)
        logits = torch.from_numpy(predict(model, batches, len(encoded.labels), dtype, desc))
        labels = torch.from_numpy(encoded.labels)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        scores[split, language] = accuracy, F.cross_entropy(logits, labels).item()
    model.train()
    return scores


def add_up(totals, signal_number):
    """Over all processes: mean loss and accuracy since the last evaluation, and a signal, or 0.

    totals: (3,) loss, right answers, rows. The first process keeps the sum of all, the others begin
    again from 0.
    """
    numbers = torch.cat([totals, totals.new_tensor([signal_number > 0])])
    if dist.is_initialized():
        dist.all_reduce(numbers)
    totals.copy_(numbers[:3])
    loss, right, rows, signalled = numbers.tolist()
    if start_processes()[0] > 0:
        totals.zero_()  # or the next sum would count them twice
    if signalled and not signal_number:  # another process got it
        signal_number = signal.SIGTERM
    return loss / rows, right / rows, signal_number


def check_finite(loss, model, step, args):
    """UserError when the loss or a weight is not a finite number."""
    problem = None
    if not np.isfinite(loss):
        problem = f"the loss is {loss}"
    elif not all(weight.isfinite().all() for weight in model.parameters()):
        problem = "a weight is not finite"
    if problem:
        raise UserError(
            f"{problem} at step {step}: lower --lr (now {args.lr}) or give --precision fp32; a "
            f"state from before is kept in {args.out}, if one was saved"
        )


# --- what is saved, so that a run goes on as if it had never stopped ------------------------------
# What is random in a step depends on (seed, step, process) alone; what is frozen and which epochs
# are best follow from the flags and the metrics. The rest is here.


def save_state(out, model, optimizer, scaler, progress):
    """Replace OUT/resume/state.pt; the previous one stays until the new one is whole."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        **progress,
    }
    path = out / "resume" / "state.pt"
    with write_atomic(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch, where the disk is full at the end of its file
            if "unexpected pos" not in str(error):
                raise
            raise UserError(f"{path} cannot be written whole: is the disk full?") from None


def load_state(out, model, optimizer, scaler):
    """Load OUT/resume/state.pt, if there is one.

    Returns the steps done, the rows of metrics, the totals of add_up() (of all processes in the
    first) and the mean of the weights; or those to begin with.
    """
    path, device = out / "resume" / "state.pt", next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    if not path.exists():
        return 0, [], totals, {}
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    if start_processes()[0] == 0:
        totals.copy_(saved["totals"])
        print(f"going on after step {saved['step']}")
    return saved["step"], saved["metrics"], totals, saved["mean"]


def update_mean(mean, model, count):
    """The mean of all float weights after each of `count` epochs, from that of one less.

    Schmidt et al. 2023; no label of a target language is looked at. On the CPU, in float32.
    """
    updated = {}
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point():
            continue
        weight = weight.detach().cpu()
        if count == 1:
            updated[name] = weight.clone()
        else:
            updated[name] = mean[name] + (weight - mean[name]) / count
    return updated


def save_epoch(model, tokenizer, folder, epoch, keep_all, best):
    """Save the model after an epoch; drop those that are neither the last nor the best by anything.

    best: of best_epochs(), {name: epoch}.
    """
    save_model(model, tokenizer, folder / str(epoch))
    kept = {str(epoch), *map(str, best.values())}
    for path in folder.iterdir():
        if not keep_all and path.name not in kept:
            shutil.rmtree(path)


# --- setting up -----------------------------------------------------------------------------------


def build_model(args, labels, pairs):
    """The model to train, the encoder's number of blocks, whether its pooler is pretrained, and
    parameter_layers(). args: the flags; pairs: whether the data set is of pairs.

    The encoder is cut after the highest pooled layer: no gradient would reach what is above.
    """
    settings = Settings(
        labels=labels,
        head=args.head,
        layers=args.layers,
        pooling=args.pooling,
        combine=args.combine,
        dropout=args.dropout,
        hidden=args.hidden,
        pairs=pairs,
        max_length=args.max_length,
        precision=args.precision,
    )
    torch.manual_seed(args.seed)  # the first weights of whatever the file does not hold
    encoder, pretrained_pooler = load_encoder(args.model)
    count = top = len(blocks(encoder))
    if settings.head == "layers":
        check_layers(settings.layers, count, "--layers")
        drop_pooler(encoder)
        top = max(settings.layers)
        cut_after(encoder, top)
    # by name, for keep_tokens() will put another embedding in the place of the first
    readers = parameter_layers(encoder, top)
    # what the cut left and nobody reads is not trained; BERT's head reads the pooler
    for parameter_name, parameter in encoder.named_parameters():
        read_by_head = settings.head == "pooler" and parameter_name.startswith("pooler.")
        if parameter_name not in readers and not read_by_head:
            parameter.requires_grad = False
    if args.encoder_dropout is not None:
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = args.encoder_dropout
    torch.manual_seed(args.seed)  # the same head, whatever loading drew
    return Classifier(encoder, settings), count, pretrained_pooler, readers


def model_lines(model, count, pretrained_pooler, readers, freeze):
    """What the model is made of and what is to be frozen, for the banner."""
    settings, name = model.settings, type(model.encoder).__name__
    if settings.head == "pooler":
        note = "BERT's own head on the pretrained pooler"
        if not pretrained_pooler:
            note = "BERT's own head; the model has no pretrained pooler, it starts at random"
    else:
        note = f"{settings.pooling} pooling of layers {' '.join(map(str, settings.layers))}"
        if settings.combine == "mix":
            note += " mixed"
        if max(settings.layers) < count:
            note += f", the {count - max(settings.layers)} above cut off"
    lines = [f"{name}, {count} blocks: {note}"]
    if freeze:
        lines.append(f"layers to freeze: {' '.join(map(str, freeze))}")
    for name, (first, last) in readers.items():
        if first < last and freeze:
            lines.append(f"{name} is read by layers {first} to {last}: frozen when all of them are")
    above = [layer for layer in freeze if layer > max(settings.layers)]
    if above:
        lines.append(
            f"freezing layer {' '.join(map(str, above))} is a no-op: it is above the highest layer "
            "pooled and was cut off"
        )
    return lines


def parse_args(argv):
    parser = make_parser(__doc__)
    some, any_number, share = in_range(int, 1), in_range(int, 0), in_range(float, 0, below=1)

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
        help="evaluate on the test sets too, as the paper's Figure 5 does, and keep the epoch best "
        "on the other languages' ones, for evaluate.py --epoch test; nothing else looks at them",
    )
    add("--max-train-rows", type=some, metavar="N", help="train on N rows, spread evenly")
    add("--max-eval-rows", type=some, metavar="N", help="evaluate on N rows of each file")

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
        help="the layers' pooled states side by side (default, the paper's way), or one vector, "
        "their sum with learned softmax weights",
    )
    add(
        "--layers-from",
        metavar="FILE",
        help="take --layers and --pooling from the best.json of grid_search.py",
    )
    add("--dropout", type=share, default=0.1, help="on the classifier's input (default: 0.1)")
    add(
        "--encoder-dropout",
        type=share,
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
        help="freeze exactly these layers, 0 is the embeddings (the paper: 9 11 12); needs "
        "--freeze-epoch",
    )
    add(
        "--freeze-epoch",
        metavar="N|auto",
        help="freeze once N epochs are done (the paper: 2; 0: from the start), or at the first "
        "evaluation whose mean accuracy on the other languages' dev sets falls below the best so "
        "far (auto: that looks at labels in the target languages, so it is the joint protocol, not "
        "zero-shot)",
    )

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=some, default=5, help="passes over the train rows (default: 5)")
    add(
        "--lr",
        type=in_range(float, above=0, below=np.inf),
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
        help="split each batch into N parts, to save memory; the gradient stays the same",
    )
    add(
        "--weight-decay",
        type=in_range(float, 0, below=np.inf),
        default=0.0,
        help="decoupled, on matrices but for embeddings (default: 0)",
    )
    add("--max-length", type=int, default=128, help="tokens a row may have (default: 128)")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of matrix products (default: auto: bf16 where the hardware has it, else fp16 on a "
        "GPU)",
    )
    add("--compile", action="store_true", help="run the model through torch.compile")
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
        default=1000,
        metavar="N",
        help="save the state every N steps too, not only each epoch (default: 1000; 0: never)",
    )
    add("--keep-all", action="store_true", help="keep the models after all epochs")
    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def check_args(args, parser):
    """Refuse flags that do not fit together; read --layers-from."""
    if args.layers_from and (args.layers or args.pooling):
        parser.error(
            "--layers-from gives the layers and the pooling: leave out --layers and --pooling"
        )
    chosen = args.layers or args.pooling or args.layers_from or args.combine == "mix"
    if args.head == "pooler" and chosen:
        parser.error(
            "--head pooler reads [CLS] of the last layer: leave out --layers, --pooling, "
            "--layers-from and --combine"
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
    if args.layers_from:
        best = read_json(args.layers_from, "grid_search.py", ("layers", "pooling"))
        args.layers, args.pooling = best["layers"], best["pooling"]
    args.layers = args.layers or [6, 8, 11]
    args.pooling = args.pooling or "max"


def read_data(args):
    """Labels and Rows of the source's train, of every dev and, with --track-test, of every test."""
    source = args.train_language
    keys = [("dev", language) for language in split_languages(args.data, "dev", source)]
    if not keys:
        raise UserError(f"{args.data} has no dev file")
    if args.freeze_epoch == "auto" and keys == [("dev", source)]:
        raise UserError(
            f"{args.data} has no dev file in another language than {source}, which --freeze-epoch "
            "auto needs"
        )
    if args.track_test:
        keys += [("test", language) for language in split_languages(args.data, "test", source)]
    labels = read_labels(args.data)
    return labels, read_sets(args.data, [("train", source), *keys], labels)


def describe(args, model, tokenizer, sets, dtype, command):
    """What defines the run, for run.json."""
    settings = model.settings
    paths = ("model", "data", "out", "overwrite", "layers_from")  # what is in them is compared
    return {
        "arguments": {key: value for key, value in vars(args).items() if key not in paths},
        "revision": revision(args.model),
        "tokenizer": tokenizer_identity(tokenizer),
        "labels": settings.labels,
        "pairs": settings.pairs,
        "data": fingerprint(args.data, sets),
        "precision": str(dtype).removeprefix("torch."),
        "processes": start_processes()[1],
        "model": args.model,
        "data_folder": args.data,
        "versions": versions(),
        "command": command,
    }


def tokenise(args, model, tokenizer, sets):
    """Encoded of all Rows, and the encoder with those word embeddings alone that they use."""
    encoded = {}
    for (split, language), rows in sets.items():
        limit = args.max_train_rows if split == "train" else args.max_eval_rows
        encoded[split, language] = encode(tokenizer, take(rows, limit), args.max_length)
    used = np.unique(np.concatenate([np.unique(part.ids) for part in encoded.values()]))
    new_ids = keep_tokens(model.encoder, used, tokenizer.pad_token_id)
    return {key: part._replace(ids=new_ids[part.ids]) for key, part in encoded.items()}


def place(model, device, compiled):
    """Move the model to its device, and make it fast there."""
    model.to(device)
    if compiled:
        torch.compiler.reset()
        torch.compiler.config.recompile_limit = 64  # one row, evaluation, freezing: 8 are few
        model.compile(dynamic=True)  # in place: after freezing it compiles itself anew
    elif device.type == "cpu":
        make_fast(model)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    args = parse_args(argv)
    device, (rank, _) = pick_device(), start_processes()
    dtype = pick_precision(args.precision, device)

    # the data and the model
    args.train_language = train_language(args.data, args.train_language)
    labels, sets = read_data(args)
    tokenizer = load_tokenizer(args.model)
    pairs = sets["train", args.train_language].text_b is not None
    model, count, pretrained_pooler, readers = build_model(args, labels, pairs)
    check_length(model.encoder, args.max_length)
    check_layers(args.freeze_layers, count, "--freeze-layers")

    # the run folder, which may hold a part of this run already
    out, command = Path(args.out), shlex.join(["train.py", *argv])
    description = describe(args, model, tokenizer, sets, dtype, command)
    # a run from before a flag was there goes on with the flag's default
    defaults = {"arguments": vars(parse_args(["--model", "", "--data", "", "--out", ""]))}
    smaller = f"--accumulate {2 * args.accumulate} (and --overwrite)"
    advice = f"with {smaller} the gradient is the same in half the memory"
    with lock(out, rank), out_of_memory(advice), StopSignal() as stop:
        complete = rank == 0 and start_folder(
            out, "run.json", "train.py", description, MAY_DIFFER, args.overwrite, defaults
        )
        if broadcast(complete):
            if rank == 0:
                print(f"{out} is complete already: nothing to do")
            return 0
        sets = tokenise(args, model, tokenizer, sets)
        train_set = sets.pop(("train", args.train_language))
        place(model, device, args.compile)
        if rank == 0:
            lines = model_lines(model, count, pretrained_pooler, readers, args.freeze_layers)
            print(*lines, sep="\n")
            print(data_line(model))
            print(precision_line(dtype, args.precision))
        with closing(Log(out)) as log:
            number = fit(args, model, tokenizer, readers, train_set, sets, stop, log)
        if rank == 0 and not number:
            finish_folder(out, "run.json")
            best = best_epochs(read_run(out)[1], args.train_language)
            chosen = [f"{name} {epoch}" for name, epoch in sorted(best.items())]
            print(f"{out}: done; best epochs by language and protocol: {', '.join(chosen)}")
    if number:
        return 128 + number
    return 0


if __name__ == "__main__":
    cli(main)
