// The HTTP port over a raw socket, against a scripted engine: what a client library would hide.
#include "server/compat/openai_http.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine/base/check.h"
#include "tests/server/server_harness.h"

namespace minitron::server::compat {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

class Connection {
 public:
  explicit Connection(int port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  }
  ~Connection() { close(fd_); }

  void Post(const std::string& path, const std::string& body) {
    Send("POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
  }
  void Send(const std::string& text) {
    CHECK(write(fd_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  }
  // What has come once `text` is in it, or everything at the end of the connection.
  std::string ReadUntil(const std::string& text) {
    char buffer[4096];
    while (seen_.find(text) == std::string::npos) {
      const ssize_t count = read(fd_, buffer, sizeof(buffer));
      if (count <= 0) break;
      seen_.append(buffer, static_cast<size_t>(count));
    }
    return seen_;
  }
  std::string ReadAll() { return ReadUntil("\x01 never"); }

 private:
  int fd_;
  std::string seen_;
};

class OpenAiHttpTest : public ::testing::Test {
 protected:
  OpenAiHttpTest() {
    HttpOptions options;
    options.host = "127.0.0.1";
    options.num_threads = 4;
    options.max_body_bytes = 1 << 16;
    auto started = OpenAiHttp::Start(options, ChatTemplate::kNone, &harness_.context);
    CHECK(started.ok());
    http_ = *std::move(started);
  }

  ServerHarness harness_;
  std::unique_ptr<OpenAiHttp> http_;
};

TEST(HttpServerTest, AnAddressMayBeOfEitherFamily) {
  HttpOptions options;
  EXPECT_EQ(ListeningPort(options), "127.0.0.1:0") << "nobody else, unless asked for";
  options.port = 8000;
  for (const auto& [host, spelled] :
       {std::pair("0.0.0.0", "0.0.0.0:8000"), {"::1", "[::1]:8000"}, {"::", "[::]:8000"}}) {
    options.host = host;
    EXPECT_EQ(ListeningPort(options), spelled);
  }
}

TEST_F(OpenAiHttpTest, ATakenPortIsSaid) {
  HttpOptions options;
  options.num_threads = 1;
  options.port = http_->port();
  const auto second = OpenAiHttp::Start(options, ChatTemplate::kNone, &harness_.context);
  EXPECT_TRUE(absl::IsUnavailable(second.status()));
}

TEST_F(OpenAiHttpTest, TokensAreSentAsTheyCome) {
  Connection connection(http_->port());
  connection.Post("/v1/completions", R"({"prompt":"to be","max_tokens":3,"stream":true})");
  harness_.engine->WaitForRequests(1);
  harness_.Step();
  const std::string first = connection.ReadUntil("data: ");
  EXPECT_THAT(first, StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(first, Not(HasSubstr("[DONE]")));
  harness_.Step(3);
  EXPECT_THAT(connection.ReadAll(), HasSubstr("data: [DONE]"));
}

TEST_F(OpenAiHttpTest, AnEngineFailureIsACodeBeforeTheFirstTokenAndAnEventAfterIt) {
  Connection early(http_->port());
  early.Post("/v1/completions", R"({"prompt":"to be","max_tokens":3})");
  harness_.engine->WaitForRequests(1);
  harness_.engine->fail_next_request = true;
  harness_.Step();
  EXPECT_THAT(early.ReadAll(), StartsWith("HTTP/1.1 500"));

  Connection late(http_->port());
  late.Post("/v1/completions", R"({"prompt":"to be","max_tokens":30,"stream":true})");
  harness_.engine->WaitForRequests(2);
  harness_.Step();
  late.ReadUntil("data: ");
  harness_.engine->engine_error = "device lost";
  harness_.Step();
  const std::string all = late.ReadAll();
  EXPECT_THAT(all, HasSubstr("ENGINE_FAILURE"));
  EXPECT_THAT(all, Not(HasSubstr("[DONE]")));
}

TEST_F(OpenAiHttpTest, AClientThatLeavesAStreamFreesItsRequests) {
  {
    Connection connection(http_->port());
    connection.Post("/v1/completions", R"({"prompt":["to be","or not"],"max_tokens":4000,"stream":true})");
    harness_.engine->WaitForRequests(2);
    harness_.Step();
    connection.ReadUntil("data: ");
  }
  harness_.RunEngine();
  harness_.engine->WaitForAborts(2);
}

TEST_F(OpenAiHttpTest, AClientThatLeavesARequestWithoutAStreamFreesItToo) {
  {
    Connection connection(http_->port());
    connection.Post("/v1/completions", R"({"prompt":["to be","or not"],"max_tokens":4000})");
    harness_.engine->WaitForRequests(2);
  }
  harness_.engine->WaitForAborts(2);  // before the engine made a single step
  harness_.Step(1);
  EXPECT_EQ(harness_.engine->num_live(), 0);
}

TEST_F(OpenAiHttpTest, ItIsMissedAlsoWhileTokensComeWithoutAPause) {
  harness_.context.model.info.max_context_tokens = 1 << 30;
  {
    Connection connection(http_->port());
    connection.Post("/v1/completions", R"({"prompt":"to be","max_tokens":1000000000})");
    harness_.engine->WaitForRequests(1);
    harness_.RunEngine();  // never idle: steps follow each other until the request is aborted
  }
  harness_.engine->WaitForAborts(1);
}

TEST_F(OpenAiHttpTest, NamesAndTracesComeBackAndCanBeCancelled) {
  const std::string trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  const auto post = [&](Connection& connection, const std::string& headers, const std::string& body) {
    connection.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + headers +
                    "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
  };
  Connection named(http_->port());
  post(named, "x-request-id: mine\r\ntraceparent: " + trace + "\r\n", R"({"prompt":"to be","max_tokens":4000})");
  harness_.engine->WaitForRequests(1);
  EXPECT_TRUE(harness_.output->CancelByName("mine"));
  harness_.Step(1);
  const std::string answer = named.ReadAll();
  EXPECT_THAT(answer, HasSubstr("x-request-id: mine\r\n"));
  EXPECT_THAT(answer, HasSubstr("traceparent: " + trace + "\r\n"));

  Connection hostile(http_->port());
  post(hostile, "x-request-id: \xff\r\ntraceparent: 00-0\r\n", R"({"prompt":"a","max_tokens":0})");
  const std::string refused = hostile.ReadAll();
  EXPECT_THAT(refused, HasSubstr("x-request-id: req-"));
  EXPECT_THAT(refused, Not(HasSubstr("traceparent")));
}

TEST_F(OpenAiHttpTest, ARequestTheEngineCannotTakeIsRefusedBeforeItIsTokenized) {
  harness_.engine->early_refusal = absl::UnavailableError("no room");
  Connection connection(http_->port());
  connection.Post("/v1/completions", R"({"prompt":"a"})");
  EXPECT_THAT(connection.ReadAll(), StartsWith("HTTP/1.1 503"));
}

TEST_F(OpenAiHttpTest, OneRefusedPromptOfManyAbortsTheOthers) {
  Connection connection(http_->port());
  harness_.context.model.info.max_context_tokens = 8;
  connection.Post("/v1/completions", R"({"prompt":["a","to be or not to be that is the question"],"max_tokens":2})");
  EXPECT_THAT(connection.ReadAll(), StartsWith("HTTP/1.1 400"));
  EXPECT_EQ(harness_.engine->num_live(), 0);
}

TEST_F(OpenAiHttpTest, AFullQueueIs503WithARetryTime) {
  harness_.engine->refusal = absl::UnavailableError("full");
  Connection connection(http_->port());
  connection.Post("/v1/completions", R"({"prompt":"a"})");
  const std::string answer = connection.ReadAll();
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 503"));
  EXPECT_THAT(answer, HasSubstr("Retry-After: 1"));
  EXPECT_THAT(answer, HasSubstr("QUEUE_FULL"));
}

TEST_F(OpenAiHttpTest, StoppingEndsWhatRuns) {
  Connection connection(http_->port());
  connection.Post("/v1/completions", R"({"prompt":"to be","max_tokens":4000,"stream":true})");
  harness_.engine->WaitForRequests(1);
  harness_.Step();
  connection.ReadUntil("data: ");
  harness_.RunEngine();
  http_.reset();
  EXPECT_THAT(connection.ReadAll(), Not(HasSubstr("[DONE]")));
}

TEST_F(OpenAiHttpTest, BodiesAreBoundedAlsoWhenTheirLengthIsNotAnnounced) {
  Connection announced(http_->port());
  announced.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n");
  EXPECT_THAT(announced.ReadUntil("\r\n"), StartsWith("HTTP/1.1 413"));
  Connection chunked(http_->port());
  chunked.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n12000\r\n" +
               std::string(0x12000, 'x') + "\r\n0\r\n\r\n");
  EXPECT_THAT(chunked.ReadUntil("\r\n"), StartsWith("HTTP/1.1 413"));
}

TEST_F(OpenAiHttpTest, ATakenPortIsRefused) {
  HttpOptions options;
  options.host = "127.0.0.1";
  options.port = http_->port();
  EXPECT_EQ(OpenAiHttp::Start(options, ChatTemplate::kNone, &harness_.context).status().code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace minitron::server::compat
