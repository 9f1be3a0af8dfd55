"""Loaded by a decoding process whose `PYTHONPATH` names this folder: some files then end it.

Decoders that fail at a file's content cannot be had to order, and libraries mend theirs. A file
that holds one of the marks below fails in the same way.
"""

import os
import signal
import time

from dernet_utils.imaging import reader

decode = reader.decode_radiograph


def decode_or_fail(data: bytes):
    if b"segmentation fault" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"abort" in data:
        os.abort()
    if b"exit" in data:
        os._exit(3)
    if b"endless" in data:
        time.sleep(1000)
    if b"memory" in data:
        bytearray(2**40)
    if b"fault" in data:
        raise KeyError("a fault")
    print("a message with a patient's name", flush=True)
    return decode(data)


reader.decode_radiograph = decode_or_fail
