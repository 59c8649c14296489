"""Prefect's server, whose page may ask nobody but this server.

The page of Prefect 3.8 loads a third party's script on every visit and hands it what is done,
whatever `PREFECT_SERVER_ANALYTICS_ENABLED` says. Browsers are told here not to.
"""

import argparse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# The page has scripts and styles in its HTML, and builds workers and pictures of its own.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"
)


def alone(app: App) -> App:
    """The same with a content security policy on every answer."""

    async def wrapped(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", ()), own]
            await send(message)

        await app(scope, receive, sending)

    return wrapped


def main() -> None:
    """What `prefect server start` does, for one process, with the policy."""
    import uvicorn
    from prefect.server.api.server import create_app

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvicorn.run(
        alone(create_app(final=True)),
        host=given.host,
        port=given.port,
        log_level="warning",
        timeout_keep_alive=5,
    )


if __name__ == "__main__":
    main()
