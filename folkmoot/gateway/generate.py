"""Regenerates `folkmoot/gateway/pb` from `proto/`: `python -m folkmoot.gateway.generate [--into DIR]`.

Needs grpcio-tools (extra `dev`). The result is committed, so that nobody needs protoc to run Folkmoot.
"""

import argparse
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "proto" / "folkmoot" / "v1"
# The files get their package path as name, so that the generated modules import each other by it.
PACKAGE = "folkmoot/gateway/pb"


def generate(into: Path) -> None:
    """Write the generated modules to `into`/folkmoot/gateway/pb. Raises RuntimeError where protoc refuses."""
    from grpc_tools import protoc

    include = files("grpc_tools") / "_proto"
    into.joinpath(PACKAGE).mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in SOURCE.glob("*.proto"))
    common = ["protoc", f"-I{PACKAGE}={SOURCE}", f"-I{include}"]
    outputs = [f"--python_out={into}", f"--pyi_out={into}"]
    if protoc.main([*common, *outputs, *(f"{PACKAGE}/{name}" for name in names)]) != 0:
        raise RuntimeError("protoc failed; its message stands above")
    services = [f"{PACKAGE}/{path.name}" for path in sorted(SOURCE.glob("*.proto")) if "\nservice " in path.read_text()]
    if protoc.main([*common, f"--grpc_python_out={into}", *services]) != 0:
        raise RuntimeError("protoc failed; its message stands above")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT, help="root of the tree to write (default: this checkout)")
    generate(parser.parse_args().into)


if __name__ == "__main__":
    main()
