// A server of grpc-java on netty, whose methods do what their names say. Argument: the most calls at once (0: any).
//
// It prints its port. At SIGTERM it stops gracefully: it announces the end, and finishes the calls that it has taken.

import io.grpc.HandlerRegistry;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerMethodDefinition;
import io.grpc.Status;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;

public final class Methods {
  private static final Metadata.Key<String> INITIAL = text("initial");
  private static final Metadata.Key<String> TRAILING = text("trailing");
  private static final Metadata.Key<byte[]> TRAILING_BIN =
      Metadata.Key.of("trailing-bin", Metadata.BINARY_BYTE_MARSHALLER);
  private static final AtomicInteger hanging = new AtomicInteger();
  private static final AtomicInteger cancelled = new AtomicInteger();
  private static final ScheduledExecutorService later = Executors.newSingleThreadScheduledExecutor();

  private static Metadata.Key<String> text(String name) {
    return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
  }

  private static final MethodDescriptor.Marshaller<byte[]> RAW =
      new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] value) {
          return new ByteArrayInputStream(value);
        }

        @Override
        public byte[] parse(InputStream stream) {
          try {
            return stream.readAllBytes();
          } catch (IOException error) {
            throw new UncheckedIOException(error);
          }
        }
      };

  private static void answer(ServerCall<byte[], byte[]> call, String method, byte[] request) {
    Metadata headers = new Metadata();
    Metadata trailers = new Metadata();
    switch (method) {
      case "echo" -> {
        headers.put(INITIAL, "1");
        trailers.put(TRAILING_BIN, new byte[] {0, -1});
        reply(call, headers, trailers, request);
      }
      case "packed" -> {
        call.setCompression("gzip");
        call.setMessageCompression(true);
        reply(call, headers, trailers, request);
      }
      case "refuse" -> {
        trailers.put(TRAILING, "2");
        call.close(Status.FAILED_PRECONDITION.withDescription("not ñow"), trailers);
      }
      case "several" -> reply(call, headers, trailers, request, request, request);
      case "wait" ->
          later.schedule(
              () -> reply(call, headers, trailers, request), Integer.parseInt(string(request)), TimeUnit.MILLISECONDS);
      case "hang" -> hanging.incrementAndGet();
      case "counts" ->
          reply(call, headers, trailers, (hanging + " " + cancelled).getBytes(StandardCharsets.US_ASCII));
      default -> call.close(Status.UNIMPLEMENTED, trailers);
    }
  }

  private static String string(byte[] bytes) {
    return new String(bytes, StandardCharsets.US_ASCII);
  }

  private static void reply(
      ServerCall<byte[], byte[]> call, Metadata headers, Metadata trailers, byte[]... messages) {
    call.sendHeaders(headers);
    for (byte[] message : messages) {
      call.sendMessage(message);
    }
    call.close(Status.OK, trailers);
  }

  private static final ServerCallHandler<byte[], byte[]> HANDLER =
      (call, ignored) -> {
        String method = call.getMethodDescriptor().getBareMethodName();
        call.request(2);
        return new ServerCall.Listener<>() {
          private byte[] request;

          @Override
          public void onMessage(byte[] message) {
            request = message;
          }

          @Override
          public void onHalfClose() {
            answer(call, method, request);
          }

          @Override
          public void onCancel() {
            if (method.equals("hang")) {
              hanging.decrementAndGet();
              cancelled.incrementAndGet();
            }
          }
        };
      };

  private static final HandlerRegistry METHODS =
      new HandlerRegistry() {
        @Override
        public ServerMethodDefinition<?, ?> lookupMethod(String name, String authority) {
          return ServerMethodDefinition.create(
              MethodDescriptor.<byte[], byte[]>newBuilder(RAW, RAW)
                  .setType(MethodDescriptor.MethodType.SERVER_STREAMING)
                  .setFullMethodName(name)
                  .build(),
              HANDLER);
        }
      };

  public static void main(String[] arguments) throws Exception {
    int most = Integer.parseInt(arguments[0]);
    NettyServerBuilder builder =
        NettyServerBuilder.forAddress(new InetSocketAddress("127.0.0.1", 0))
            .fallbackHandlerRegistry(METHODS)
            .maxInboundMessageSize(64 << 20)
            .keepAliveTime(1, TimeUnit.SECONDS);
    if (most > 0) {
      builder.maxConcurrentCallsPerConnection(most);
    }
    Server server = builder.build().start();
    System.out.println(server.getPort());
    Runtime.getRuntime()
        .addShutdownHook(
            new Thread(
                () -> {
                  try {
                    server.shutdown().awaitTermination(60, TimeUnit.SECONDS);
                  } catch (InterruptedException error) {
                    Thread.currentThread().interrupt();
                  }
                  later.shutdownNow();
                }));
    server.awaitTermination();
  }
}
