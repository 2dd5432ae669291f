"""Whether a zip that torch wrote is still as it was written, to the last bit."""

from __future__ import annotations

import os
import struct
import zipfile
from typing import BinaryIO

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL_SIZE, _END_SIZE, _END64_SIZE, _LOCATOR_SIZE = 46, 22, 56, 20
_HAS_DESCRIPTOR = 0x08
_FULL = 0xFFFFFFFF
_TWO_SIZES = 20  # bytes of a field of 64-bit numbers that holds two
# torch fills the space before aligned data with a field of this name, full of this letter.
_PADDING, _FILL = b"FB", b"Z"


def find_damage(file: BinaryIO) -> str | None:
    """Look for damage in a zip that `torch.save` wrote.

    The checksums of a zip cover what its members hold. What stands around them is there twice, or the same
    for all members, or fixed, and is compared: so one bit that has changed is noticed wherever it is.

    Args:
        file: opened for reading bytes.
    Returns:
        what is wrong, or None.
    """
    try:
        return _damage(file)
    except zipfile.BadZipFile as error:
        return str(error).rstrip(".") or "it is no zip"
    except Exception as error:  # what a damaged header asks for can fail in any way
        return f"it cannot be read: {type(error).__name__}"


def _damage(file: BinaryIO) -> str | None:
    with zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        damaged = archive.testzip()
        if damaged is not None:
            return f"the checksum of {damaged} is another one"
        if len({_common(member) for member in members}) > 1 or archive.comment:
            return "its table of contents contradicts itself"
        place = 0
        for member in members:
            if member.header_offset != place:
                return "there is something between its parts"
            end = _end_of(file, member)
            if end is None:
                return f"what stands around {member.filename} contradicts the table of contents"
            place = end
        if archive.start_dir != place or not _end_is_sound(file, members, place):
            return "its table of contents contradicts itself"
    return None


def _common(member: zipfile.ZipInfo) -> tuple[object, ...]:
    """What torch writes the same for all members."""
    return (
        *(member.create_version, member.create_system, member.flag_bits, member.compress_type),
        *(member.date_time, member.internal_attr, member.external_attr, member.volume, member.comment),
        *(member.reserved, member.extract_version),
    )


def _is_large(member: zipfile.ZipInfo) -> bool:
    return max(member.file_size, member.compress_size, member.header_offset) >= _FULL


def _end_of(file: BinaryIO, member: zipfile.ZipInfo) -> int | None:
    """Where a member ends; None where what stands before and after its data is not what it should be."""
    file.seek(member.header_offset)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    signature, version, flags, method, time, date, crc, packed, size, name_length, extra_length = fields
    name, extra = file.read(name_length), file.read(extra_length)
    year, month, day, hour, minute, second = member.date_time
    then = (hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day)
    described = bool(flags & _HAS_DESCRIPTOR)
    known = (member.CRC, member.compress_size, member.file_size)
    large = _is_large(member)
    if large:
        # The 64-bit numbers of the table of contents; the second size was not known yet here.
        numbers = member.extra
        if len(numbers) == _TWO_SIZES and described:
            numbers = numbers[:-8] + bytes(8)
        if not extra.startswith(numbers):
            return None
        extra = extra[len(numbers) :]
    if (
        signature != b"PK\x03\x04"
        or (flags, method, time, date) != (member.flag_bits, member.compress_type, *then)
        or version != member.extract_version
        or name != member.orig_filename.encode()
        or not _is_padding(extra)
        or (crc, packed, size) != ((0, 0, 0) if described else known)
    ):
        return None
    end = file.tell() + member.compress_size
    if described:
        file.seek(end)
        descriptor = struct.pack("<4sIQQ" if large else "<4sIII", b"PK\x07\x08", *known)
        if file.read(len(descriptor)) != descriptor:
            return None
        end += len(descriptor)
    return end


def _is_padding(extra: bytes) -> bool:
    if not extra:
        return True
    name, length, fill = extra[:2], int.from_bytes(extra[2:4], "little"), extra[4:]
    return name == _PADDING and length == len(fill) and not fill.strip(_FILL)


def _end_is_sound(file: BinaryIO, members: list[zipfile.ZipInfo], start: int) -> bool:
    """Whether the file ends as a zip of these members, whose table of contents begins at `start`."""
    file.seek(start)
    length = 0
    for member in members:
        # zipfile takes what is left of the file where a length goes beyond it.
        lengths = (len(member.orig_filename.encode()), len(member.extra), len(member.comment))
        said = struct.unpack_from("<HHH", file.read(_CENTRAL_SIZE), 28)
        if said != lengths or (member.extra and not _is_large(member)):
            return False
        file.seek(sum(lengths), os.SEEK_CUR)
        length += _CENTRAL_SIZE + sum(lengths)
    count = len(members)
    rest = file.read(_END64_SIZE + _LOCATOR_SIZE + _END_SIZE + 1)
    short = (min(count, 0xFFFF), min(count, 0xFFFF), min(length, _FULL), min(start, _FULL), 0)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *short)
    if rest == end:
        return True
    # The versions of those who write and read it, which torch sets to these.
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1)
    return rest == end64 + locator + end
