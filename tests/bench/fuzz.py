"""Change the files that vlmbuild reads at random, and report every error that is not one of its own.

python -m tests.bench.fuzz [PARSER ...] [--seed N] [--seconds N]

A change is of bytes, or of values: another type, a number out of range, a name that is missing, new or twice, a value from
elsewhere in the file. `tests/test_fuzz.py` runs a few with a fixed seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.bench.fuzz_parsers import PARSERS
from vlmbuild.errors import VlmbuildError

LIMIT = 30.0
"""Seconds in which every file is read or refused."""
MEMORY = 12 << 30
"""Address space of the command, in bytes, so that a large number is a MemoryError."""
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, 1e308, float("inf"), float("nan")),
    *("", "\0", "\ud800", "9" * 5000, "nan", "../x", "a.b", "__class__", "vlmbuild", "float32"),
    *([], {}, [[]], [0], [None], ["a"], {"": 0}, {"node": 0}, {"float": "x"}, [1, 2, 3, 4]),
)
TOML_VALUES = (
    *(
        "1",
        "-1",
        "1.5",
        "inf",
        "nan",
        "true",
        '""',
        '"x"',
        "1979-05-27",
        "07:32:00",
        "1979-05-27T07:32:00Z",
        "[]",
        "{}",
    ),
    *("[1, 2]", '["a"]', "{ a = 1 }", "[{}]", "9" * 5000, "[" * 2000, "'''", "0xff", '"\\u0000"'),
)


class Finding(NamedTuple):
    """An error that is not vlmbuild's own."""

    parser: str
    error: str
    data: bytes


def change(data: bytes, random: random.Random) -> bytes:
    """Change contents once or twice, by bytes or by values."""
    for _ in range(random.choice((1, 1, 2))):
        if random.random() < 0.3:
            data = _change_bytes(data, random)
        elif data.lstrip()[:1] == b"{":
            data = _change_json(data, random)
        elif data[8:9] == b"{":  # safetensors
            length = int.from_bytes(data[:8], "little")
            header = _change_json(data[8 : 8 + length], random)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        else:
            data = _change_toml(data, random)
    return data


def _change_bytes(data: bytes, random: random.Random) -> bytes:
    start, end = sorted(random.choices(range(len(data) + 1), k=2))
    end = min(end, start + 40)
    new = random.choice(
        (b"", bytes([random.randrange(256)]), data[start:end] * 2, b"\xff\xfe", b"\0", b'"', b"[" * 3000)
    )
    return data[:start] + new + data[end:]


def _change_json(data: bytes, random: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(value))
    if not places:
        return data
    container, key = random.choice(places)
    action = random.randrange(4)
    if action == 0:
        del container[key]
    elif action == 1:
        container[key] = copy.deepcopy(random.choice(places)[0])
    elif action == 2 and isinstance(container, dict):
        container[random.choice(("", "x", "schema", f"{key} "))] = container.pop(key)
    else:
        container[key] = random.choice(VALUES)
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode(errors="surrogatepass") + b"\n"  # canonical form, so that readers look at the values


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def _change_toml(data: bytes, random: random.Random) -> bytes:
    lines = data.split(b"\n")
    index = random.randrange(len(lines))
    name, equals, _ = lines[index].partition(b" = ")
    action = random.randrange(4)
    if equals and action < 2:
        lines[index] = name + equals + random.choice(TOML_VALUES).encode()
    elif action == 2:
        del lines[index]
    else:
        lines.insert(random.randrange(len(lines)), lines[index])
    return b"\n".join(lines)


def fuzz(name: str, seed: int, cases: int | None, seconds: float = float("inf")) -> Iterator[Finding]:
    """Yield findings of one parser, each kind of error once; stop after a number of cases or seconds."""
    file, parser = PARSERS[name]
    generator, seeds, seen = random.Random(f"{name} {seed}"), parser.seeds(), Counter[str]()
    started, count = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        for content in seeds:
            path.write_bytes(content)
            parser.read(path)
        while (cases is None or count < cases) and time.monotonic() - started < seconds:
            count += 1
            data = change(generator.choice(seeds), generator)
            path.write_bytes(data)
            try:
                with _limited(LIMIT):
                    parser.read(path)
            except VlmbuildError:
                continue
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
                seen[where] += 1
                if seen[where] == 1:
                    yield Finding(name, f"{where}: {str(error)[:200]}", data)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a call that takes longer."""

    def stop(*_: Any) -> NoReturn:
        raise TimeoutError(f"not read within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("parsers", nargs="*", choices=[*PARSERS, []], help="default: all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--seconds", type=float, default=60, help="for each parser, default 60")
    parser.add_argument("--keep", type=Path, help="folder for the files that were not understood")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    found = 0
    for name in options.parsers or PARSERS:
        print(f"{name}: seed {options.seed}", flush=True)
        for finding in fuzz(name, options.seed, None, options.seconds):
            found += 1
            print(f"  {finding.error}", flush=True)
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{name}-{found}").write_bytes(finding.data)
    print(f"{found} errors that are not vlmbuild's own")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
