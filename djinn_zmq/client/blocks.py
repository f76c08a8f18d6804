"""What is closed where the block ends that it was entered for: `with`, in asyncio code `async with`."""

from types import TracebackType
from typing import Any, Self


class Block:
    connection: Any
    close: Any

    def __enter__(self) -> Self:
        self.connection.check_waits()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncBlock:
    close: Any

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
