"""What is installed of each extra of this distribution, by the metadata that setup.py gave it."""

import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path

DISTRIBUTION = "recipes-lib"
_CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass
class Extra:
    """An extra, and which of its packages are missing or of versions that it does not take."""

    name: str
    size: int = 0
    missing: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    @property
    def install(self) -> str:
        """The line that installs it beside what is installed."""
        if (_CHECKOUT / "setup.py").is_file():
            return f"pip install -e '{_CHECKOUT}[{self.name}]'"
        origin = installed_from()
        if origin:
            return f"pip install '{DISTRIBUTION}[{self.name}] @ {origin}'"
        return f"pip install '{DISTRIBUTION}[{self.name}]'"


def installed_from() -> str:
    """Return the address of the folder, wheel or repository that pip installed this distribution
    from (PEP 610); nothing where it came from a package index.
    """
    try:
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    origin = json.loads(text or "{}")
    vcs = origin.get("vcs_info")
    if vcs:
        return f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    return str(origin.get("url", ""))


def installed_version(package: str) -> str | None:
    """Return the version of a package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> list[Extra]:
    """Return the extras, the smallest first; none where this package was not installed."""
    from packaging.requirements import Requirement

    if installed_version(DISTRIBUTION) is None:
        return []
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    found = {name: Extra(name) for name in metadata.get_all("Provides-Extra") or []}
    for line in metadata.get_all("Requires-Dist") or []:
        package = Requirement(line)
        version = installed_version(package.name)
        for extra in found.values():
            if package.marker is None or not package.marker.evaluate({"extra": extra.name}):
                continue
            extra.size += 1
            if version is None:
                extra.missing.append(package.name)
            elif not package.specifier.contains(version, prereleases=True):
                extra.other.append(f"{package.name} {version} (needs {package.specifier})")
    return sorted(found.values(), key=lambda extra: extra.size)
