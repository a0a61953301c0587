// @grpc/grpc-js with the project's own proto file. Arguments: path of inference.proto, host:port of gRPC.

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [proto, address] = process.argv.slice(2);
const { inference } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true }));
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());

const call = (method, request) =>
  new Promise((resolve, reject) => {
    const deadline = Date.now() + 30_000;
    client[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });

const bytes = (floats) => Buffer.from(Float32Array.from(floats).buffer);
const request = (model, shape, raw) => ({
  model_name: model,
  inputs: [{ name: "x", datatype: "FP32", shape }],
  raw_input_contents: [raw],
});

if (!(await call("ServerLive", {})).live) throw new Error("not live");
if ((await call("ModelMetadata", { name: "seven" })).inputs[0].name !== "x") throw new Error("metadata");
for (let number = 0; number < 20; number++) {
  const answer = await call("ModelInfer", request("seven", [1, 1], bytes([1])));
  if (!answer.raw_output_contents[0].equals(bytes([7]))) throw new Error("another answer");
}
const large = bytes(Array.from({ length: 900_000 }, (_, index) => index));
const answer = await call("ModelInfer", request("a/slash", [900_000], large));
if (!answer.raw_output_contents[0].equals(large)) throw new Error("the large message came back changed");
try {
  await call("ModelInfer", request("nobody", [1, 1], bytes([1])));
  throw new Error("answered for nobody");
} catch (error) {
  if (error.code !== grpc.status.NOT_FOUND) throw error;
}
console.log("served");
process.exit(0);
