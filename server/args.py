"""The command line: the engine's flags and the server's own."""

import argparse
import json
import os
import re
import ssl
import sys
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from engine.args import EngineArgs
from engine.environment import fetch_timeout
from engine.log import LOG_FORMATS
from server.tool_parsers import PARSERS


def _flag(default: Any, group: str, text: str, *, choices: tuple[str, ...] = (), kind: Any = None) -> Any:
    metadata = {"group": group, "help": text, "choices": choices, "kind": kind}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(slots=True)
class ServerArgs:
    """The flags of the groups media and server."""

    allowed_local_media_path: str | None = _flag(None, "media", "folder below which file: URLs may read; default: none")
    allowed_media_domains: list[str] = _flag([], "media", "hosts that images may come from; default: any", kind="names")
    allow_private_media_hosts: bool = _flag(False, "media", "fetch from loopback and private addresses too")
    max_image_bytes: int = _flag(20 << 20, "media", "bytes of one encoded image", kind=int)
    max_image_pixels: int = _flag(64_000_000, "media", "pixels of one image", kind=int)
    max_redirects: int = _flag(3, "media", "redirects that fetching an image may follow", kind=int)

    host: str = _flag("127.0.0.1", "server", "address to listen on")
    port: int = _flag(8000, "server", "port to listen on; 0: a free one", kind=int)
    uds: str | None = _flag(None, "server", "Unix socket to listen on, instead of host and port")
    api_key: list[str] = _flag(
        [], "server", "key or keys that clients must send; also VLLM_API_KEY; default: none is asked for", kind="names"
    )
    allowed_origins: list[str] = _flag(["*"], "server", "origins that browsers may call from", kind="names")
    ssl_keyfile: str | None = _flag(None, "server", "private key of the TLS certificate")
    ssl_certfile: str | None = _flag(None, "server", "TLS certificate")
    root_path: str = _flag("", "server", "path below which a proxy serves this server")
    chat_template: str | None = _flag(None, "server", "a file, or the Jinja template itself; default: the checkpoint's")
    trust_request_chat_template: bool = _flag(False, "server", "let requests bring a chat template")
    tool_call_parser: str | None = _flag(
        None,
        "server",
        "format in which the model calls tools; default: tools are called on demand only",
        choices=tuple(PARSERS),
    )
    response_role: str = _flag("assistant", "server", "role of the answers")
    max_request_bytes: int = _flag(64 << 20, "server", "bytes of one request's body", kind=int)
    shutdown_timeout: float = _flag(30.0, "server", "seconds that running requests get at shutdown", kind=float)
    disable_playground: bool = _flag(False, "server", "serve no pages for browsers at / and /dashboard")
    disable_log_requests: bool = _flag(False, "server", "write no line for each request")
    log_level: str = _flag(
        "info", "server", "what is logged", choices=("debug", "info", "warning", "error", "critical")
    )
    log_format: str = _flag("text", "server", "how lines of the log look; json: one object each", choices=LOG_FORMATS)
    otlp_traces_endpoint: str | None = _flag(
        None, "server", "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span of each request"
    )


class _Parser(argparse.ArgumentParser):
    """Ends with one readable line."""

    def error(self, message: str) -> NoReturn:
        fail(message + _hint(message))


def _hint(message: str) -> str:
    """What may have been meant by a word that is no flag."""
    unknown = message.removeprefix("unrecognized arguments: ").split()
    if not message.startswith("unrecognized") or not unknown:
        return ""
    if not unknown[0].startswith("-"):
        return ": the model is named by --model"
    flags = [_flag_name(flag) for flag in (*EngineArgs.flags(), *fields(ServerArgs))]
    near = get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.75)
    return f": did you mean {near[0]}?" if near else ": --help lists the flags, docs/migration.md what became of vLLM's"


def _flag_name(flag: "Field[Any]") -> str:
    return "--" + flag.name.replace("_", "-")


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line to standard error and exit."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def parse_args(argv: list[str]) -> tuple[EngineArgs, ServerArgs]:
    """Parse and check the command line; a wrong one ends the program with status 2."""
    parser = _Parser(
        prog="python -m server",
        description="Serve a vision-language model to OpenAI clients.",
        epilog="Environment: VLLM_API_KEY, VLLM_IMAGE_FETCH_TIMEOUT (seconds, default 5), HF_TOKEN, HF_HOME.",
        usage="%(prog)s [--model MODEL] [flags]",
        allow_abbrev=False,
    )
    order = ("model", "vision", "media", "scheduler and cache", "parallel", "server")
    groups = {name: parser.add_argument_group(name) for name in order}
    for flag in (*EngineArgs.flags(), *fields(ServerArgs)):
        add_flag(groups[flag.metadata["group"]], flag)
    values = vars(parser.parse_args([with_dashes(word) for word in argv]))
    engine_names = {flag.name for flag in EngineArgs.flags()}
    engine = EngineArgs(**{name: value for name, value in values.items() if name in engine_names})
    server = ServerArgs(**{name: value for name, value in values.items() if name not in engine_names})
    if os.environ.get("VLLM_API_KEY"):
        server.api_key = [*server.api_key, os.environ["VLLM_API_KEY"]]
    try:
        _check(server)
        if engine.image_input_type == "image_features":
            raise ValueError("--image-input-type image_features is for offline use: the server takes pixel_values")
    except ValueError as error:
        fail(str(error))
    return engine, server


def add_flag(group: Any, flag: "Field[Any]") -> None:
    """Let a parser, or a group of one, take a flag that a dataclass's field describes."""
    name, meta = _flag_name(flag), flag.metadata
    default = flag.default_factory() if callable(flag.default_factory) else flag.default
    common = {"dest": flag.name, "default": default, "help": _help(meta["help"], default)}
    if flag.name == "enable_prefix_caching":
        group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
    elif isinstance(default, bool):
        group.add_argument(name, action="store_true", **common)
    elif meta["kind"] == "names":
        group.add_argument(name, nargs="+", action=_Names, metavar="NAME", **common)
    else:
        choices = meta["choices"] or None
        group.add_argument(name, type=meta["kind"] or str, choices=choices, metavar=_metavar(meta), **common)


class _Names(argparse.Action):
    """Takes several names, one after the other, each with the flag, or as a JSON list, in place of the default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """See argparse."""
        before = getattr(namespace, self.dest)
        names = [name for word in values for name in _listed(word)]
        setattr(namespace, self.dest, [*([] if before is self.default else before), *names])


def _listed(word: str) -> list[str]:
    """The names of a JSON list, or the one name that anything else is."""
    try:
        names = json.loads(word) if word.startswith("[") else None
    except ValueError:
        names = None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else [word]


def _help(text: str, default: Any) -> str:
    """The flag's line with its default, unless the line tells it in words."""
    if "default:" not in text and "required" not in text:
        shown = " ".join(default) if isinstance(default, list) else "" if default is None else str(default)
        if isinstance(default, bool):
            shown = "on" if default else "off"
        text = f"{text} (default: {shown or 'none'})"
    return text.replace("%", "%%")


def _metavar(meta: Any) -> str | None:
    if meta["choices"]:
        return "{" + ",".join(meta["choices"]) + "}"
    return {int: "N", float: "X"}.get(meta["kind"], "TEXT")


def with_dashes(word: str) -> str:
    """Flags may be written with underscores."""
    return re.sub(r"^--[^=]+", lambda match: match[0].replace("_", "-"), word)


def _check(args: ServerArgs) -> None:
    for name in ("max_image_bytes", "max_image_pixels", "max_request_bytes"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}: it must be from 0 to 65535")
    if not 0 <= args.max_redirects <= 20:
        raise ValueError(f"--max-redirects is {args.max_redirects}: it must be from 0 to 20")
    if not 0 <= args.shutdown_timeout < float("inf"):
        raise ValueError(f"--shutdown-timeout is {args.shutdown_timeout}: it must be at least 0")
    if (args.ssl_keyfile is None) != (args.ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile are needed together")
    for name in ("ssl_keyfile", "ssl_certfile"):
        file = getattr(args, name)
        if file is not None and not Path(file).is_file():
            raise ValueError(f"--{name.replace('_', '-')} {file!r} is not a file")
    if args.allowed_local_media_path is not None and not Path(args.allowed_local_media_path).is_dir():
        raise ValueError(f"--allowed-local-media-path {args.allowed_local_media_path!r} is not a folder")
    if args.ssl_certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                args.ssl_certfile, args.ssl_keyfile, password=lambda: b""
            )
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"--ssl-certfile and --ssl-keyfile cannot be used: {error}") from error
    if "" in args.api_key:
        raise ValueError("--api-key is empty")
    if args.root_path and not args.root_path.startswith("/"):
        raise ValueError(f"--root-path is {args.root_path!r}: it must begin with /")
    if args.otlp_traces_endpoint is not None:
        _check_endpoint(args.otlp_traces_endpoint)
    fetch_timeout()


def _check_endpoint(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its host or port is none
        is_fine = False
    if not is_fine:
        raise ValueError(f"--otlp-traces-endpoint is {url!r}: it must be a URL as http://localhost:4318/v1/traces")
