"""Ask a gateway's health service: `python -m folkmoot.gateway.probe --address HOST:PORT --service ready`.

For a kubelet, whose own gRPC probe cannot speak TLS. Exit code 0: SERVING; 1: anything else, with the reason on stderr.
"""

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ADDRESS = "127.0.0.1:50051"
TIMEOUT_S = 5.0


def ask(address: str, service: str, tls_ca: Path | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """The state of a health service's name, "SERVING" for one, or why there is no answer. With `tls_ca`, a PEM file of
    who signed the gateway's certificate, by TLS."""
    with _channel(address, tls_ca) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(request, timeout=timeout_s)  # type: ignore[attr-defined]
        except grpc.RpcError as e:
            return f"{e.code().name}: {e.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _channel(address: str, tls_ca: Path | None) -> grpc.Channel:
    if tls_ca is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(tls_ca.read_bytes()))


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m folkmoot.gateway.probe", description=__doc__)
    p.add_argument("--address", default=ADDRESS, metavar="HOST:PORT", help="default: %(default)s")
    p.add_argument("--service", default="", help='a name of the health service: "ready", or empty (the default)')
    p.add_argument("--tls-ca", type=Path, metavar="FILE", help="speak TLS; PEM file of who signed the certificate")
    args = p.parse_args()
    if (state := ask(args.address, args.service, args.tls_ca)) != "SERVING":
        sys.exit(f"{args.address} {args.service!r}: {state}")


if __name__ == "__main__":
    main()
