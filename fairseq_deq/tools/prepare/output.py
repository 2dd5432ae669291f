"""The folder of a prepared text: whether it is up to date, and how it is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "prepared.json"
# Not every run writes these; one of an earlier run belongs to another text.
NOT_ALWAYS = ("sentencepiece.model", "test.txt", "plain/test.txt")


def is_up_to_date(out: Path, settings: dict[str, Any]) -> bool:
    """Say whether a folder already holds the result of these settings.

    Args:
        out: the output folder.
        settings: everything that the result depends on.

    Returns:
        True if every file is there, as an earlier run with the same settings left it.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest["settings"] == settings and all(
            hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
            for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_files(out: Path, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """Write the results so that a kill at any moment leaves no half-written file under its final name.

    Args:
        out: the output folder, made if it is not there.
        files: content by path relative to `out`.
        manifest: written last, with the digests of the files; without it the folder counts as not prepared.
    """
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    manifest = manifest | {"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    contents = files | {MANIFEST: text.encode("utf-8")}  # the manifest is the last to be moved
    for name, data in contents.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(data)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in NOT_ALWAYS:
        if name not in files:
            (out / name).unlink(missing_ok=True)
    for name in contents:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, out / name)
    shutil.rmtree(partial)
