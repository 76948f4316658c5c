"""Prints the size in bytes of the largest tensor of a stored model: python -m benchmarks.convert.largest FOLDER."""

from __future__ import annotations

import sys

from univitar_ds.formats.recognise import open_stored


def main() -> None:
    stored = open_stored(sys.argv[1])
    print(max(info.nbytes for info in stored.tensors.infos.values()))


if __name__ == "__main__":
    main()
