"""How close to memcpy is a chunk's way into and out of kvd on one host, and how close to a bare
socket is a question about one?

The answer on the back of an envelope. A load is two messages and one copy. A message there and
back costs 15 us between awake processes and 70 us where both cores sleep in between; Python and
protobuf add as much again. 32 MiB at 10 GB/s are 3400 us, so load and store should reach 95 % of
memcpy, with 5 % more CPU; 1 MiB is 100 us, half of memcpy's speed; at 4 KiB there is nothing but
messages. A view is one message there and back and a release that nobody waits for: less than two
echoes. 512 keys are 16 KiB in a packet, cut into keys on the other side, and ten dict probes
however many chunks there are. Hashing 131,072 tokens is 512 KiB of BLAKE2b at 1 GB/s: 500 us more.

What is compared, all in one run, sample beside sample, each client a process of its own:

    memcpy          numpy's copyto between prefaulted private buffers: one thread
    memcpy shared   the same with the client's own copy, which shares large ones among threads
    kvd local       client.store = reserve, copy, commit; client.load = pin, copy, release
    kvd gRPC        the same calls without shared memory, bytes over a Unix socket
    Redis           SET and GET over a Unix socket, redis-py with hiredis, nothing on disk

The figures compare with one thread's memcpy. From 4 MiB on the client copies with more threads
where it has more cores, and can be faster than that: what the planes add to the copy itself is the
distance from `memcpy shared`, and what the threads cost is in the CPU seconds.

Memory is warm: daemon and clients have touched every page of the arena before, and it is full, so
that each store takes the place of the chunk unused for longest. First touch stands in rows of its
own. All routes walk through as many bytes as the arena has, Redis excepted, which has four values a
client. CPU seconds are those of all processes that take part, client and server. A GB is 10**9
bytes.

A view and a lookup are asked with client and server on a core each: an engine works while the
daemon waits and has to be woken. The same on one core, where nothing sleeps and the software's own
cost is all there is, stands in the table; there it is some ten echoes.

    python benchmarks/local.py [--quick] [--json FILE] [--cpu-size SIZE]
"""

from __future__ import annotations

import time

from benchmarks.common import (
    arguments,
    console_for,
    host_facts,
    print_figures,
    print_rows,
    write_json,
)
from benchmarks.local_planes import measure_planes
from benchmarks.local_questions import measure_questions
from kvd.sizes import parse_size


def main() -> int:
    """Measure, print the tables, write the JSON. Missed targets are reported, not failed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--cpu-size", default="512MiB", help="the daemon's arena (default 512MiB)")
    options = parser.parse_args()
    console = console_for(options.json)
    console.print(" | ".join(f"{name} {value}" for name, value in host_facts().items()))
    started = time.monotonic()
    figures, rows = measure_planes(
        parse_size(options.cpu_size),
        headline_rounds=30 if options.quick else 100,
        rounds=8 if options.quick else 24,
        console=console,
    )
    title = "store and load, one chunk a call, n clients together"
    print_rows(console, title, rows, hidden=["samples"])
    more_figures, more_rows = measure_questions(
        rounds=25 if options.quick else 100, calls=100 if options.quick else 200
    )
    print_rows(console, "questions, one client", more_rows)
    print_figures(console, [*figures, *more_figures])
    console.print(f"{time.monotonic() - started:.0f} s")
    write_json(options.json, "local", [*figures, *more_figures], [*rows, *more_rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
