"""The HTTP server: uvicorn in one process, or several worker processes behind one port, drained on SIGTERM."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from litestar import Litestar
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from serving import logs
from serving.app import create_app
from serving.metrics import empty_folder, workers_folder
from serving.protocol import Protocol
from streamflow.settings import Settings

DRAIN_S = 10
SILENCE_S = 15
"""How long a worker may be silent, as it is while it imports, before another replaces it."""


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration; it prepares the process it is made in, and each worker that is handed it."""

    def configure_logging(self) -> None:
        """Log as we do, and end with 0 when uvicorn, having drained, repeats the signal that it was stopped by."""
        super().configure_logging()
        logs.configure()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


class Workers(Multiprocess):
    """uvicorn's worker processes."""

    def terminate_all(self) -> None:
        """Let the port go too, or callers would be connected, and wait for nobody, while the workers drain."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, then finish the requests under way; returns the exit code.

    Several workers are told their settings by the environment, which must be where these are from. Raises
    ConfigurationError.
    """
    app = create_app(settings.model_copy(update={"workers": 1}))
    if folder := workers_folder(settings):
        return _serve_by_workers(settings, folder)
    server = uvicorn.Server(_config(app, settings))
    server.run()
    return 0 if server.started else 1


def _config(app: Litestar | str, settings: Settings, **options: Any) -> ServerConfig:
    return ServerConfig(
        app,
        host=settings.host,
        port=settings.api_port,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_S,
        **options,
    )


def _serve_by_workers(settings: Settings, folder: Path) -> int:
    config = _config(
        "serving.server:worker_app",
        settings,
        factory=True,
        workers=settings.workers,
        timeout_worker_healthcheck=SILENCE_S,
    )
    sockets = [config.bind_socket()]
    empty_folder(folder)
    workers = Workers(config, sockets)
    workers.run()
    return 1 if any(process.exitcode == STARTUP_FAILURE for process in workers.processes) else 0


def worker_app() -> Litestar:
    """The service in one of several worker processes."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    return create_app(Settings.load())


def _stop_with_parent() -> None:
    """Drain when the parent is killed: nobody else would tell the worker, and it would keep the port."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
