"""The client's profiles: login URLs in files of their own, `$XDG_CONFIG_HOME/wstunnel/profiles/NAME`, mode 0600."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from wstunnel.auth import LoginUrl, check_user_name, parse_login_url
from wstunnel.errors import LocalError, UsageError
from wstunnel.state import PrivateDirectory, home_directory, reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

DEFAULT_PROFILE: Final = "default"
URL_VARIABLE: Final = "WSTUNNEL_URL"


def client_url(argument: str | None, environ: Mapping[str, str], profile: str | None) -> LoginUrl:
    """The server to use: the argument, else the profile that is asked for, else `WSTUNNEL_URL`, else profile `default`.

    Args:
        argument: the URL on the command line, `None` if there is none.
        environ: the environment of the process.
        profile: the value of `--profile`, `None` if it was not given. A flag outranks the environment.

    Raises:
        UsageError: a malformed URL, or no such profile.
        LocalError: a profile that cannot be used.
    """
    if argument is not None:
        return parse_login_url(argument)
    variable = environ.get(URL_VARIABLE, "")
    if profile is not None or not variable.strip():
        return load_profile(DEFAULT_PROFILE if profile is None else profile, environ)
    try:
        return parse_login_url(variable)
    except UsageError as error:
        raise UsageError(
            f"in {URL_VARIABLE}: {error.message}", text=error.text, position=error.position, grammar=error.grammar
        ) from None


def client_urls(arguments: Sequence[str], environ: Mapping[str, str], profile: str | None) -> tuple[LoginUrl, ...]:
    """The servers to use, in the order in which they are tried: several arguments, or several in `WSTUNNEL_URL` with
    white space between; a profile holds one. Args and errors as those of `client_url`.
    """
    variable = environ.get(URL_VARIABLE, "").split()
    if arguments:
        urls = tuple(client_url(argument, environ, profile) for argument in arguments)
    elif profile is not None or len(variable) < 2:
        return (client_url(None, environ, profile),)
    else:
        urls = tuple(client_url(None, {URL_VARIABLE: text}, None) for text in variable)
    if len(set(urls)) < len(urls):
        raise UsageError("the same login URL is given twice")
    return urls


def save_profile(name: str, url: LoginUrl, environ: Mapping[str, str]) -> Path:
    """Write a profile, or replace it, atomically; makes the directory (mode 0700). Returns the file.

    Raises:
        UsageError: not a name for a profile.
        LocalError: the configuration directory cannot be written.
    """
    check_user_name(name)
    directory = _directory(environ)
    try:
        with PrivateDirectory.open(directory, create=True) as private:
            private.write(name, (url.reveal() + "\n").encode())
    except OSError as error:
        raise LocalError(f"the profile {directory / name} cannot be written: {reason(error)}") from error
    return directory / name


def load_profile(name: str, environ: Mapping[str, str]) -> LoginUrl:
    """Read a profile.

    Raises:
        UsageError: there is none of that name; names those that there are, and `wstunnel login`.
        LocalError: it cannot be read, is malformed, or others may read it, as ssh refuses such a key.
    """
    check_user_name(name)
    directory = _directory(environ)
    path = directory / name
    try:
        with PrivateDirectory.open(directory) as private:
            found = private.read_with_status(name)
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise LocalError(f"the profile {path} cannot be read: {reason(error)}") from error
    if found is None:
        raise _missing(name, environ)
    status, data = found
    if status.st_mode & 0o077:
        raise LocalError(
            f"the profile {path} holds a secret that others may read (mode {status.st_mode & 0o777:04o}): "
            f"chmod 600 {path}; if others may have read it, make a new one with `wstunnel invite`"
        )
    try:
        return parse_login_url(data.decode())
    except UnicodeDecodeError as error:
        raise LocalError(f"the profile {path} is not text: make it anew with `wstunnel login`") from error
    except UsageError as error:
        raise LocalError(
            f"the profile {path} is malformed ({error.message}): make it anew with `wstunnel login`"
        ) from None


def list_profiles(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The names of all profiles, sorted; none if there is no directory yet.

    Raises:
        LocalError: the directory cannot be read.
    """
    directory = _directory(environ)
    try:
        with PrivateDirectory.open(directory) as private:
            return tuple(private.names())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise LocalError(f"the profiles in {directory} cannot be read: {reason(error)}") from error


def _directory(environ: Mapping[str, str]) -> Path:
    return home_directory(environ, "XDG_CONFIG_HOME", ".config") / "wstunnel" / "profiles"


def _missing(name: str, environ: Mapping[str, str]) -> UsageError:
    names = list_profiles(environ)
    existing = f"there are: {', '.join(names)}" if names else "there are none yet"
    option = "" if name == DEFAULT_PROFILE else f" --profile {name}"
    return UsageError(
        f"there is no profile `{name}` ({existing}): make it with `wstunnel login URL{option}`, "
        f"or give a login URL as argument or in {URL_VARIABLE}"
    )
