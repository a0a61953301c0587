"""Generated from `proto/` by `make proto`: do not edit. The pool is Mesh's own, see proto/generate.py."""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
