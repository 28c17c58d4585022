"""What a run shows, wherever it does: any character on any output, lines as wide as the terminal, plain matplotlib."""

import codecs
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, NoReturn
from unicodedata import normalize

# For characters that an output does not know; accents go, and what is left is shown by its number.
PLAIN = {"×": "x", "·": "*", "–": "-", "−": "-", "“": '"', "”": '"', "‘": "'", "’": "'", "√": "sqrt ", "±": "+/-"}
PLAIN |= {"→": "->", "←": "<-", "≤": "<=", "≥": ">=", "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁵": "^5"}
PLAIN |= {"β": "beta", "γ": "gamma", "ε": "epsilon", "λ": "lambda", "σ": "sigma", "φ": "phi", "Σ": "sum "}


def replaced(error: UnicodeError) -> tuple[str, int]:
    """Readable ASCII for the first character that cannot be encoded, and where to go on; see codecs.register_error."""
    character = error.object[error.start]
    bare = PLAIN.get(character) or normalize("NFKD", character).encode("ascii", "ignore").decode()
    return bare or ascii(character)[1:-1], error.start + 1


class Output:
    """In the place of a text stream: takes any character and shows each line at once; silent if the stream is closed,
    and after one of these `lost` errors.
    """

    def __init__(self, stream: Any, *lost: type[Exception]) -> None:
        self.stream = StringIO() if stream is None or getattr(stream, "closed", False) else stream
        self.lost = lost
        codecs.register_error("replaced", replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with suppress(*self.lost):
            try:
                self.stream.write(text.encode(encoding, "replaced").decode(encoding))
            except (UnicodeError, LookupError):  # the stream knows fewer characters than it says
                self.stream.write(text.encode("ascii", "replaced").decode())
            if text.endswith("\n"):
                self.flush()
        return len(text)

    def flush(self) -> None:
        if hasattr(self.stream, "flush"):
            self.stream.flush()


@contextmanager
def any_output() -> Iterator[None]:
    """Standard output and error that take any character; afterwards they are the process's own again. Where nobody can
    read errors, that is none.
    """
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr, OSError, ValueError)):
        yield


def writes(stream: Any) -> bool:
    """Whether what is printed arrives: here, an empty line."""
    try:
        print(file=stream, flush=True)
        return True
    except OSError:
        return False


def blame(error: OSError, out: Path) -> str:
    """Where an error came from, if that is an output or the folder of results, in words; else nothing."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more when it ends
        return "the program that read the output has ended"
    if not error.filename and not writes(sys.stdout):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return f"standard output: {error.strerror}"
    place = Path(error.filename or os.devnull)
    inside = place.is_relative_to(out) or out.is_relative_to(place)
    return f"{place}: {error.strerror}; --out DIR chooses another place" if inside else ""


def fail(code: int, message: str) -> NoReturn:
    """End with one line on stderr and an exit code."""
    print(message, file=sys.stderr)
    sys.exit(code)


def width() -> int:
    """The columns of the terminal, from 60 to 80; without a terminal 80."""
    known = "COLUMNS" in os.environ or (hasattr(sys.stdout, "isatty") and sys.stdout.isatty())
    return min(max(get_terminal_size().columns, 60), 80) if known else 80


def wrapped(text: str, columns: int) -> str:
    """Text whose long lines are wrapped by words."""
    lines = text.split("\n")
    return "\n".join(fill(line, columns, subsequent_indent="  ") if len(line) > columns else line for line in lines)


@contextmanager
def plain_matplotlib() -> Iterator[None]:
    """Import matplotlib in here, and no settings file, backend or folder of the reader's can end or disturb that.
    Afterwards its settings are the reader's, if they can be read.
    """
    if "matplotlib" in sys.modules:
        yield
        return
    before, log = os.environ.copy(), logging.getLogger("matplotlib")
    level, backend = log.level, os.environ.pop("MPLBACKEND", None)
    log.setLevel(logging.ERROR)  # it warns of folders that cannot be written
    try:
        with chdir(Path(find_spec("matplotlib").origin).with_name("mpl-data")):  # the folder of its own settings
            import matplotlib
        yield
        with suppress(Exception), warnings.catch_warnings():  # what is wrong with them need not be told here
            warnings.simplefilter("ignore")
            theirs = dict(matplotlib.rc_params())
            theirs["backend"] = backend or theirs["backend"]
            chosen = {name: value for name, value in theirs.items() if name != "backend" or isinstance(value, str)}
            matplotlib.rcParams.update(chosen)
    finally:
        log.setLevel(level)
        for name in {"MPLBACKEND", "MPLCONFIGDIR"} & os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def own_settings() -> AbstractContextManager:
    """Matplotlib's own settings for what is drawn and saved in here, whatever the reader's; these come back."""
    from matplotlib import rc_context, rcParamsDefault

    return rc_context({name: value for name, value in rcParamsDefault.items() if name != "backend"})
