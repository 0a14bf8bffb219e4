"""Live cameras: a thread reads each, and whenever `hop` new frames have come, the newest `window` frames are a clip.

Sources are hostile: FFmpeg opens nothing but what is named, every wait ends, and what is held is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..data.annotations import read_lines
from ..data.picture import orientation, upright
from ..data.video import open_video, working_size
from ..inputs import check_number
from .ring import Ring

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video import VideoStream

TIMEOUT = 5.0  # seconds without data, or without a picture, after which a camera is opened anew
MAX_PIXELS = 4096 * 4096  # in a frame as the camera sends it
MAX_WORKING_PIXELS = 1024 * 1024  # in a frame as it is purified
MAX_HELD_PIXELS = 2**26  # in the frames that are held of one camera: 192 MiB
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a camera is opened anew; they double while nothing comes
_LONGEST_STEP = 10.0  # seconds between two frames of a file; a longer step of its time stamps is not waited for
_SILENCE = 3  # timeouts after which a thread that does nothing is said to be held; opening may take two
_CAMERA_DEVICE = 81  # Linux's major number of video devices
_POLL = 0.005  # seconds between two looks at a device that has no frame yet
_USUAL_RATE = 25.0  # frames a second of a file that does not say

# Scheme of an address: the protocols that FFmpeg may then use, and the containers that it may find there. Playlists are
# in none: they name other addresses. A camera that answers by another address is not followed where that can be told.
_ADDRESSES: dict[str, tuple[str, str, dict[str, str]]] = {
    "rtsp": ("rtsp,rtp,tcp", "rtsp", {"rtsp_transport": "tcp"}),
    "rtsps": ("rtsps,rtsp,rtp,tls,tcp", "rtsp", {"rtsp_transport": "tcp"}),
    "http": ("http,tcp", "mpegts,mpjpeg,matroska", {"max_redirects": "0"}),
    "https": ("https,tls,tcp", "mpegts,mpjpeg,matroska", {"max_redirects": "0"}),
    "tcp": ("tcp", "mpegts", {}),
    "udp": ("udp", "mpegts", {}),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[^\[\]]+)?\]|[^\[\]:]*)(?::([0-9]{1,5}))?")  # a host, and perhaps a port
_LOGIN = re.compile(r"(?=.*:.*@)([A-Za-z][A-Za-z0-9+.-]+:?/+)?")  # what may be an address that is not written right
# Parameters of an address whose values are shown. Any other may be a password, whatever its name.
_SHOWN = {"camera", "channel", "codec", "fps", "height", "profile", "resolution", "stream", "subtype", "width"}

# What a decoder finds damaged is lost, not concealed: a clip has no pictures that nobody filmed.
_DECODE_OPTIONS = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}

State = Literal["opening", "live", "waiting", "ended", "failed"]


def source_name(source: str) -> str:
    """A source as it may be shown: without user and password, without values of parameters but for harmless ones, and
    without characters that would move a terminal's cursor. A secret that is part of a path is shown."""
    if match := _SCHEME.match(source) or _LOGIN.match(source):
        rest = source[match.end() :]
        _, at, rest = rest.rpartition("@")  # the last: a password may have any character
        place, mark, query = rest.partition("?")
        place, fragment, _ = place.partition("#")
        shown = []
        for field in re.split("[&;]", query):
            key, equals, value = field.partition("=")
            harmless = key.lower() in _SHOWN and re.fullmatch(r"\w{1,8}", value)
            shown.append(field if harmless else f"{key}=***" if equals else "***")
        source = (
            match[0] + "***@" * bool(at) + place + (mark + "&".join(shown) if mark else "") + "#***" * bool(fragment)
        )
    return "".join(character if character.isprintable() else "?" for character in source)


def masked(message: str, source: str) -> str:
    """A message about a source in one line, with the source as it may be shown."""
    for written in (source, str(Path(source))):
        message = message.replace(written, source_name(source)) if written else message
    return " ".join(message.split())


def is_address(source: str) -> bool:
    """Whether a source, or an output, is an address and no path."""
    return _SCHEME.match(source) is not None


def listed_sources(sources: Sequence[str]) -> list[str]:
    """These sources, where @FILE stands for those of a file, a line each; empty lines and those that begin with # are
    left out. So an address with a password need not be on a command line, which other users of the machine may read."""
    found: list[str] = []
    for source in sources:
        if not source.startswith("@"):
            found.append(source)
            continue
        lines = [line for line in read_lines(Path(source[1:])) if not line.startswith("#")]
        if not lines:
            raise ValueError(f"{source[1:]} lists no source; accepted: a source a line")
        found += lines
    return found


def check_address(address: str) -> None:
    """ValueError for characters, a host or a port that no address has."""
    name, (scheme, _, rest) = source_name(address), address.partition("://")
    if any(character.isspace() or not character.isprintable() for character in address):
        raise ValueError(f"the address {name} has characters that no address has")
    found = _PLACE.fullmatch(re.split("[/?#]", rest)[0].rpartition("@")[2])
    host, port = (None, None) if found is None else found.groups()
    plain = scheme.lower() in ("tcp", "udp")  # these have no usual port; without a host, this machine is meant
    if host is None or not (host or plain) or not (0 < int(port) < 2**16 if port else not plain):
        accepted = f"{scheme}://{'HOST:PORT' if plain else 'HOST or HOST:PORT'}, an IPv6 host in brackets"
        if "@" in rest:
            accepted += ", and / ? # in a password as %2F %3F %23"
        raise ValueError(f"the address {name} has no host and port that can be; accepted: {accepted}")


def check_source(source: str) -> bool:
    """Whether the source of a camera is a file; ValueError for what is none that can be read, no address, no device."""
    if not source.strip():
        raise ValueError("a source is empty; accepted: a file, an address, or a device")
    name = source_name(source)
    if scheme := _SCHEME.match(source):
        if scheme[1].lower() not in _ADDRESSES:
            raise ValueError(f"{name} cannot be watched: accepted are files, /dev/video0, and {', '.join(_ADDRESSES)}")
        check_address(source)
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: Windows has no such numbers
        found = Path(source).stat()
        if stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) == _CAMERA_DEVICE:
            return False
    try:
        with open_video(Path(source)):
            return True
    except (OSError, ValueError) as error:
        raise type(error)(masked(str(error), source)) from None


class CameraStatus(NamedTuple):
    """What a camera has done so far.

    frames: came. dropped: of these, those that were in no clip, because newer ones came before a clip was taken or
    because their segment ended before there were enough. damaged: packets or frames that could not be decoded, which
    are not among `frames`. losses: how often it went away. reason: why it is not live.
    """

    state: State
    frames: int
    dropped: int
    damaged: int
    losses: int
    reason: str | None


class Camera:
    """A source that a thread reads while this context manager's block runs; its clips are in `ring`.

    Args:
        source: a video file, which comes at the pace of its own time stamps and ends; an address (rtsp, rtsps, http,
            https, tcp, udp: MPEG-TS, and by http also Matroska and motion JPEG); or a USB camera of Linux, such as
            /dev/video0. Cameras never end: one that goes away or stalls is opened again and again, at intervals that
            grow to half a minute.
        window, hop, lossless: as for `Ring`. Only a file can be lossless: a camera does not wait.
        size: short side of the frames in pixels; even, 16 or more.
        timeout: seconds without data, or with data and no picture, after which a camera counts as gone; opening one may
            take twice as long.
        clock: seconds of the time at which frames come.
        notify: called from the thread with each new state and the reason, if there is one.

    A camera by rtsp may send FFmpeg on to another rtsp address; no other source leads to a second one. Certificates of
    https and rtsps are not checked.

    Only intact frames come; damaged ones are counted. A picture of a size that is not accepted is a fault of the
    camera, as is garbage: it is opened anew.

    Raises ValueError for bad values, a source that is none of the above, and a file that cannot be read.
    """

    def __init__(
        self,
        source: str,
        *,
        window: int,
        hop: int,
        size: int,
        lossless: bool = False,
        timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[[State, str | None], None] = lambda state, reason: None,
    ) -> None:
        self.name = source_name(source)
        self._source = source
        self.is_file = check_source(source)
        working_size(size, size, size)
        check_number("timeout", timeout, zero=False)
        self.ring = Ring(window, hop, lossless=lossless and self.is_file)
        self._window, self._size, self._timeout, self._clock, self._notify = window, size, timeout, clock, notify
        self._stop = threading.Event()
        self._state: State = "opening"
        self._sign = clock()  # when the thread last did anything
        self._reason: str | None = None
        self._damaged = self._losses = 0
        self._seen: tuple[object, ...] | None = None  # what distinguishes the pictures of this segment
        self._thread = threading.Thread(target=self._run, name=f"camera {self.name}", daemon=True)

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """End the thread. One that FFmpeg holds longer than its timeouts, as in a look-up of a name, is left behind."""
        self.stop()
        self._thread.join(2 * self._timeout + 1)

    def stop(self) -> None:
        """No more frames come; clips that are ready can still be taken."""
        self._stop.set()
        self.ring.close()

    @property
    def stopped(self) -> bool:
        """Whether it was stopped from outside."""
        return self._stop.is_set()

    @property
    def status(self) -> CameraStatus:
        """What it has done, from any thread. A reader that the system does not give back is noticed here."""
        ring, state, reason, silent = self.ring, self._state, self._reason, self._clock() - self._sign
        if state in ("opening", "live") and silent > _SILENCE * self._timeout and not ring.waiting:
            state, reason = "waiting", f"its reader has been held for {silent:.0f} s"
        return CameraStatus(state, ring.frames, ring.dropped, self._damaged, self._losses, reason)

    def _enter(self, state: State, reason: str | None = None) -> None:
        self._state, self._reason, self._sign = state, reason, self._clock()
        self._notify(state, reason)

    def _run(self) -> None:
        try:
            wait = _FIRST_WAIT
            while not self._stop.is_set():
                frames = self.ring.frames
                self._enter("opening")
                reason = self._read()
                self.ring.end(short=self.is_file)
                if self.is_file or self._stop.is_set():
                    self._enter("failed" if self.is_file and reason else "ended", reason)
                    return
                self._losses += 1
                self._enter("waiting", reason)
                wait = _FIRST_WAIT if self.ring.frames > frames else wait
                self._stop.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        except Exception as error:  # what nobody foresaw ends this camera, in the open, and no other
            self._enter("failed", f"{type(error).__name__}: {masked(str(error), self._source)}")
        finally:
            self.ring.close()

    def _read(self) -> str | None:
        """Open the source and push its frames until it ends or fails; why, if it did not simply end."""
        import av

        try:
            opened = open_video(Path(self._source)) if self.is_file else _open_camera(self._source, self._timeout)
            with opened as (container, stream):
                self._seen = None
                return self._follow(container, stream)
        except av.ExitError:
            return f"no data for {self._timeout:g} s"
        except av.FFmpegError as error:
            return error.strerror  # without the address, which has the password
        except (OSError, ValueError) as error:
            return masked(str(error), self._source)

    def _follow(self, container: InputContainer, stream: VideoStream) -> str | None:
        """Push the frames of an open source, at their pace, until it ends or should be opened anew; why."""
        stream.thread_type = "SLICE"  # threads that decode a frame each would hold as many frames back
        stream.codec_context.options = dict(_DECODE_OPTIONS)
        pace = _Pace(self._clock, float(stream.average_rate or 0)) if self.is_file else None
        latest = self._clock()
        for frame in self._intact(_packets(container), stream):
            self._sign = self._clock()
            if frame is not None:
                due = self._clock() if pace is None else pace.due(frame.time)
                self._sign = max(self._sign, due)
                if self._stop.wait(max(0.0, due - self._clock())):
                    return None
                self._push(frame)
                latest = self._clock()
            elif self._stop.is_set():
                return None
            elif self._clock() - latest > self._timeout:
                return f"no picture for {self._timeout:g} s"
        if self._seen is None:
            return "it has no frame that can be decoded"
        return None if self.is_file else "it ended"

    def _intact(self, packets: Iterable[Packet | None], stream: VideoStream) -> Iterator[VideoFrame | None]:
        """The intact frames of a stream, and None after each packet. After damage they begin with a key frame: those
        before it are predicted from what was damaged. Damage that neither the container nor the decoder sees stays."""
        import av

        intact, before = True, False
        for packet in packets:
            if packet is not None and packet.stream.index == stream.index:
                # Where a parser splits the stream, FFmpeg marks the picture before the one that lost data.
                corrupt, before = packet.is_corrupt or before, packet.is_corrupt
                intact = intact and not corrupt
                try:
                    for frame in packet.decode():
                        intact = not (frame.is_corrupt or corrupt) and (intact or frame.key_frame)
                        if intact:
                            yield frame
                        else:
                            self._damaged += 1
                except av.FFmpegError:
                    intact = False
                    self._damaged += 1
            yield None

    def _push(self, frame: VideoFrame) -> None:
        kind = (frame.width, frame.height, frame.rotation)
        if kind != self._seen:
            self.ring.end()
            self._turn = orientation(frame, Path(self.name))
            sides = (frame.width, frame.height) if self._turn[0] == 0 else (frame.height, frame.width)
            self._shape = _checked_size(sides, self._size, self._window)
            self._seen = kind
            self._enter("live")
        self.ring.push(upright(frame, self._turn, self._shape), self._clock())


class _Pace:
    """When the frames of a file are due, such that it comes as a camera would."""

    def __init__(self, clock: Callable[[], float], rate: float) -> None:
        self._clock, self._step = clock, 1 / rate if 1 <= rate <= 1000 else 1 / _USUAL_RATE
        self._stamp: float | None = None
        self._due: float | None = None

    def due(self, stamp: float | None) -> float:
        """The clock's time at which the next frame is due, by its time stamp in seconds, if it has one."""
        if self._due is None:
            self._due = self._clock()
        else:
            step = self._step if stamp is None or self._stamp is None else stamp - self._stamp
            self._due += step if 0 <= step <= _LONGEST_STEP else self._step
        self._stamp = stamp
        return self._due


def _checked_size(sides: tuple[int, int], size: int, window: int) -> tuple[int, int]:
    """The working size of a picture of (height, width); ValueError where it, or a window of it, is too much to hold."""
    height, width = sides
    if height * width > MAX_PIXELS:
        raise ValueError(f"it sends frames of {width}x{height}; accepted: {MAX_PIXELS} pixels a frame at most")
    shape = working_size(height, width, size)
    pixels = shape[0] * shape[1]
    if pixels > MAX_WORKING_PIXELS or pixels * window > MAX_HELD_PIXELS:
        raise ValueError(
            f"its frames of {width}x{height} become {shape[1]}x{shape[0]}, {window} a clip; accepted: "
            f"{MAX_WORKING_PIXELS} pixels a frame and {MAX_HELD_PIXELS} a clip at most"
        )
    return shape


@contextlib.contextmanager
def _open_camera(source: str, timeout: float) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open an address or a device."""
    import av

    options: dict[str, str]
    if scheme := _SCHEME.match(source):
        protocols, formats, options = _ADDRESSES[scheme[1].lower()]
        options = {**options, "protocol_whitelist": protocols, "format_whitelist": formats}
        options["fpsprobesize"] = "0"  # the rate that a camera states is not asked for
        known: Any = formats if "," not in formats else None
    else:
        options, known = {"fflags": "nonblock"}, "v4l2"  # a device that stalls would hold the thread forever
    with av.open(
        source, format=known, options=options, timeout=(timeout, timeout), metadata_errors="replace"
    ) as opened:
        streams = [stream for stream in opened.streams.video if stream.codec_context is not None]
        if not streams:
            raise ValueError("it sends no video that can be decoded")
        yield opened, max(streams, key=lambda one: one.codec_context.width * one.codec_context.height)


def _packets(container: InputContainer) -> Iterator[Packet | None]:
    """The packets of all streams, and None whenever a device has none yet."""
    import av

    for _ in itertools.count():
        try:
            yield from container.demux()
            return
        except av.BlockingIOError:
            yield None
            time.sleep(_POLL)
