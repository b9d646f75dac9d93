"""Many clients of every kind, for a while; then what the server looks like.

    python -m tests.soak.clients --seconds 600 --clients 64 [--base-url URL [--pid PID]]

Without a URL it starts a server of the demo model. Exit status 1: an answer was wrong, a status was not as it should
be, memory, descriptors or threads grew, or something is left behind.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from tqdm import tqdm

from tests.server.launch import Server
from tests.soak.cases import Case, make_cases
from tests.soak.client import Client, Tally
from tests.soak.watch import Prober, Probes, Sample, Watcher

FLAGS = ("--dtype", "float32", "--device", "cpu", "--kv-cache-memory-bytes", str(256 << 20), "--disable-log-requests")
_MOST_GROWTH = 2 << 20
"""Bytes a minute behind the first third of the time."""
_MORE_FDS = 4
_MORE_THREADS = 8 + 3 * (os.cpu_count() or 4)
"""Pools start their threads when they are first needed."""
_SETTLE_SECONDS = 3.0

Run = Callable[[str, int | None], list[str]]


@dataclass(frozen=True, slots=True)
class Settings:
    """A run."""

    base_url: str
    pid: int | None
    """Of the server; None: memory is not watched."""
    seconds: float
    clients: int
    cases: int
    seed: int
    pictures: int = 0
    """Shown beforehand, to fill caches."""
    interval_s: float = 5.0
    """Between two looks at the processes."""


async def soak(settings: Settings) -> list[str]:
    """Run, print a report, and return what is wrong."""
    tally = Tally()
    cases = make_cases(settings.cases, settings.seed)
    await _learn(settings, cases)
    await _fill(settings, cases)
    watcher = Watcher(_processes(settings.pid), settings.interval_s)
    before = watcher.look()
    prober = Prober(settings.base_url)
    watching = asyncio.create_task(watcher.run())
    started = time.monotonic()
    await _work(settings, cases, tally)
    seconds = time.monotonic() - started
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    probes = await asyncio.to_thread(prober.stop)
    await asyncio.sleep(_SETTLE_SECONDS)
    _report(tally, probes, watcher, seconds)
    return [
        *(f"a wrong answer: {wrong}" for wrong in tally.wrong[:10]),
        *(f"unexpected: {text}" for text in tally.unexpected[:10]),
        *([f"{probes.failed} probes failed"] if probes.failed else []),
        *_growth(watcher, before, settings.seconds),
        *await _left_behind(settings.base_url),
    ]


async def _learn(settings: Settings, cases: list[Case]) -> None:
    """Ask each question alone."""
    teacher = Client(settings.base_url, cases, settings.seed, Tally())
    async with teacher:
        for case in tqdm(cases, "Alone", unit="answer", file=sys.stdout, mininterval=1):
            case.answer = await teacher.answer(case)


async def _fill(settings: Settings, cases: list[Case]) -> None:
    """Show as many pictures as the server remembers, so that what grows behind that is a leak."""
    async with Client(settings.base_url, cases, settings.seed, Tally()) as client:
        for _ in tqdm(range(settings.pictures), "Filling", unit="picture", file=sys.stdout, mininterval=1):
            await client.show()


async def _work(settings: Settings, cases: list[Case], tally: Tally) -> None:
    stop = asyncio.Event()
    clients = [
        Client(settings.base_url, cases, settings.seed * 10_007 + number, tally) for number in range(settings.clients)
    ]
    working = [asyncio.create_task(client.run(stop)) for client in clients]
    end = time.monotonic() + settings.seconds
    with tqdm(total=round(settings.seconds), desc="Soaking", unit="s", file=sys.stdout, mininterval=1) as progress:
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(1.0, left))
            progress.update(round(settings.seconds - max(0.0, end - time.monotonic())) - progress.n)
            wrong = len(tally.wrong) + len(tally.unexpected)
            progress.set_postfix_str(f"{tally.done.total()} done, {wrong} wrong", refresh=False)
    stop.set()
    await asyncio.gather(*working)


def _processes(pid: int | None) -> dict[str, psutil.Process]:
    if pid is None:
        return {}
    server = psutil.Process(pid)
    engine = max(server.children(), key=lambda process: int(process.memory_info().rss))
    return {"server": server, "engine": engine}


def _growth(watcher: Watcher, before: dict[str, Sample], seconds: float) -> list[str]:
    found = []
    for name, after in watcher.look().items():
        if after.fds > before[name].fds + _MORE_FDS:
            found.append(f"{name}: {before[name].fds} descriptors before, {after.fds} after")
        if after.threads > before[name].threads + _MORE_THREADS:
            found.append(f"{name}: {before[name].threads} threads before, {after.threads} after")
    if seconds >= 300:  # in less time chance decides
        found += [
            f"{name} grows by {slope / 2**20:.1f} MiB a minute"
            for name, slope, _, _ in watcher.slopes()
            if slope > _MOST_GROWTH
        ]
    return found


async def _left_behind(base_url: str) -> list[str]:
    async with aiohttp.ClientSession(base_url) as session:
        async with session.get("/health") as response:
            found = [] if response.status == 200 else [f"/health answers {response.status}"]
        async with session.get("/metrics") as response:
            text = await response.text()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        (value,) = re.findall(rf"^vllm:{name}\{{.*\}} (.*)$", text, re.MULTILINE)
        if float(value):
            found.append(f"{name} is {value}")
    return found


def _report(tally: Tally, probes: Probes, watcher: Watcher, seconds: float) -> None:
    print(f"\n{tally.done.total()} acts in {seconds:.0f} s: {dict(sorted(tally.done.items()))}")
    print(f"{tally.compared} answers compared, {len(tally.wrong)} wrong; {len(tally.unexpected)} unexpected")
    for path, times in probes.seconds.items():
        shown = ", ".join(f"p{p} {1000 * np.percentile(times, p):.0f} ms" for p in (50, 90, 99, 100)) if times else "-"
        print(f"{path}: {len(times)} probes, {shown}")
    for name, slope, first, last in watcher.slopes():
        ends = watcher.samples[name][0], watcher.samples[name][-1]
        grown = f"{first / 2**20:.0f} to {last / 2**20:.0f} MiB"
        print(f"{name}: {grown}, {slope / 2**20:+.2f} a minute behind the first third")
        print(f"    {ends[0].fds} to {ends[1].fds} descriptors, {ends[0].threads} to {ends[1].threads} threads")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.clients", description="Soak a server.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--cases", type=int, default=40, help="questions whose answers are compared")
    parser.add_argument("--pictures", type=int, default=600, help="pictures shown beforehand, which fill caches")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base-url", help="default: a server of the demo model is started")
    parser.add_argument("--pid", type=int, help="of the server at --base-url, so that its memory is watched")
    args = parser.parse_args()

    def run(base_url: str, pid: int | None) -> list[str]:
        settings = Settings(base_url, pid, args.seconds, args.clients, args.cases, args.seed, args.pictures)
        return asyncio.run(soak(settings))

    if args.base_url is not None:
        wrong = run(args.base_url.rstrip("/").removesuffix("/v1"), args.pid)
    else:
        wrong = with_own_server(run)
    print("\n".join(wrong) or "all is well")
    raise SystemExit(bool(wrong))


def with_own_server(run: Run) -> list[str]:
    """Run with a server of the demo model, which must have nothing to complain of and end well."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server.start(Path(folder), "--served-model-name", "soak", *FLAGS).wait_until_serving()
        try:
            wrong = run(server.url, server.process.pid)
            server.stop()
        finally:
            server.kill()
        complaints = [line for line in server.stderr.splitlines() if " ERROR " in line or "Traceback" in line]
        return wrong + [f"the server's log: {line}" for line in complaints[:5]]


if __name__ == "__main__":
    main()
