"""A link between two network namespaces that takes its time, for kernels without netem: packets wait in this process.

    python link.py NAMESPACE NAMESPACE SECONDS

Makes `slow0` in both, 10.78.0.1 and 10.78.0.2, and hands every packet over so many seconds later, until stdin is closed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF, TUN_WITHOUT_HEADER, NEW_NETWORK = 0x400454CA, 0x1001, 0x40000000


def device(namespace: str, address: str) -> int:
    """Make a device in a namespace; return what its packets are read from and written to."""
    space = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    assert ctypes.CDLL(None).setns(space, NEW_NETWORK) == 0
    made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(made, TUNSETIFF, struct.pack("16sH", b"slow0", TUN_WITHOUT_HEADER))
    for words in (("addr", "add", f"{address}/24", "dev", "slow0"), ("link", "set", "slow0", "up", "txqueuelen", "10000")):
        subprocess.run(["ip", *words], check=True)
    return made


def main() -> None:
    """Carry packets."""
    ends = [device(name, f"10.78.0.{number}") for number, name in enumerate(sys.argv[1:3], 1)]
    other, delay = dict(zip(ends, reversed(ends), strict=True)), float(sys.argv[3])
    waiting = deque[tuple[float, int, bytes]]()
    print("ready", flush=True)
    while True:
        until = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        for ready in select.select([*ends, 0], [], [], until)[0]:
            if ready == 0:
                return
            waiting.append((time.monotonic() + delay, other[ready], os.read(ready, 1 << 16)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, to, packet = waiting.popleft()
            os.write(to, packet)


if __name__ == "__main__":
    main()
