"""Send one message of 1 GiB to a host and back, and print what memory that took on either side.

Not part of the suite, as it needs some 8 GiB: ``python -m tests.wire.big [MiB]``.
"""

import resource
import sys
import time

from flsplit.wire import Envelope, HostStream, MessageArrived, SessionServer

from .peers import data_of, make_tensor_message, processes

MIB = 2**20


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def serve(pipe, address, token, certificate_pem, max_bytes):
    with HostStream.dial(
        address, token, certificate_pem, {}, max_message_bytes=max_bytes
    ) as stream:
        pipe.send(peak_mib())
        for envelope, message in stream:
            stream.send(envelope, message)
            pipe.send(peak_mib())
            del message


def main(mib=1024):
    max_bytes = (mib + 1) * MIB
    with SessionServer(max_message_bytes=max_bytes) as server:
        here, there = processes.Pipe()
        arguments = (there, server.address, server.invite("a"), server.certificate_pem, max_bytes)
        process = processes.Process(target=serve, args=arguments, daemon=True)
        process.start()
        server.receive(30)
        message = make_tensor_message(bytes(mib * MIB))
        before, host_before = peak_mib(), here.recv()
        began = time.monotonic()
        server.send("a", Envelope("a", 0, 0), message)
        event = server.receive(300)
        seconds = time.monotonic() - began
        assert isinstance(event, MessageArrived), event
        assert data_of(event.message) == data_of(message)
        host = here.recv() - host_before
        print(f"{mib} MiB there and back in {seconds:.1f} s")
        print(f"more memory at the peak: server {peak_mib() - before} MiB, host {host} MiB")
    process.join(5)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
