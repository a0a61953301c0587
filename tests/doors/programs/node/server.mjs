// A server of @grpc/grpc-js, whose methods do what their names say. Argument: the most calls at once (0: any number).
//
// It prints its port. At SIGTERM it stops gracefully: it announces the end, and finishes the calls that it has taken.

import grpc from "@grpc/grpc-js";

const most = Number(process.argv[2]);
let hanging = 0;
let cancelled = 0;

const reply = (call, ...messages) => {
  for (const message of messages) call.write(message);
  call.end();
};

const methods = {
  echo(call) {
    const initial = new grpc.Metadata();
    initial.set("initial", "1");
    call.sendMetadata(initial);
    const trailing = new grpc.Metadata();
    trailing.set("trailing-bin", Buffer.from([0, 255]));
    call.write(call.request);
    call.end(trailing);
  },
  packed: (call) => reply(call, call.request),
  refuse(call) {
    const metadata = new grpc.Metadata();
    metadata.set("trailing", "2");
    call.emit("error", { code: grpc.status.FAILED_PRECONDITION, details: "not ñow", metadata });
  },
  several: (call) => reply(call, call.request, call.request, call.request),
  wait: (call) => setTimeout(() => reply(call, call.request), Number(call.request)),
  hang(call) {
    hanging += 1;
    call.on("cancelled", () => {
      hanging -= 1;
      cancelled += 1;
    });
  },
  counts: (call) => reply(call, Buffer.from(`${hanging} ${cancelled}`)),
};

const same = (bytes) => bytes;
const coding = {
  requestStream: false,
  responseStream: true,
  requestSerialize: same,
  requestDeserialize: same,
  responseSerialize: same,
  responseDeserialize: same,
};
const service = Object.fromEntries(Object.keys(methods).map((name) => [name, { path: `/test.Test/${name}`, ...coding }]));

const options = { "grpc.max_receive_message_length": 64 << 20, "grpc.keepalive_time_ms": 1000 };
if (most > 0) options["grpc.max_concurrent_streams"] = most;
const server = new grpc.Server(options);
server.addService(service, methods);
server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.log(port);
});
process.on("SIGTERM", () => server.tryShutdown(() => process.exit(0)));
