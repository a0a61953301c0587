// Apache HttpClient, java.net.http and HttpURLConnection, each with its defaults. Arguments: how, host:port of REST.
//
// HttpClient offers TLS/1.2 by an Upgrade header with every plain request, java.net.http offers h2c with its first.

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.net.HttpURLConnection;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Map;
import java.util.zip.GZIPOutputStream;
import org.apache.hc.client5.http.classic.methods.HttpGet;
import org.apache.hc.client5.http.classic.methods.HttpPost;
import org.apache.hc.client5.http.impl.classic.CloseableHttpClient;
import org.apache.hc.client5.http.impl.classic.HttpClients;
import org.apache.hc.core5.http.ContentType;
import org.apache.hc.core5.http.io.entity.ByteArrayEntity;
import org.apache.hc.core5.http.io.entity.EntityUtils;

public final class Calls {
  private static final String ONE =
      "{\"inputs\": [{\"name\": \"x\", \"datatype\": \"FP32\", \"shape\": [1, 1], \"data\": [1]}]}";
  private static final int MANY = 1 << 20; // floats: 4 MiB

  record Answer(int status, byte[] body, String headerLength) {
    String text() {
      return new String(body, StandardCharsets.UTF_8);
    }
  }

  interface Client {
    Answer get(String url) throws Exception;

    Answer post(String url, byte[] body, Map<String, String> headers) throws Exception;
  }

  public static void main(String[] arguments) throws Exception {
    String base = "http://" + arguments[1];
    Client client =
        switch (arguments[0]) {
          case "apache" -> apache();
          case "java.net.http" -> modern();
          case "HttpURLConnection" -> old();
          default -> throw new IllegalArgumentException(arguments[0]);
        };
    Map<String, String> json = Map.of("Content-Type", "application/json");
    String infer = base + "/v2/models/seven/infer";
    for (int call = 0; call < 20; call++) {
      expect(client.post(infer, ONE.getBytes(StandardCharsets.UTF_8), json), "\"data\":[7.0]");
    }
    expect(client.get(base + "/v2/models/seven"), "\"name\": \"x\"");
    expect(client.get(base + "/v2/models/a%2Fslash/ready"), "true");
    expect(client.get(base + "/mesh/v1/models"), "\"seven\"");
    expect(client.post(infer, packed(ONE), Map.of("Content-Type", "application/json", "Content-Encoding", "gzip")), "7.0");
    large(client, base);
    Answer refused = client.post(base + "/v2/models/a%2Fslash/infer", new byte[20 << 20], json);
    if (refused.status() != 413 || !refused.text().contains("--max-message")) {
      throw new AssertionError(refused.status() + ": " + refused.text());
    }
    System.out.println("served");
    System.exit(0); // HttpClient's threads do not end by themselves
  }

  private static void expect(Answer answer, String part) {
    if (answer.status() != 200 || !answer.text().contains(part)) {
      throw new AssertionError(answer.status() + ": " + answer.text() + " lacks " + part);
    }
  }

  private static void large(Client client, String base) throws Exception {
    byte[] head =
        ("{\"inputs\": [{\"name\": \"x\", \"datatype\": \"FP32\", \"shape\": [" + MANY + "], \"parameters\":"
                + " {\"binary_data_size\": " + 4 * MANY + "}}], \"parameters\": {\"binary_data_output\": true}}")
            .getBytes(StandardCharsets.UTF_8);
    ByteBuffer body = ByteBuffer.allocate(head.length + 4 * MANY).order(ByteOrder.LITTLE_ENDIAN);
    body.put(head);
    for (int index = 0; index < MANY; index++) {
      body.putFloat(index);
    }
    String name = "Inference-Header-Content-Length";
    Map<String, String> headers =
        Map.of("Content-Type", "application/octet-stream", name, Integer.toString(head.length));
    Answer answer = client.post(base + "/v2/models/a%2Fslash/infer", body.array(), headers);
    if (answer.status() != 200) {
      throw new AssertionError(answer.text());
    }
    byte[] sent = Arrays.copyOfRange(body.array(), head.length, body.array().length);
    int begin = Integer.parseInt(answer.headerLength());
    if (!Arrays.equals(sent, Arrays.copyOfRange(answer.body(), begin, answer.body().length))) {
      throw new AssertionError("the large body came back changed");
    }
  }

  private static byte[] packed(String text) throws IOException {
    ByteArrayOutputStream made = new ByteArrayOutputStream();
    try (GZIPOutputStream packing = new GZIPOutputStream(made)) {
      packing.write(text.getBytes(StandardCharsets.UTF_8));
    }
    return made.toByteArray();
  }

  private static Client apache() {
    CloseableHttpClient http = HttpClients.createDefault();
    return new Client() {
      @Override
      public Answer get(String url) throws IOException {
        return http.execute(new HttpGet(url), Calls::read);
      }

      @Override
      public Answer post(String url, byte[] body, Map<String, String> headers) throws IOException {
        HttpPost request = new HttpPost(url);
        request.setEntity(new ByteArrayEntity(body, ContentType.parse(headers.get("Content-Type"))));
        headers.forEach(request::setHeader);
        return http.execute(request, Calls::read);
      }
    };
  }

  private static Answer read(org.apache.hc.core5.http.ClassicHttpResponse response) throws IOException {
    var length = response.getFirstHeader("Inference-Header-Content-Length");
    byte[] body = EntityUtils.toByteArray(response.getEntity());
    return new Answer(response.getCode(), body, length == null ? null : length.getValue());
  }

  private static Client modern() {
    HttpClient http = HttpClient.newHttpClient();
    return new Client() {
      @Override
      public Answer get(String url) throws Exception {
        return send(HttpRequest.newBuilder(URI.create(url)));
      }

      @Override
      public Answer post(String url, byte[] body, Map<String, String> headers) throws Exception {
        HttpRequest.Builder request =
            HttpRequest.newBuilder(URI.create(url)).POST(HttpRequest.BodyPublishers.ofByteArray(body));
        headers.forEach(request::header);
        return send(request);
      }

      private Answer send(HttpRequest.Builder request) throws Exception {
        HttpResponse<byte[]> answer = http.send(request.build(), HttpResponse.BodyHandlers.ofByteArray());
        String length = answer.headers().firstValue("Inference-Header-Content-Length").orElse(null);
        return new Answer(answer.statusCode(), answer.body(), length);
      }
    };
  }

  private static Client old() {
    return new Client() {
      @Override
      public Answer get(String url) throws IOException {
        return read((HttpURLConnection) URI.create(url).toURL().openConnection());
      }

      @Override
      public Answer post(String url, byte[] body, Map<String, String> headers) throws IOException {
        HttpURLConnection connection = (HttpURLConnection) URI.create(url).toURL().openConnection();
        connection.setDoOutput(true);
        headers.forEach(connection::setRequestProperty);
        try (var out = connection.getOutputStream()) {
          out.write(body);
        }
        return read(connection);
      }

      private Answer read(HttpURLConnection connection) throws IOException {
        int status = connection.getResponseCode();
        try (var in = status < 400 ? connection.getInputStream() : connection.getErrorStream()) {
          String length = connection.getHeaderField("Inference-Header-Content-Length");
          return new Answer(status, in == null ? new byte[0] : in.readAllBytes(), length);
        }
      }
    };
  }
}
