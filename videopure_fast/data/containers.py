"""What the first bytes, or the blocks, of a video file say without FFmpeg."""

from __future__ import annotations

import os
from pathlib import Path

_REMUX, _ENCODE = "-c copy {}.mkv", "-crf 10 {}.mp4"  # Matroska holds nearly all codecs, but no frames without times

# Containers that are not read: their name, how a file begins, and what makes ffmpeg write one that is read.
_FOREIGN = [
    ("Flash video (flv)", b"FLV\x01", _REMUX),
    ("Ogg", b"OggS", _REMUX),
    ("Windows Media (asf, wmv)", bytes.fromhex("3026b2758e66cf11"), _REMUX),
    ("an MPEG program stream (mpg, vob)", bytes.fromhex("000001ba"), _REMUX),
    ("an MPEG video stream", bytes.fromhex("000001b3"), _REMUX),
    ("RealMedia", b".RMF", _REMUX),
    ("MXF", bytes.fromhex("060e2b34020501010d010201"), _REMUX),
    ("IVF", b"DKIF", _REMUX),
    ("NUT", b"nut/multimedia container\0", _REMUX),
    ("a stream of H.264 or HEVC without a container", bytes.fromhex("00000001"), _ENCODE),
    ("YUV4MPEG2 (y4m)", b"YUV4MPEG2 ", _ENCODE),
    ("a PNG", b"\x89PNG\r\n\x1a\n", _ENCODE),
]


def foreign_container(path: Path) -> tuple[str, str] | None:
    """Name of the container of a file, and the command that makes a file of it that is read, if it is a known one that
    is not; None for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return None
    for name, magic, options in _FOREIGN:
        if head.startswith(magic):
            return name, f"ffmpeg -i {path.name} {options.format(path.stem)}"
    return None


def avi_share(path: Path) -> float:
    """The share of an AVI file that is there, by the size in its header; 1 where that states none."""
    with path.open("rb") as file:
        stated = int.from_bytes(file.read(8)[4:], "little")
    # Files of more than 1 GiB have parts, of which this is the first. Writers that were killed state nothing.
    return 1.0 if stated in (0, 2**32 - 1) else min(1.0, path.stat().st_size / (8 + stated))


def gif_reaches_trailer(path: Path) -> bool:
    """Whether the blocks of a GIF file end with its trailer. (FFmpeg takes any unknown byte for the file's end.)"""
    with path.open("rb") as file:

        def skip_colors(flags: int) -> None:
            file.seek(3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0, os.SEEK_CUR)

        def skip_data() -> None:
            while length := file.read(1):
                if length == b"\0":
                    return
                file.seek(length[0], os.SEEK_CUR)

        header = file.read(13)
        if len(header) < 13:
            return False
        skip_colors(header[10])
        while block := file.read(1):
            if block == b"\x21":  # extension: a label, then data
                file.seek(1, os.SEEK_CUR)
            elif block == b"\x2c":  # picture: 8 bytes of place and size, flags, a color table, the code size, then data
                place = file.read(9)
                if len(place) < 9:
                    return False
                skip_colors(place[8])
                file.seek(1, os.SEEK_CUR)
            else:
                return block == b";"
            skip_data()
    return False
