"""A file comes in as pieces or lines, and goes out as blocks of whole lines: no more than a block is in memory."""

import hashlib
from collections.abc import Awaitable, Callable

from folkmoot.gateway.batch_lines import KEPT_OF_LONG_LINE
from folkmoot.gateway.batch_store import BatchSettings
from folkmoot.gateway.pb import batch_input_pb2
from folkmoot.gateway.pb import batches_pb2 as pb
from folkmoot.gateway.validate import InvalidRequest

BLOCK_BYTES = 128 << 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

PutBlock = Callable[[int, batch_input_pb2.InputBlock], Awaitable[None]]


class Upload:
    """Is fed the messages of one Create call. `put(number, block)` stores a block."""

    def __init__(self, settings: BatchSettings, put: PutBlock) -> None:
        self._settings, self._put = settings, put
        self._digest = hashlib.blake2b(digest_size=16)
        self._rest = bytearray()  # of a line whose end has not come; its beginning, where it is too long
        self._rest_bytes = 0
        self._block = batch_input_pb2.InputBlock()
        self._block_bytes = 0
        self._blocks = 0
        self._number = 0
        self.bytes = 0
        self.lines = 0

    async def feed(self, message: pb.CreateBatchRequest) -> None:
        """Raises InvalidRequest where the file is too large."""
        if message.WhichOneof("part") == "data":
            await self._data(message.data)
        else:
            for line in message.lines.lines:
                await self._data(line.replace(b"\n", b" ") + b"\n")

    async def finish(self, header: pb.BatchHeader) -> bytes:
        """The last line may have no end. Answers the digest of header and file, which is the batch's identity."""
        if self._rest_bytes:
            await self._line()
        await self._put_block()
        self._digest.update(b"\0")
        self._digest.update(header.SerializeToString(deterministic=True))
        return self._digest.digest()

    async def _data(self, data: bytes) -> None:
        self.bytes += len(data)
        self._limit("max_batch_bytes", self.bytes, self._settings.max_batch_bytes)
        self._digest.update(data)
        at = 0
        while (end := data.find(b"\n", at)) >= 0:
            self._more(data[at:end])
            await self._line()
            at = end + 1
        self._more(data[at:])

    def _more(self, part: bytes) -> None:
        self._rest_bytes += len(part)
        self._rest += part
        if self._rest_bytes > self._settings.max_line_bytes:
            del self._rest[KEPT_OF_LONG_LINE:]

    async def _line(self) -> None:
        """A whole line has come."""
        text, size = bytes(self._rest), self._rest_bytes
        self._rest, self._rest_bytes = bytearray(), 0
        self._number += 1
        if self._number == 1:
            text = text.removeprefix(BYTE_ORDER_MARK)
        if not (text := text.strip()):
            return
        self.lines += 1
        self._limit("max_batch_lines", self.lines, self._settings.max_batch_lines)
        too_long = size if size > self._settings.max_line_bytes else 0
        self._block.lines.add(text=text, number=self._number, too_long=too_long)
        self._block_bytes += len(text)
        if self._block_bytes >= BLOCK_BYTES:
            await self._put_block()

    async def _put_block(self) -> None:
        if not self._block.lines:
            return
        self._block.first = self.lines - len(self._block.lines)
        await self._put(self._blocks, self._block)
        self._blocks += 1
        self._block, self._block_bytes = batch_input_pb2.InputBlock(), 0

    @staticmethod
    def _limit(name: str, value: int, limit: int) -> None:
        if value > limit:
            raise InvalidRequest([("file", f"is over the limit {name} = {limit}")])
