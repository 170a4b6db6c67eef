"""The wheels to carry to a machine with a GPU and no network, whose image has torch and lacks some
of the rest: listed, downloaded, and held against a limit on their size.

    pip list --format freeze > image.txt                                  # on the image
    python benchmarks/gpu_wheels.py image.txt --into wheels               # here
    pip install --no-index --no-deps wheels/*.whl && python -m benchmarks.gpu_check    # there

A package is carried where the image has none, or one that this project or what it needs does not
take. torch and what comes with it are the image's.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]
LIMIT_MIB = 64
GLIBC = 34
# made for the image's CUDA
OF_TORCH = ("torch", "triton", "nvidia-", "cuda-")


def wanted() -> list[str]:
    """Return what setup.py installs."""
    found: dict[str, Any] = {}
    with patch("setuptools.setup", lambda **values: found.update(values)):
        runpy.run_path(str(PROJECT / "setup.py"))
    return list(found["install_requires"])


def image_of(lines: Iterable[str]) -> dict[str, str]:
    """Return the version of each package; empty where only the name is known.

    Example:
        >>> image_of(["PyYAML==6.0.4", "torch==2.11.0+cu130", "peft"])
        {'pyyaml': '6.0.4', 'torch': '2.11.0+cu130', 'peft': ''}
    """
    parts = (line.strip().partition("==") for line in lines if line.strip())
    return {canonicalize_name(name): version for name, _, version in parts}


def to_carry(packages: Iterable[Mapping[str, Any]], image: Mapping[str, str]) -> dict[str, str]:
    """Return name and version of what the image lacks, or has in a version that is not taken. What
    the image has brings its own needs.

    Args:
        packages: the metadata of all that is needed, as pip reports it.

    Example:
        >>> needs = [{"name": "trl", "version": "1.16", "requires_dist": ["datasets>=5", "rich"]}]
        >>> needs += [{"name": name, "version": "5.2"} for name in ("datasets", "rich")]
        >>> to_carry(needs, {"rich": "", "datasets": "4.8"})
        {'trl': '1.16', 'datasets': '5.2'}
    """
    known = {canonicalize_name(one["name"]): one for one in packages}
    carried: dict[str, str] = {}
    waiting = [Requirement(line) for line in wanted()]
    for asked in waiting:  # it grows
        name = canonicalize_name(asked.name)
        here = image.get(name)
        fits = here == "" or (here is not None and asked.specifier.contains(here, True))
        if fits or name in carried or name not in known or name.startswith(OF_TORCH):
            continue
        carried[name] = known[name]["version"]
        needs = map(Requirement, known[name].get("requires_dist", ()))
        waiting += [one for one in needs if not one.marker or one.marker.evaluate({"extra": ""})]
    return carried


def main(argv: list[str] | None = None) -> int:
    """List, download, add up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path, help="the image's `pip list --format freeze`")
    parser.add_argument("--into", type=Path, help="download the wheels into this folder")
    parser.add_argument("--python", default="3.12", help="the image's Python")
    options = parser.parse_args(argv)
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 16, -1)]
    place = ["--only-binary=:all:", "--python-version", options.python]
    for platform in (*platforms, "manylinux2014_x86_64", "manylinux1_x86_64"):
        place += ["--platform", platform]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        words = ["install", "-q", "--dry-run", "--ignore-installed", "--report", str(report)]
        words += [*place, "--target", scratch, "-c", str(PROJECT / "constraints.txt"), *wanted()]
        pip(words)
        packages = [one["metadata"] for one in json.loads(report.read_text("utf-8"))["install"]]
    lines = options.image.read_text(encoding="utf-8").splitlines()
    carried = to_carry(packages, image_of(lines))
    named = [f"{name}=={version}" for name, version in sorted(carried.items())]
    if options.into is None:
        print("\n".join(named))
        return 0
    pip(["download", "-q", "--no-deps", *place, "-d", str(options.into), *named])
    sizes = {path.name: path.stat().st_size / 2**20 for path in options.into.glob("*.whl")}
    for name, mib in sorted(sizes.items(), key=lambda entry: -entry[1]):
        print(f"{mib:6.1f} MiB  {name}")
    words = ["git", "ls-files", "-z"]
    tracked = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    code = sum((PROJECT / name).lstat().st_size for name in tracked.split("\0") if name) / 2**20
    total = sum(sizes.values()) + code
    print(f"{total:6.1f} MiB: {len(sizes)} wheels, and {code:.1f} of this repository")
    if total > LIMIT_MIB:
        print(f"more than the {LIMIT_MIB} MiB that may travel", file=sys.stderr)
    return int(total > LIMIT_MIB)


def pip(words: list[str]) -> None:
    """Run pip; what it says goes to the terminal."""
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
