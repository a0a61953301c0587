"""Generates `mesh/pb/` from the .proto files beside this file, or checks that it is fresh.

    python proto/generate.py            writes mesh/pb/
    python proto/generate.py --check    exits 1 and shows what differs, if anything does

The generated modules register their messages in a descriptor pool of our own (`mesh.pb.POOL`): in protobuf's default
pool, our V2 messages and those of another V2 client library in the same process are "duplicate symbols".
"""

import argparse
import difflib
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "mesh" / "pb"

PACKAGE = '''"""Generated from `proto/` by `make proto`: do not edit. The pool is Mesh's own, see proto/generate.py."""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
'''


def generate(into: Path) -> None:
    """Writes the modules for every .proto file into the folder `into`."""
    from grpc_tools import protoc

    protos = sorted(path.name for path in HERE.glob("*.proto"))
    options = [f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}"]
    status = protoc.main(["protoc", f"--proto_path={HERE}", *options, *protos])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    for path in into.glob("*_pb2*.py*"):
        text = path.read_text()
        text = text.replace("_descriptor_pool.Default()", "_POOL")
        text = text.replace(
            "from google.protobuf import descriptor_pool as _descriptor_pool\n", "from mesh.pb import POOL as _POOL\n"
        )
        text = re.sub(r"^import (\w+_pb2) as (\w+)$", r"from mesh.pb import \1 as \2", text, flags=re.MULTILINE)
        path.write_text(text)
        if path.name.endswith("_grpc.py") and "Stub:" not in text:
            path.unlink()  # no service in that file
    (into / "__init__.py").write_text(PACKAGE)


def differences(fresh: Path) -> list[str]:
    """Returns unified diffs between the committed modules and those in `fresh`."""
    found = []
    for name in sorted({p.name for p in fresh.iterdir()} | {p.name for p in OUT.glob("*.py*")}):
        old, new = OUT / name, fresh / name
        before = old.read_text().splitlines() if old.exists() else []
        after = new.read_text().splitlines() if new.exists() else []
        found += list(difflib.unified_diff(before, after, f"committed/{name}", f"generated/{name}", lineterm="", n=1))
    return found


def main() -> None:
    """Writes mesh/pb, or compares it with what the .proto files generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Only compare, and exit with 1 if mesh/pb is out of date.")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        if check:
            diff = differences(fresh)
            if diff:
                print("\n".join(diff[:60]))
                sys.exit("mesh/pb is not what proto/ generates: run `make proto` and commit the result")
            return
        OUT.mkdir(exist_ok=True)
        for path in [*OUT.glob("*_pb2*")]:
            path.unlink()
        for path in fresh.iterdir():
            (OUT / path.name).write_text(path.read_text())


if __name__ == "__main__":
    main()
