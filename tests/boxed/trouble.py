"""Does what it is told to: each is a way not to come to a good end."""

from __future__ import annotations

import os
import signal
import time

from colm_serve.box import Work, serve


def make_work() -> Work:
    def work(data: bytes) -> bytes:
        match data:
            case b"raise":
                raise ValueError("as told")
            case b"spin":
                while True:
                    pass
            case b"sleep":
                time.sleep(3600)
            case b"eat":
                return bytes(4 * 2**30)
            case b"die":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"exit":
                os._exit(3)
            case b"pid":
                return str(os.getpid()).encode()
        return data

    return work


if __name__ == "__main__":
    serve(make_work)
