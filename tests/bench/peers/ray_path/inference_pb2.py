"""V2's messages under the name that their classes bear, so that Ray can pickle them between its processes."""

import sys

from mesh.pb import inference_pb2

sys.modules[__name__] = inference_pb2
