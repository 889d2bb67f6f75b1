"""The service's process: ``python -m serving``, told what it needs by the environment."""

import sys

import uvicorn

from serving import logs
from serving.app import create_app
from streamflow.errors import ConfigurationError
from streamflow.settings import Settings

DRAIN_S = 10


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way."""
    app = create_app(settings)
    logs.configure()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.api_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )


def main() -> int:
    """Serve with the environment's settings; 1 with the reason on stderr if they cannot be used."""
    try:
        serve(Settings.load())
    except ConfigurationError as refusal:
        print(refusal, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
