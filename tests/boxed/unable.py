"""Has nothing to work with."""

from __future__ import annotations

from colm_serve.box import Work, serve


def make_work() -> Work:
    raise FileNotFoundError("nothing to work with")


if __name__ == "__main__":
    serve(make_work)
