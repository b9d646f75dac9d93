"""Decodes many damaged images, in processes that may crash:

python -m tests.soak.fuzz_images --count 50000 --seed 1
"""

import argparse
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from engine.image_decode import ImageError, decode_image
from tests.image_files import all_files
from tests.image_mutants import mutants

MAX_PIXELS = 1_000_000
MOST_SECONDS = 5.0
_HANGS_AFTER = 120.0
_PART = 1000
_LEAK = re.compile(r"\b0x|Traceback|File \"|\.py\b|(^|\s)/\w")


@dataclass
class Report:
    """What came of all images."""

    decoded: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    """What may not be, with the image's name: crashes, hangs, other errors, answers that are not as promised."""
    slowest: tuple[float, str] = (0.0, "none")
    """Seconds of processor time, and the image's name."""
    peak_mib: int = 0
    """What a worker's memory grew by at the most."""

    def __str__(self) -> str:
        seconds, name = self.slowest
        lines = [f"{self.decoded} decoded, {self.refused} refused, {len(self.faults)} faults", *self.faults]
        return "\n".join([*lines, f"slowest: {seconds:.3f} s ({name})", f"peak memory: {self.peak_mib} MiB"])


def fault_of(data: bytes) -> tuple[bool, str | None]:
    """Whether a file was decoded, and what is wrong with that or with the refusal."""
    try:
        image = decode_image(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        message = str(error)
        return False, f"tells {message!r}" if not message or _LEAK.search(message) else None
    except BaseException as error:
        return False, f"raises {error!r}"
    if image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
        return True, f"gives {image.mode} of {image.size}"
    if len(image.tobytes()) != 3 * image.width * image.height:
        return True, "gives too few pixels"
    return True, None


def _memory_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _work(results: Connection, numbers: range, seed: int) -> None:
    warnings.simplefilter("ignore")  # PIL's, about what it reads
    files = all_files()
    before = _memory_mib()
    for name, data in mutants(files, numbers, seed):
        started = time.process_time()
        decoded, fault = fault_of(data)
        results.send((name, time.process_time() - started, decoded, fault, _memory_mib() - before))
    results.close()


class _Worker:
    """A process that goes through some numbers, and is followed by another one where it crashes."""

    def __init__(self, numbers: range, seed: int) -> None:
        self._numbers, self._seed = numbers, seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.results, sender = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(target=_work, args=(sender, self._numbers, self._seed))
        self._process.start()
        sender.close()
        self.heard = time.monotonic()

    def take(self) -> tuple[Any, ...] | None:
        """The next result; None at the end."""
        try:
            result: tuple[Any, ...] = self.results.recv()
        except EOFError:
            self._process.join()
            if not self._process.exitcode:
                return None
            fault = f"ends the process with {self._process.exitcode}"
            result = f"{self._numbers[0]}" if self._numbers else "the end", 0.0, False, fault, 0
            self._numbers = self._numbers[1:]
            self._start()
            return result
        self.heard = time.monotonic()
        self._numbers = self._numbers[1:]
        return result

    def end_if_it_hangs(self) -> None:
        """Its end is then taken for a crash."""
        if time.monotonic() - self.heard > _HANGS_AFTER and not self.results.poll():
            self._process.kill()


def fuzz(count: int, seed: int, processes: int = 1) -> Report:
    """Decode so many images."""
    report = Report()
    parts: Iterator[range] = (range(first, min(count, first + _PART)) for first in range(0, count, _PART))
    workers = [_Worker(part, seed) for _, part in zip(range(processes), parts, strict=False)]
    with tqdm(total=count, unit=" images", disable=None) as bar:
        while workers:
            ready = wait([worker.results for worker in workers], timeout=1)
            for worker in list(workers):
                if worker.results not in ready:
                    worker.end_if_it_hangs()
                elif (result := worker.take()) is not None:
                    _note(report, *result)
                    bar.update()
                else:
                    workers.remove(worker)
                    workers += [_Worker(part, seed) for part in [next(parts, None)] if part is not None]
    return report


def _note(report: Report, name: str, seconds: float, decoded: bool, fault: str | None, mib: int) -> None:
    report.decoded += decoded
    report.refused += not decoded
    report.slowest = max(report.slowest, (seconds, name))
    report.peak_mib = max(report.peak_mib, mib)
    if fault is None and seconds > MOST_SECONDS:
        fault = f"takes {seconds:.1f} s"
    if fault is not None:
        report.faults.append(f"{name}: {fault}")


def main() -> int:
    """Print a report; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    report = fuzz(args.count, args.seed, args.processes)
    print(report)
    return int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main())
