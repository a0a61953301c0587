// fetch, node:http with kept connections, and node:http2 without TLS. Arguments: how, host:port of REST.

import http from "node:http";
import http2 from "node:http2";
import zlib from "node:zlib";

const [how, address] = process.argv.slice(2);
const base = `http://${address}`;
const one = JSON.stringify({ inputs: [{ name: "x", datatype: "FP32", shape: [1, 1], data: [1] }] });
const many = 1 << 20; // floats: 4 MiB
const HEADER_LENGTH = "inference-header-content-length";

async function byFetch(method, path, headers, body) {
  const answer = await fetch(base + path, { method, headers, body });
  const bytes = Buffer.from(await answer.arrayBuffer());
  return { status: answer.status, body: bytes, length: answer.headers.get(HEADER_LENGTH) };
}

const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

function collected(stream, resolve, reject, head) {
  const pieces = [];
  stream.on("data", (piece) => pieces.push(piece));
  stream.on("error", reject);
  stream.on("end", () => resolve({ ...head(), body: Buffer.concat(pieces) }));
}

function byHttp(method, path, headers, body) {
  return new Promise((resolve, reject) => {
    const request = http.request(base + path, { method, headers, agent }, (answer) =>
      collected(answer, resolve, reject, () => ({ status: answer.statusCode, length: answer.headers[HEADER_LENGTH] })),
    );
    request.on("error", reject);
    request.end(body);
  });
}

let session;

function byHttp2(method, path, headers, body) {
  session ??= http2.connect(base);
  return new Promise((resolve, reject) => {
    const stream = session.request({ ":method": method, ":path": path, ...headers });
    let head = {};
    stream.on("response", (found) => (head = { status: found[":status"], length: found[HEADER_LENGTH] }));
    collected(stream, resolve, reject, () => head);
    stream.end(body);
  });
}

const ask = { fetch: byFetch, http: byHttp, http2: byHttp2 }[how];

async function expect(part, ...call) {
  const answer = await ask(...call);
  if (answer.status !== 200 || !answer.body.toString().includes(part)) {
    throw new Error(`${call.slice(0, 2)}: ${answer.status}: ${answer.body} lacks ${part}`);
  }
}

const json = { "content-type": "application/json" };
for (let call = 0; call < 20; call++) {
  await expect('"data":[7.0]', "POST", "/v2/models/seven/infer", json, one);
}
await expect('"name": "x"', "GET", "/v2/models/seven", {});
await expect("true", "GET", "/v2/models/a%2Fslash/ready", {});
await expect('"seven"', "GET", "/mesh/v1/models", {});
const packed = { ...json, "content-encoding": "gzip" };
await expect("7.0", "POST", "/v2/models/seven/infer", packed, zlib.gzipSync(one));

const tensor = Buffer.from(Float32Array.from({ length: many }, (_, index) => index).buffer);
const head = Buffer.from(
  JSON.stringify({
    inputs: [{ name: "x", datatype: "FP32", shape: [many], parameters: { binary_data_size: tensor.length } }],
    parameters: { binary_data_output: true },
  }),
);
const binary = { "content-type": "application/octet-stream", [HEADER_LENGTH]: String(head.length) };
const answer = await ask("POST", "/v2/models/a%2Fslash/infer", binary, Buffer.concat([head, tensor]));
if (answer.status !== 200 || !answer.body.subarray(Number(answer.length)).equals(tensor)) {
  throw new Error(`the large body: ${answer.status}`);
}
console.log("served");
process.exit(0);
