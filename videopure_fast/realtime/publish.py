"""A process that sends an encoded stream to a server of RTSP: `python -m videopure_fast.realtime.publish`.

PyAV holds Python's lock while FFmpeg connects to a server and takes leave of it, for as long as the server likes; in a
process of its own that stops nobody. The address comes as the first line of standard input, not as an argument, which
other users could read; MPEG-TS follows. At the end the number of frames that were sent is said on standard error, and
after a blank what went wrong, without the address.
"""

from __future__ import annotations

import os
import signal
import sys

import av


def main(timeout: float) -> int:
    """Send standard input until it ends; seconds without a sign of the server are a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends the input
    options = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtp,tcp", "timeout": str(int(timeout * 1e6))}
    sent, reason = 0, ""
    with os.fdopen(0, "rb", buffering=0) as file:  # a buffer would wait until it is full
        address = file.readline().decode().strip()
        try:
            with (
                av.open(file, format="mpegts", options={"fpsprobesize": "0"}) as source,
                av.open(address, "w", format="rtsp", options=options) as target,
            ):
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:  # the last one is empty
                        packet.stream = stream
                        target.mux(packet)
                        sent += 1
        except (av.FFmpegError, OSError) as error:
            reason = error.strerror or type(error).__name__
    print(sent, reason, file=sys.stderr)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
