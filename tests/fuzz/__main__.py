"""``python -m tests.fuzz``: run programs, or (``--mutate``) check that they notice broken rules."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from tests.fuzz import campaign, mutate, themes
from tests.fuzz.generate import generate
from tests.fuzz.program import SCOPES, render


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="how many seeds")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--inner", default="", help="an inner backend for all programs: inductor")
    parser.add_argument("--scope", default="", choices=SCOPES, help="share for longer than a graph")
    parser.add_argument("--show", action="store_true", help="print the program of --start")
    parser.add_argument("--mutate", action="store_true", help="switch the rules off, one by one")
    parser.add_argument(
        "--predicates",
        action="store_true",
        help="with --mutate: each predicate of a rule by itself, and each fix",
    )
    parser.add_argument("--rule", default="", help="with --mutate: only what starts so")
    parser.add_argument("--save", type=Path, help="a folder for the scripts of what failed")
    parser.add_argument(
        "--with",
        dest="gated",
        action="append",
        default=[],
        choices=themes.GATED,
        help="what is switched off as long as it fails",
    )
    options = parser.parse_args()
    themes.SWITCHED_ON.update(options.gated)
    torch.set_num_threads(1)
    # What torch fails at is counted; its log would drown the progress.
    torch._logging.set_logs(all=logging.CRITICAL)
    if options.show:
        print(render(generate(options.start)))
        return 0
    return _mutate(options) if options.mutate else _fuzz(options)


def _fuzz(options: argparse.Namespace) -> int:
    told, tally = 0.0, campaign.Tally()
    seeds = range(options.start, options.start + options.n)
    for program, judgement, tally in campaign.run(seeds, inner=options.inner, scope=options.scope):
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"seed {program.seed}: {tally.line()}", file=sys.stderr, flush=True)
        if tally.mismatches and tally.mismatches[-1] is program:
            print(f"mismatch: seed {program.seed}, {len(judgement.differences)} differences")
            _report(render(campaign.shrunk(program, inner=options.inner)), program.seed, options)
    print(tally.summary())
    return 1 if tally.mismatches else 0


def _report(source: str, seed: int, options: argparse.Namespace) -> None:
    print(source, flush=True)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{seed}.py").write_text(source)


def _mutate(options: argparse.Namespace) -> int:
    missed = 0
    predicates = (*mutate.PREDICATES, *mutate.FIXES, *mutate.HELD)
    for rule in predicates if options.predicates else mutate.RULES:
        theme = mutate.THEMES.get(rule)
        if not rule.startswith(options.rule) or (theme and not themes.is_on(theme)):
            continue
        begin = time.monotonic()
        ran, program = mutate.programs_until_noticed(
            rule, limit=options.n, start=options.start, inner=options.inner
        )
        seen = f"noticed by seed {program.seed}" if program else "NOT noticed"
        seconds = time.monotonic() - begin
        print(f"rule {rule}: {seen}, after {ran} programs, {seconds:.0f} s", flush=True)
        missed += program is None
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
