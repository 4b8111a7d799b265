"""Feeds the decoders of the network what atheris makes up: `python fuzz_decoders.py [directory] [-runs=N]`.

Anything but RemoteProtocolError ends it, with the input that did it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
    from scaler_executor.protocol import link
    from scaler_executor.protocol.codec import Decoder, RemoteProtocolError
    from scaler_executor.protocol.messages import FromPeerMessage
    from scaler_executor.protocol.parcels import Inbox
    from scaler_executor.protocol.wire import decode_frame

DECODE = Decoder(FromPeerMessage).decode


def feed(data: bytes) -> None:
    """Take the input as the parts of several messages of the network, which come one behind the other."""
    provider = atheris.FuzzedDataProvider(data)
    inbox = Inbox(max_bytes=1 << 16)
    try:
        while provider.remaining_bytes():
            parts = [
                provider.ConsumeBytes(provider.ConsumeIntInRange(0, 64))
                for _ in range(provider.ConsumeIntInRange(1, 4))
            ]
            frame = decode_frame(parts)
            if isinstance(frame, link.Data) and (whole := inbox.put(frame.packet)) is not None:
                DECODE(*whole)
    except RemoteProtocolError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, feed)
    atheris.Fuzz()
