"""The service's process: ``python -m serving``, told what it needs by the environment."""

import sys

from serving.server import serve
from streamflow.errors import ConfigurationError
from streamflow.settings import Settings


def main() -> int:
    """Serve with the environment's settings; 1 with the reason on stderr if they cannot be used."""
    try:
        return serve(Settings.load())
    except ConfigurationError as refusal:
        print(refusal, file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
