"""V2's messages under the module name that their classes carry, which Ray needs to pickle them between its
processes."""

import sys

from mesh.pb import inference_pb2

sys.modules[__name__] = inference_pb2
