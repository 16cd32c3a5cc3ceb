"""A child process of ours that must be there: started, awaited until it is ready, started again when it dies."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import structlog

from sia_events.shared.environment import plain

log = structlog.get_logger()

RESTARTS_S = 0.2


class ChildFailed(Exception):
    """A child process ended before it was ready; the message is its last words."""


class Child:
    """Runs `argv` until closed. The program prints one JSON line when it is ready and ends when its stdin closes.

    The closing pipe is what makes sure that none is left behind when we are killed.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._argv = argv
        self._env = {**plain(), **(env or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> Mapping[str, Any]:
        """Start it and return its ready line. Raises ChildFailed."""
        ready = await self._spawn()
        self._keeper = asyncio.create_task(self._keep())
        return ready

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def close(self) -> None:
        if self._keeper:
            self._keeper.cancel()
        if self._process and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.close()
            try:
                async with asyncio.timeout(5):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _spawn(self) -> Mapping[str, Any]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=pipe, stdout=pipe, stderr=pipe, env=self._env, start_new_session=True
        )
        assert process.stdout and process.stderr
        self._process = process
        last_words = asyncio.create_task(_tail(process.stderr))
        line = await process.stdout.readline()
        if not line:
            await process.wait()
            words = await last_words
            raise ChildFailed(f"{self.name} did not start: {words.strip() or f'exit status {process.returncode}'}")
        self._drain = asyncio.create_task(_tail(process.stdout))
        self._last_words = last_words
        return msgspec.json.decode(line)

    async def _keep(self) -> None:
        while True:
            assert self._process
            code = await self._process.wait()
            log.warning("child ended, starting it again", child=self.name, exit_status=code)
            await asyncio.sleep(RESTARTS_S)
            try:
                await self._spawn()
            except ChildFailed as failed:
                log.error("child does not start", child=self.name, reason=str(failed))
                await asyncio.sleep(2)


async def _tail(stream: asyncio.StreamReader, keep: int = 4000) -> str:
    """Read to the end, so that the child never blocks on a full pipe; return the last of it."""
    kept = b""
    while chunk := await stream.read(65536):
        kept = (kept + chunk)[-keep:]
    return kept.decode(errors="replace")
