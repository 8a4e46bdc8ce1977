"""What a user is told: a mistake as one sentence, the types of flags, progress."""

import argparse
import contextlib
import errno
import functools
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()  # loading weights takes a second

# no room, no permission, a file where a folder should be: the user's to put right
USERS_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
}


class UserError(Exception):
    """Something the user can put right: one sentence with file, line, value and what to do."""


def cli(main):
    """Run a script's main() and exit with its status.

    A UserError or a full disk is one sentence and status 2; a bug keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a label that the terminal cannot print
    try:
        status = main()
        sys.stdout.flush()  # a closed pipe is met here, not at the interpreter's end
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os._exit(141)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in USERS_ERRNOS:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def first_line(error):
    """An exception's first line, and the next one where the first only announces it."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and others:
        first = f"{first} {others[0].strip()}"
    return first[:300]


@functools.cache
def say_once(sentence):
    """Print a note or a warning to standard error, however often it is met."""
    print(sentence, file=sys.stderr)


def make_parser(description, **settings):
    """argparse's parser, which prints the description as it stands and takes whole flags alone."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )


def in_range(kind, low=-math.inf, above=-math.inf, below=math.inf):
    """A type for argparse: an int or a float in a range."""
    limits = []
    if low > -math.inf:
        limits.append(f"{low} or more")
    if above > -math.inf:
        limits.append(f"more than {above}")
    if below < math.inf:
        limits.append(f"less than {below}")

    def parse(text):
        value = kind(text)
        if not (value >= low and value > above and value < below):  # nan fits nothing
            raise argparse.ArgumentTypeError(f"{text}, expected {' and '.join(limits)}")
        return value

    parse.__name__ = kind.__name__  # argparse says it when the text is no number
    return parse


@contextlib.contextmanager
def out_of_memory(advice):
    """Turn running out of memory into one sentence that ends with `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out and "can't allocate memory" not in str(error):
            raise
        reason = next((s for s in first_line(error).split(". ") if "memory" in s), "")
        raise UserError(f"out of memory ({reason or first_line(error)}): {advice}") from None


def progress_bar(**settings):
    """A tqdm bar; in a log file, where nobody watches, it is drawn every 20 seconds only."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 20, **settings)


class StopSignal:
    """SIGTERM and Ctrl-C as a flag, `number`, that a loop looks at between steps; 0 until then.

    torchrun, Slurm and terminals send them to all processes, often twice within milliseconds: only
    a Ctrl-C that comes a second later stops at once. In another thread than the first, where agents
    of sweeps call main(), no signal can be caught.
    """

    def __enter__(self):
        self.number, self.since, self.before = 0, 0.0, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.since + 1:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
