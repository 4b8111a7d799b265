"""Replay seeds verbosely: `python -m tests.simulation SEED...`; without seeds run 1,000 new ones quietly."""

from __future__ import annotations

import random
import sys
import time
import traceback

from .beats import make_run


def main(arguments: list[str]) -> int:
    if arguments:
        for seed in arguments:
            make_run(int(seed), verbose=True).run()
        return 0
    first = random.SystemRandom().randrange(1 << 30)
    began = time.perf_counter()
    bad = []
    for seed in range(first, first + 1000):
        try:
            make_run(seed).run()
        except AssertionError:
            traceback.print_exc()
            bad.append(seed)
    print(f"seeds {first} to {first + 999}: {len(bad)} failures {bad}, {time.perf_counter() - began:.1f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
