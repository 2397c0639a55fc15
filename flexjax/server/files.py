"""/v1/files: training rows that clients upload, checked line by line, and results of jobs to download."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from flexjax.config import nearest
from flexjax.finetuning.dataset import DatasetError, read_dataset
from flexjax.server.errors import ApiError
from flexjax.server.job_book import RESULT_PURPOSE
from flexjax.server.owner import owner_of
from flexjax.server.paging import page_of, query_of
from flexjax.server.prompts import BodyError, shortened
from flexjax.server.service import Service, own_row, service_of
from flexjax.server.store import new_id
from flexjax.server.uploads import file_too_long, read_upload

PURPOSE = "fine-tune"
UPLOAD_FIELDS = ("file", "purpose")
PAGE = ("after", "limit", "order", "purpose")
LISTED = 10_000
LONGEST_NAME = 255


def file_object(row: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI has it."""
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


def require_file(request: Request) -> dict[str, Any]:
    """The owner's file that the path names. Raises ApiError (404)."""
    identifier, row = own_row(request, "files")
    if row is None:
        raise ApiError(404, f"No such File object: {shortened(identifier)}", "id", "file_not_found")
    return row


def check_fields(fields: dict[str, str], filename: str | None) -> str:
    """The file's name, without a path. Raises BodyError."""
    for name in fields:
        if name not in UPLOAD_FIELDS:
            raise BodyError(f"unknown or unsupported field {name!r}{nearest(name, UPLOAD_FIELDS)}", name)
    if fields.get("purpose") != PURPOSE:
        raise BodyError(f"purpose is {shortened(fields.get('purpose'))}; it must be {PURPOSE!r}", "purpose")
    name = (filename or "").replace("\\", "/").rsplit("/", 1)[-1] or "upload.jsonl"
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise BodyError(f"filename must be printable and of at most {LONGEST_NAME} characters", "file")
    return name


def keep_upload(service: Service, owner: str, upload: UploadFile, fields: dict[str, str]) -> dict[str, Any]:
    """On a worker's thread: check the rows and keep the file. Raises ApiError, BodyError."""
    name = check_fields(fields, upload.filename)
    limit = service.config.max_file_bytes
    if (upload.size or 0) > limit:
        raise file_too_long(limit)
    service.limits.require_file_room(owner, upload.size or 0)
    identifier, counted = new_id("file"), []

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            shutil.copyfileobj(upload.file, file)
        counted.append(count_rows(service, path, name))

    service.folder.write_file(identifier, write)
    row = {"id": identifier, "created": int(time.time()), "filename": name, "purpose": PURPOSE}
    row |= {"owner": owner, "bytes": os.path.getsize(service.folder.file(identifier)), "rows": counted[0]}
    try:
        with service.limits.another_file(owner, row["bytes"]), service.store.writing():
            service.store.add("files", **row)
    except BaseException:
        service.folder.file(identifier).unlink()  # nobody knows its name
        raise
    return file_object(row)


def count_rows(service: Service, path: Path, name: str) -> int:
    """Rows of a file that a job could train on; the engine reads them alike. Raises BodyError, with line numbers."""
    engine = service.engine
    try:
        limits = {"vocab_size": engine.model.vocab_size, "max_length": engine.config.max_model_len}
        return len(read_dataset(path, engine.tokenizer, train_on="assistant", **limits).examples)
    except DatasetError as error:
        raise BodyError(str(error).replace(str(path), name), "file") from error


async def upload_file(request: Request) -> Response:
    service = service_of(request)
    service.admission.require_open()
    service.rates.take_request(owner_of(request))
    async with read_upload(request, service.config.max_file_bytes) as (upload, fields):
        return JSONResponse(await run_in_threadpool(keep_upload, service, owner_of(request), upload, fields))


def list_files(request: Request) -> Response:
    query = query_of(request, PAGE)
    where = {"owner": owner_of(request)} | ({"purpose": query["purpose"]} if "purpose" in query else {})
    return JSONResponse(page_of(service_of(request).store, "files", where, query, file_object, LISTED))


def retrieve_file(request: Request) -> Response:
    return JSONResponse(file_object(require_file(request)))


def file_content(request: Request) -> Response:
    service, row = service_of(request), require_file(request)
    if not service.folder.file(row["id"]).exists():
        raise ApiError(404, f"The content of {row['id']} is lost; upload the file again.", "id", "file_lost")
    kind = "text/csv" if row["purpose"] == RESULT_PURPOSE else "application/jsonl"
    return FileResponse(service.folder.file(row["id"]), media_type=kind, filename=row["filename"])


def delete_file(request: Request) -> Response:
    """A job that has read the file goes on; one that is to resume after a restart needs it."""
    service, identifier = service_of(request), require_file(request)["id"]
    with service.store.writing():
        service.store.remove("files", identifier)
    service.folder.file(identifier).unlink(missing_ok=True)
    return JSONResponse({"id": identifier, "object": "file", "deleted": True})


ROUTES = (
    Route("/v1/files", upload_file, methods=["POST"]),
    Route("/v1/files", list_files),
    Route("/v1/files/{id}", retrieve_file),
    Route("/v1/files/{id}", delete_file, methods=["DELETE"]),
    Route("/v1/files/{id}/content", file_content),
)
"""Where a route is no coroutine, Starlette runs it on a worker's thread: the database may wait for the disk."""
