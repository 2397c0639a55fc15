"""read_upload: the one file and the fields of a multipart body, read up to a limit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from flexjax.server.errors import ApiError
from flexjax.server.prompts import BodyError

UPLOAD_SECONDS = 3600
"""In which a file must have come."""

FRAME_BYTES = 64 * 2**10
"""Room for what a multipart body has around its file."""

FIELD_BYTES = 4096
MAX_FIELDS = 16


@asynccontextmanager
async def read_upload(request: Request, limit: int) -> AsyncIterator[tuple[UploadFile, dict[str, str]]]:
    """The file of the field "file" and the other fields. Large files lie in a temporary file until the end of this.

    Raises:
        ApiError: 413 if the file is longer than ``limit`` bytes, 415 if the body is no form, 408 if it does not come.
        BodyError: the form is torn, or has no file.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, f"The content type is {kind or 'absent'!r}; it must be multipart/form-data.")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit + FRAME_BYTES:
        raise file_too_long(limit)
    parser = MultiPartParser(
        request.headers,
        limited(request, limit),
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=FIELD_BYTES,
    )
    try:
        yield upload_of(await parsed(parser))
    finally:
        for file in parser._files_to_close_on_error:  # a torn form's file is in no other list
            file.close()


async def parsed(parser: MultiPartParser) -> FormData:
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            return await parser.parse()
    except TimeoutError as error:
        message = f"The file did not come within {UPLOAD_SECONDS} seconds."
        raise ApiError(408, message, code="body_too_slow", headers={"Connection": "close"}) from error
    except MultiPartException as error:
        raise BodyError(f"the body is no form that can be read: {error.message}") from error
    except KeyError as error:  # what the parser says of a content type without a boundary
        raise BodyError(f"the content type has no {error.args[0]}") from error


async def limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > limit + FRAME_BYTES:
            raise file_too_long(limit)
        yield piece


def file_too_long(limit: int) -> ApiError:
    """The rest of the body is not read, so the connection cannot be used again."""
    message = f"The file is longer than {limit} bytes, the server's max_file_bytes."
    return ApiError(413, message, "file", "file_too_long", headers={"Connection": "close"})


def upload_of(form: FormData) -> tuple[UploadFile, dict[str, str]]:
    parts = dict(form.multi_items())
    file = parts.pop("file", None)
    if not isinstance(file, UploadFile):
        raise BodyError("the form has no file; it needs the fields file and purpose", "file")
    return file, {name: value for name, value in parts.items() if isinstance(value, str)}
