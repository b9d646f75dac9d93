"""What a request's path says before it is routed."""

from starlette.types import Scope


def is_below(scope: Scope, *roots: str) -> bool:
    """Whether an HTTP request goes to one of these paths or to anything under them.

    What is routed is the path below the root path, whether the proxy took that off or not: both are looked at.
    """
    paths = (scope["path"], scope["path"].removeprefix(scope.get("root_path", "")))
    return any(path == root or path.startswith(f"{root}/") for path in paths for root in roots)
