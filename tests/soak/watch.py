"""Looks at a server from outside: how quickly it answers small questions, and what its processes hold."""

import asyncio
import contextlib
import http.client
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil

_PROBED = ("/health", "/metrics")
_PROBE_SECONDS = 0.1


class Sample(NamedTuple):
    """What one process holds."""

    at: float
    rss: int
    fds: int
    threads: int


@dataclass(slots=True)
class Probes:
    """How long the small questions took, in seconds, by path; and how many failed."""

    seconds: dict[str, list[float]]
    failed: int


class Prober:
    """Asks from a process of its own, so that what it measures is the server and not the clients."""

    def __init__(self, base_url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._stop = context.Event()
        self._process = context.Process(target=_probe, args=(base_url, self._stop, sender), daemon=True)
        self._process.start()
        sender.close()

    def stop(self) -> Probes:
        """What it found."""
        self._stop.set()
        found: Probes = self._receiver.recv()
        self._process.join()
        self._receiver.close()
        self._process.close()
        return found


def _probe(base_url: str, stop: Event, sender: Connection) -> None:
    found = Probes({path: [] for path in _PROBED}, 0)
    host = urlsplit(base_url).netloc
    while not stop.wait(_PROBE_SECONDS):
        for path in _PROBED:
            started = time.monotonic()
            with contextlib.closing(http.client.HTTPConnection(host, timeout=30)) as connection:
                try:
                    connection.request("GET", path)
                    response = connection.getresponse()
                    response.read()
                    found.failed += response.status != 200
                except (OSError, http.client.HTTPException):
                    found.failed += 1
            found.seconds[path].append(time.monotonic() - started)
    sender.send(found)


class Watcher:
    """Samples processes now and then."""

    def __init__(self, processes: dict[str, psutil.Process], interval_s: float) -> None:
        self._processes = processes
        self._interval_s = interval_s
        self.samples: dict[str, list[Sample]] = {name: [] for name in processes}

    def look(self) -> dict[str, Sample]:
        """One sample of each."""
        return {name: self._sample(process) for name, process in self._processes.items()}

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            for name, sample in self.look().items():
                self.samples[name].append(sample)
            await asyncio.sleep(self._interval_s)

    def slopes(self) -> Iterator[tuple[str, float, int, int]]:
        """Of each process: bytes a minute behind the first third, and its first and last size."""
        for name, samples in self.samples.items():
            rest = samples[len(samples) // 3 :]
            if len(rest) < 3:
                continue
            at, rss = (np.array([getattr(sample, key) for sample in rest], float) for key in ("at", "rss"))
            yield name, float(np.polyfit(at - at[0], rss, 1)[0]) * 60, samples[0].rss, samples[-1].rss

    @staticmethod
    def _sample(process: psutil.Process) -> Sample:
        with process.oneshot():
            return Sample(time.monotonic(), process.memory_info().rss, process.num_fds(), process.num_threads())
