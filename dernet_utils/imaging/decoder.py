"""Decoding in processes of their own, since a decoder written in C may end its process at a file.

A program that must outlive every file (the server, the node, a check of a dataset, a preparation)
decodes with a `Decoder`. Its processes run `main`.
"""

import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection, Pipe

from pydicom.multival import MultiValue

from dernet_utils.core.errors import DernetError, keep_place
from dernet_utils.imaging.radiograph import Radiograph
from dernet_utils.imaging.reader import decode_radiograph

MOST_SECONDS = 60  # for one file; 40 million uncompressed pixels took 2 s on an AMD EPYC
START_SECONDS = 120
MOST_BYTES = 4 * 2**30  # of memory of one process; the same image took 1.8 GB
PROGRAM = f"from {__name__} import main; main({{}})"  # with the number of an open file
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Decoder:
    """Decodes files in processes that are started once and stay, and started again if they end.

    A context manager; any number of threads may use it at once, of which as many work at a time as
    there are processes. A process ends when its `Decoder` is closed, or the program ends.

    Args:
        processes: Number of processes.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = [_Process() for _ in range(processes)]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)

    def decode(self, data: bytes) -> Radiograph:
        """Decode a DICOM, PNG or JPEG file.

        Args:
            data: The file's bytes.

        Returns:
            As `reader.read_radiograph` returns it.

        Raises:
            DernetError: As `reader.decode_radiograph` raises, or the file takes more than
                `MOST_SECONDS` or `MOST_BYTES`, or ends the process. The message does not
                name the file.
            RuntimeError: The process cannot start, or the decoding has a fault of its own.
        """
        process = self._free.get()
        try:
            answer = process.ask(data)
        finally:
            self._free.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.end()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """A process that decodes one file after another."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._child = subprocess.Popen(
                # Not from the folder in which the user is; without the keyboard's signals, which
                # are for the program.
                [sys.executable, "-P", "-c", PROGRAM.format(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | ONE_THREAD,
            )
        self._ready = False

    def ask(self, data: bytes) -> Radiograph | Exception:
        """Return a file's radiograph, or the error that its decoding raised."""
        self._wait_until_ready()
        try:
            self._connection.send_bytes(data)
            answered = self._connection.poll(MOST_SECONDS)
            answer = self._connection.recv_bytes() if answered else None
        except (EOFError, OSError):
            return self._replace("it ended the process that decodes it")
        except BaseException:  # such as an interrupt: an answer that comes late is no other file's
            self._replace("")
            raise
        if answer is None:
            return self._replace(f"it takes more than {MOST_SECONDS} s to decode")
        return pickle.loads(answer)  # by our own process

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        with suppress(EOFError, OSError):  # it has ended
            self._ready = self._connection.poll(START_SECONDS) and self._connection.recv_bytes()
        if not self._ready:
            self.end()
            self._start()
            raise RuntimeError("The decoding process does not start; its error is above.")

    def _replace(self, reason: str) -> DernetError:
        """Start a new process, and return the error that names the reason for it."""
        self.end()
        if self._child.returncode < 0 and self._child.returncode != -signal.SIGKILL:
            reason += f" ({signal.Signals(-self._child.returncode).name})"
        self._start()
        return DernetError(
            f"the file cannot be decoded: {reason}; copy it again, and if it is not damaged, "
            "export it uncompressed."
        )

    def end(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._child.wait(1)
        except subprocess.TimeoutExpired:  # it is still decoding
            self._child.kill()
            self._child.wait()


# --- In the process ---------------------------------------------------------------------------


def main(number: int) -> None:
    """Answer each file's bytes with its radiograph or the error raised, until the caller is gone.

    Args:
        number: Of the open file that connects this process with its `Decoder`.
    """
    connection = Connection(number)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an image of its memory would hold the file
    with suppress(EOFError, ConnectionError):  # the caller needs no more answers
        connection.send_bytes(b"ready")
        silent = os.open(os.devnull, os.O_WRONLY)  # decoders' messages may quote a file
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        while True:
            connection.send_bytes(_answer(connection.recv_bytes()))


def _answer(data: bytes) -> bytes:
    """Return a file's radiograph, or the error that its decoding raised, pickled."""
    try:
        return _pickled(decode_radiograph(data))
    except DernetError as error:
        found = keep_place(error)
    except MemoryError as error:
        large = DernetError(
            f"the file takes more than {MOST_BYTES // 2**30} GB of memory to decode; export the "
            "image again."
        )
        found = keep_place(large, error)
    except Exception as error:  # raised again by the caller
        found = keep_place(RuntimeError(traceback.format_exc()), error)
    return _pickled(found)


class _Pickler(pickle.Pickler):
    """Pickles headers, also those in which pydicom keeps a value with a local function."""

    def reducer_override(self, value: object) -> object:
        if isinstance(value, MultiValue):
            return MultiValue, (_unchanged, list(value))
        return NotImplemented


def _unchanged(value: object) -> object:
    return value


def _pickled(value: object) -> bytes:
    stream = BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()
