"""`python -m tests.chaos`: fault plans over many seeds. `make chaos ARGS="--plans all --seeds 50 --dialect d3"`."""

import argparse
import asyncio
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from relay.simulator.dialect import DIALECTS
from tests.chaos.plans import PLANS
from tests.chaos.rounds import Result, run_round
from tests.chaos.stage import Run, Stage

EXAMPLES = f"""\
plans: {", ".join(PLANS)}

examples:
  make chaos                                                  every plan, 3 seeds, dialects in turn
  make chaos ARGS="--plans all --seeds 50 --dialect d3"       the long one
  make chaos ARGS="--plan worker-killed --seed 7 --dialect d0"
                                                              one run, again

Exit code 0: all is well; 1: a run failed, its logs are kept; 2: the command is wrong.
"""


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos",
        description="Strike the relay while chats talk, and see that a consumer knows all that Coder knows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plans", "--plan", default="all", metavar="NAMES", help="with commas between; all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many, from --first on (3)")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="the first seed (1)")
    parser.add_argument("--seed", type=int, metavar="N", help="this one only")
    parser.add_argument("--dialect", default="all", metavar="NAME", help=f"{', '.join(DIALECTS)}; all: in turn")
    parser.add_argument("--worlds", type=int, default=3, metavar="N", help="so many runs at once (3)")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no round after so long")
    parser.add_argument("--logs", type=Path, metavar="DIRECTORY", help="where logs of failed runs stay (a new one)")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="N", help="longer leases and deadlines, for a busy machine (1)"
    )
    parser.add_argument("--small", action="store_true", help="fewer chats and deeds in each run, for many seeds")
    parser.add_argument("--fail-fast", action="store_true", help="end with the first failure")
    parser.add_argument("--verbose", action="store_true", help="say how long each phase took")
    chosen = parser.parse_args(words)
    names = list(PLANS) if chosen.plans == "all" else chosen.plans.split(",")
    for name in names:
        if name not in PLANS:
            parser.error(f"no plan {name!r}; there are: {', '.join(PLANS)}")
    if chosen.dialect not in ("all", *DIALECTS):
        parser.error(f"no dialect {chosen.dialect!r}; there are: {', '.join(DIALECTS)}")
    if chosen.seeds < 1 or chosen.worlds < 1:
        parser.error("--seeds and --worlds begin at 1")
    chosen.plans = names
    return chosen


def rounds_of(chosen: argparse.Namespace) -> list[list[Run]]:
    """Runs that can go at once, so that a long campaign that is ended early has tried all plans alike."""
    seeds = [chosen.seed] if chosen.seed is not None else range(chosen.first, chosen.first + chosen.seeds)
    dialects = list(DIALECTS)

    def dialect(plan: str, seed: int) -> str:
        if chosen.dialect != "all":
            return str(chosen.dialect)
        return dialects[(seed + list(PLANS).index(plan)) % len(dialects)]

    def run(plan: str, seed: int) -> Run:
        return Run(plan, seed, dialect(plan, seed), small=chosen.small)

    rounds: list[list[Run]] = []
    for some in _batched(seeds, chosen.worlds):
        local = [run(plan, seed) for seed in some for plan in chosen.plans if not PLANS[plan].shared]
        rounds += [list(batch) for batch in _batched(local, chosen.worlds)]
        shared = [plan for plan in chosen.plans if PLANS[plan].shared]
        rounds += [[run(plan, seed) for seed in some] for plan in shared]
    return rounds


def _batched(items: Sequence[Run] | Sequence[int] | range, size: int) -> list[list]:  # type: ignore[type-arg]
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


async def campaign(chosen: argparse.Namespace) -> list[Result]:
    directory = chosen.logs or Path(tempfile.mkdtemp(prefix="chat-relay-chaos-"))
    started = time.monotonic()
    rounds = rounds_of(chosen)
    total = sum(map(len, rounds))
    results: list[Result] = []
    async with Stage.open(directory, patience=chosen.patience) as stage:
        begun = time.monotonic()
        try:
            for runs in rounds:
                if chosen.minutes is not None and time.monotonic() - started > chosen.minutes * 60:
                    print(f"time is over: {total - len(results)} runs were not begun", flush=True)
                    break
                for result in await run_round(stage, runs):
                    results.append(result)
                    tell(result, len(results), total, verbose=chosen.verbose)
                if chosen.fail_fast and not all(result.good for result in results):
                    break
        finally:  # also when somebody has seen enough
            sum_up(results, time.monotonic() - begun)
    return results


def sum_up(results: Sequence[Result], seconds: float) -> None:
    failed = [result for result in results if not result.good]
    each = seconds / max(1, len(results))
    print(f"{len(results)} runs, {len(failed)} failed, {seconds:.0f} s, {each:.1f} s each", flush=True)
    for result in failed:
        print(f"  {result.run.command}    logs: {result.directory}", flush=True)


def tell(result: Result, number: int, total: int, *, verbose: bool) -> None:
    fired = ", ".join(f"{name} {times}" for name, times in result.fired.items())
    verdict = "ok" if result.good else "FAILED"
    print(
        f"[{number}/{total}] {verdict} {result.run}: {result.seconds:.1f} s, {result.events} facts, "
        f"{result.copies} copies; {fired}",
        flush=True,
    )
    if verbose:
        print("      " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases.items()))
    for line in result.lines[:12]:
        print(f"      {line[:400]}")
    if len(result.lines) > 12:
        print(f"      and {len(result.lines) - 12} more")


def main(words: Sequence[str]) -> int:
    chosen = arguments(words)
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # connections that the plans cut
    logging.getLogger("aiormq.connection").setLevel(logging.CRITICAL)
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    terminated = False

    def interrupt(*_: object) -> None:
        nonlocal terminated
        terminated = True
        signal.raise_signal(signal.SIGINT)  # which the loop turns into an end in order: servers must not outlive us

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    try:
        results = asyncio.run(campaign(chosen))
    except KeyboardInterrupt:
        return 143 if terminated else 130
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
