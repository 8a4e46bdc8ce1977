"""What a user is told: a mistake as one sentence, flags' types, progress."""

import argparse
import contextlib
import errno
import functools
import math
import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class UserError(Exception):
    """Something the user can put right: one sentence with file, line, value and what was expected."""


DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
}  # no room, no permission, a file where a folder should be: the user's to put right


def cli(main):
    """Run a script's main: a UserError or a full disk is one sentence and exit status 2; a bug keeps its traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main()
        sys.stdout.flush()  # here a closed pipe can still be met below, not at the interpreter's end
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os._exit(141)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.exit(print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr) or 2)


def first_line(error):
    """An exception's first sentence, for a message of one line; with the next line when it only announces that one."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first)[:300]


def in_range(kind, low=-math.inf, above=-math.inf, below=math.inf):
    """A type for argparse: an int or a float that is `low` or more, more than `above` and less than `below`."""
    expected = " and ".join(
        [f"{low} or more"] * (low > -math.inf)
        + [f"more than {above}"] * (above > -math.inf)
        + [f"less than {below}"] * (below < math.inf)
    )

    def parse(text):
        value = kind(text)
        if (
            not (low <= value < below and value > above) and not value == math.inf == below
        ):  # nan fits nothing
            raise argparse.ArgumentTypeError(f"{text}, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse says it when the text is no number
    return parse


@contextlib.contextmanager
def out_of_memory(advice):
    """Turn running out of memory into one sentence that ends with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        what = next(part for part in first_line(error).split(". ") if "memory" in part)
        raise UserError(f"out of memory ({what}): {advice}") from None


def progress_bar(**settings):
    """A tqdm bar; where nobody watches, as in a log file, it is drawn every 20 seconds only."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 20, **settings)


@functools.cache
def say_once(sentence):
    print(sentence, file=sys.stderr)
