"""qlora-plan serve: the planner as a page and as an HTTP API (docs/serve.md)."""

from __future__ import annotations

import sys
from contextlib import suppress

import click

from clusters.errors import not_installed, request_error
from launch import command

NAMES = ("localhost", "127.0.0.1", "[::1]")


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address that it listens on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8300, show_default=True, help="0: any that is free.")
@click.option(
    "--model", "models", metavar="DIR|HUB_ID", multiple=True, help="One more that may be asked for; may be repeated."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def serve(host: str, port: int, models: tuple[str, ...], debug: bool) -> int:
    """Open the planner as a page, with an HTTP API behind it (docs/serve.md)."""
    try:
        import uvicorn

        from launch.api.application import application
    except ImportError as error:
        raise not_installed("serve", "", [str(error.name)], extra="serve") from error
    from qlora_core.catalogue import find_model

    for model in models:
        find_model(model)  # a mistake is told now, and not to who asks
    inside = is_loopback(host)
    if not inside:
        command.warn(f"Everybody who reaches {host} may ask; nothing is encrypted, and nobody is asked for a password.")
    app = application(models, (*NAMES, host) if inside else ("*",))
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False))
    try:
        bound = server.config.bind_socket()
    except SystemExit:
        rule = "that address cannot be listened on, as where another program does already"
        raise request_error("--port", f"{host}:{port}", rule, "Choose another --port, or --host") from None
    bound.listen()  # who reads the address below may come before the server runs
    address = bound.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    click.echo(f"http://{shown}:{address[1]}/  (Ctrl-C ends it)")
    sys.stdout.flush()
    with suppress(KeyboardInterrupt):  # what ends it is no failure
        server.run(sockets=[bound])
    return 0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    import ipaddress  # every plan imports this module

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
