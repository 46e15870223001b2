"""List the wheels that a machine with torch and triton alone lacks, or download them into a folder.

Everything is for Python 3.12 on x86-64 Linux with CUDA 13. bitsandbytes' wheel has a library for each CUDA, ROCm and XPU
version, 43 MB in all; only CUDA 13.0's is kept, which leaves 4 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {
    "transformers==5.23.0": 13_336_114,
    "bitsandbytes==0.50.2": 3_593_748,
    "liger-kernel==0.8.5": 910_117,
    "peft==0.21.2": 835_427,
    "click==8.5.1": 126_163,
    "filelock==4.3.1": 244_559,
}
"""Requirement -> bytes of what travels."""
LIMIT = 64 << 20
_LIBRARY = "libbitsandbytes_cuda130.so"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    if len(sys.argv) == 1:
        for name, size in WHEELS.items():
            print(f"{size / 1e6:8.1f} MB  {name}")
        print(f"{sum(WHEELS.values()) / 1e6:8.1f} MB  in all; bitsandbytes without libraries other than {_LIBRARY}")
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *(f"--platform={name}" for name in _PLATFORMS)]
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([*command, "-d", work, *WHEELS], check=True)
        for wheel in Path(work).glob("*.whl"):
            _copy(wheel, folder / wheel.name)
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{folder}: {total / 1e6:.1f} MB")
    if total > LIMIT:
        raise SystemExit(f"{folder} holds {total} bytes of wheels, more than {LIMIT}. Remove the largest.")


def _copy(wheel: Path, target: Path) -> None:
    """Copy a wheel, without the libraries that are not used."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for entry in source.infolist():
            name = entry.filename.rpartition("/")[2]
            if not name.startswith("libbitsandbytes_") or name in (_LIBRARY, "libbitsandbytes_cpu.so"):
                copy.writestr(entry, source.read(entry))


if __name__ == "__main__":
    main()
