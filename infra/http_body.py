"""Reading the body of one HTTP request: length, chunks, compression, forms; whole or not at all."""

import zlib
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from io import BufferedIOBase
from typing import Any

LIMIT = 256 * 1024 * 1024


class BodyRefused(Exception):
    """The body cannot be read, or not to its end; nothing of it is used. `code` is ClickHouse's error code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_body(stream: BufferedIOBase, headers: Message) -> bytes:
    """The request's body, de-chunked and decompressed. Raises BodyRefused when it is cut, too long or unreadable."""
    if headers.get("Transfer-Encoding", "identity").lower() == "chunked":
        body = _chunks(stream)
    else:
        length = headers.get("Content-Length", "0")
        if not length.isdecimal():
            raise BodyRefused(36, f"Content-Length is {length!r}, not a number of bytes")
        body = _exactly(stream, int(length))
    encoding = headers.get("Content-Encoding", "identity").lower()
    return body if encoding == "identity" else _decompress(body, encoding)


def form_fields(content_type: str, body: bytes) -> dict[str, str]:
    """The text fields of a multipart form. Raises BodyRefused for a file: external tables are not offered."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    fields = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="Content-Disposition")
        if part.get_filename() is not None or not isinstance(name, str):
            raise BodyRefused(48, "external tables are not supported by the embedded store")
        payload = part.get_payload(decode=True)
        fields[name] = payload.decode() if isinstance(payload, bytes) else ""
    return fields


def _exactly(stream: BufferedIOBase, size: int) -> bytes:
    if size > LIMIT:
        raise BodyRefused(36, f"a body of {size} bytes is over the limit of {LIMIT}; send smaller batches")
    data = stream.read(size)
    if len(data) != size:
        raise BodyRefused(33, f"the body ended after {len(data)} of {size} bytes")
    return data


def _chunks(stream: BufferedIOBase) -> bytes:
    """Chunked transfer coding, RFC 9112 section 7.1; extensions and trailers are skipped."""
    body = bytearray()
    while True:
        line = stream.readline(1024)
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise BodyRefused(33, f"the body was cut between chunks after {len(body)} bytes") from None
        if size == 0:
            break
        body += _exactly(stream, size)
        if len(body) > LIMIT:
            raise BodyRefused(36, f"the body is over the limit of {LIMIT} bytes; send smaller batches")
        if stream.readline(3).strip():
            raise BodyRefused(33, "a chunk is longer than it says")
    while stream.readline(65536).strip():
        pass
    return bytes(body)


def _decompress(body: bytes, encoding: str) -> bytes:
    # The client compresses each block on its own, so a body is a row of frames: stopping after the first
    # would drop rows without a word, and a last frame without its end means a cut body.
    plain = bytearray()
    while body:
        frame = _decompressor(encoding)
        try:
            plain += frame.decompress(body)
        except Exception as error:  # each codec has its own exception types
            raise BodyRefused(354, f"the body is not {encoding}: {error}") from error
        if not frame.eof:
            raise BodyRefused(33, f"the {encoding} body is cut: its last frame has no end")
        if len(plain) > LIMIT:
            raise BodyRefused(36, f"the body is over the limit of {LIMIT} bytes; send smaller batches")
        body = frame.unused_data or b""
    return bytes(plain)


def _decompressor(encoding: str) -> Any:
    # Three codecs, one shape: decompress(data), eof, unused_data. Their declared types differ in trifles.
    match encoding:
        case "lz4":
            from lz4.frame import LZ4FrameDecompressor

            return LZ4FrameDecompressor()
        case "zstd":
            from backports.zstd import ZstdDecompressor

            return ZstdDecompressor()
        case "gzip" | "deflate":
            return zlib.decompressobj(wbits=47)  # 32 + 15: zlib or gzip header, whichever is there
    raise BodyRefused(354, f"Content-Encoding {encoding!r} is not supported; use lz4, zstd, gzip or deflate")
