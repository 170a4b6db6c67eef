"""What work needs from elsewhere and no file shows: a judge's key and server, a tracker's login."""

import http.client
import netrc
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.upstream import check_packages
from recipes_lib.core.errors import EnvironmentFault, RecipesError, one_line
from recipes_lib.core.terminal import bare_address, mask_secrets
from recipes_lib.evals.recipe import EvalRecipe, ServerSection

# Long enough for a hosted server on a slow network: only one that is gone takes so long.
TIMEOUT_S = 10.0
_WANDB_SERVER = "https://api.wandb.ai"


@dataclass(frozen=True)
class Host:
    """Where the work will run, as far as that decides what can be looked at from here."""

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    set_there: frozenset[str] = frozenset()  # variables that get their values only there
    is_here: bool = True  # whether it is this machine
    own_python: bool = True  # whether it runs with this Python, whose packages can be looked for
    # whether a judge that is expected on its machine is started there
    starts_judges: bool = field(default_factory=lambda: "RECIPES_JUDGE_WANTED" in os.environ)

    def has(self, *names: str) -> bool:
        """Whether one of these variables will have a value."""
        return any(self.environment.get(name) or name in self.set_there for name in names)


def missing_needs(
    recipes: Iterable[Recipe], evals: Iterable[EvalRecipe], host: Host
) -> list[RecipesError]:
    """Return an error for each need that is not met, each once."""
    errors: list[RecipesError] = []
    for recipe in recipes:
        errors.extend(_missing_trackers(recipe, host))
    for evaluation in evals:
        missing_keys = list(_missing_keys(evaluation, host))
        errors.extend(missing_keys)
        judge = evaluation.judge
        if judge is None or not judge.is_served or missing_keys:
            continue
        # one that a job starts is not there yet, and 127.0.0.1 of another machine cannot be asked
        if judge.served_here and (host.starts_judges or not host.is_here):
            continue
        variable = judge.api_key_variable or ""
        reason = _ask(judge.address, host.environment.get(variable))
        if reason is None or (variable in host.set_there and "401" in reason):
            continue  # it answers, or wants a key that is not known here
        what = f"judge: {bare_address(judge.address)} does not answer: {mask_secrets(reason)}"
        hint = "start its server (docs/evaluation.md), or correct judge.base_url and the key"
        errors.append(evaluation.document.fault("judge.base_url", what, hint))
    first: dict[str, RecipesError] = {}
    for error in errors:
        first.setdefault(error.args[0], error)
    return list(first.values())


def _missing_trackers(recipe: Recipe, host: Host) -> Iterator[RecipesError]:
    """Yield an error for a tracker that is not installed, or that does not know who sends."""
    if host.own_python:
        try:
            check_packages(recipe)
        except RecipesError as error:
            yield error
            return
    named = recipe.train.get("report_to") or []
    trackers = [named] if isinstance(named, str) else named
    if "wandb" in trackers and not _wandb_knows_the_user(host):
        key = "train.report_to"
        what = f"{key}: wandb is not logged in, and would end the training"
        remedy = "wandb login, or set WANDB_API_KEY; without a network: WANDB_MODE=offline"
        yield recipe.document.fault(key, what, remedy)


def _wandb_knows_the_user(host: Host) -> bool:
    """Whether wandb finds a key, or needs none. Its order: variables, settings, ~/.netrc."""
    if host.has("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DISABLED"):
        return True
    if host.environment.get("WANDB_MODE", "online") not in ("online", "shared"):
        return True
    home = Path(host.environment.get("HOME") or Path.home())
    folder = Path(host.environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    for settings in (folder / "settings", Path("wandb/settings")):
        # a key, or a server of one's own: its rules are not known here
        if settings.is_file() and re.search(r"^(api_key|base_url)\b", settings.read_text(), re.M):
            return True
    address = host.environment.get("WANDB_BASE_URL") or _WANDB_SERVER
    server = str(urlsplit(address).hostname)
    files = [home / ".netrc", home / "_netrc"]
    if host.environment.get("NETRC"):
        files.insert(0, Path(host.environment["NETRC"]).expanduser())
    for file in files:
        if file.is_file():
            with suppress(netrc.NetrcParseError, OSError):
                return netrc.netrc(file).authenticators(server) is not None
            return False
    return False


def _missing_keys(evaluation: EvalRecipe, host: Host) -> Iterator[EnvironmentFault]:
    """Yield an error for a server's key that is not set."""
    for name in ("generation", "judge"):
        section: ServerSection | None = getattr(evaluation, name)
        variable = section.api_key_variable if section and section.is_served else None
        if variable is None or variable in host.set_there:
            continue
        key = host.environment.get(variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():  # no header can hold it
            what = f"{name}: the environment variable {variable} is not set, or holds no key"
            remedy = f"export {variable}=...; for a server without keys"
            hint = f"{remedy}: {name}.api_key_variable: null"
            yield evaluation.document.fault(f"{name}.api_key_variable", what, hint)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go with it."""

    def redirect_request(self, *_: object) -> None:
        """Return no request, so that the redirect itself is the answer."""


@cache  # many files name one server
def _ask(address: str, key: str | None) -> str | None:
    """Ask a server for its models; return why it cannot be used, or None if it answers."""
    parts = urlsplit(address)
    # a query of the address stays behind the path
    listing = parts._replace(path=f"{parts.path.rstrip('/')}/models", fragment="")
    request = urllib.request.Request(urlunsplit(listing))
    if key:
        request.add_header("Authorization", f"Bearer {key.strip()}")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as answer:
        # any answer will do, "no such page" too, but one that refuses the key, or of a proxy whose
        # server is away
        with answer:
            if answer.code == 401 and key:
                return "it refuses the key (401)"
            if answer.code == 401:
                return "it asks for a key (401)"
            return f"status {answer.code}" if answer.code >= 500 else None
    except urllib.error.URLError as error:
        if isinstance(error.reason, OSError):
            return one_line(error.reason)
        return one_line(error)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return one_line(error)
