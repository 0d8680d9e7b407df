"""Gives back what it is given."""

from __future__ import annotations

from colm_serve.box import Work, serve


def make_work(prefix: str) -> Work:
    return lambda data: prefix.encode() + data


if __name__ == "__main__":
    serve(make_work)
