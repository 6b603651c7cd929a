// OpenAI's completions over HTTP. One thread runs all transfers (libcurl's multi interface).
#include <curl/curl.h>

#include <deque>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "clients/bench/driver.h"

namespace minitron::bench {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxEventBytes = 16u << 20;
constexpr size_t kMaxErrorBytes = 4096;

void ReadCount(const Json& usage, const char* key, uint32_t* count) {
  const auto found = usage.find(key);
  if (found != usage.end() && found->is_number_unsigned()) *count = found->get<uint32_t>();
}

struct HttpCall {
  std::string body;
  std::string line;    // of the event stream, until it is whole
  std::string answer;  // the start of what is no event, for the error's message
  uint32_t chunks = 0;
  uint32_t counted = 0;  // completion tokens as the server says
  std::string error;
  std::string message;
  TokenClock clock;
  Driver::Done done;

  void OnLine() {
    if (line.rfind("data:", 0) != 0) {
      if (answer.size() < kMaxErrorBytes) answer += line.substr(0, kMaxErrorBytes);
      return;
    }
    const Json event = Json::parse(line.substr(5), nullptr, /*allow_exceptions=*/false);
    if (!event.is_object()) return;  // [DONE]
    if (event.contains("error")) {
      error = "ERROR_EVENT";
      message = event["error"].dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, kMaxErrorBytes);
    }
    const auto usage = event.find("usage");
    if (usage != event.end() && usage->is_object()) {
      ReadCount(*usage, "completion_tokens", &counted);
      ReadCount(*usage, "prompt_tokens", &clock.record().prompt_tokens);
    }
    const auto choices = event.find("choices");
    if (choices == event.end() || !choices->is_array() || choices->empty()) return;
    const Json& choice = (*choices)[0];
    // As other load generators do: a chunk with text is a token; the usage at the end corrects the count.
    if (choice.is_object() && choice.contains("text") && choice["text"].is_string() &&
        !choice["text"].get_ref<const std::string&>().empty()) {
      ++chunks;
      clock.OnTokens(0);
    }
  }
};

size_t OnData(char* data, size_t size, size_t count, void* user) {
  auto* const call = static_cast<HttpCall*>(user);
  for (size_t i = 0; i < size * count; ++i) {
    if (data[i] == '\n') {
      call->OnLine();
      call->line.clear();
    } else if (call->line.size() < kMaxEventBytes) {
      call->line.push_back(data[i]);
    }
  }
  return size * count;
}

class OpenAiDriver final : public Driver {
 public:
  explicit OpenAiDriver(const DriverOptions& options) : options_(options), multi_(curl_multi_init()) {
    SetUrl();
    headers_ = curl_slist_append(headers_, "Content-Type: application/json");
    for (const auto& [key, value] : options.metadata) {
      headers_ = curl_slist_append(headers_, absl::StrCat(key, ": ", value).c_str());
    }
    thread_ = std::thread([this] { Run(); });
  }

  ~OpenAiDriver() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    curl_multi_wakeup(multi_);
    thread_.join();
    curl_multi_cleanup(multi_);
    curl_slist_free_all(headers_);
    curl_slist_free_all(connect_to_);
  }

  void Start(const Prompt& prompt, uint64_t index, Done done) override {
    Json body = {{"model", options_.model},
                 {"max_tokens", prompt.output_tokens},
                 {"temperature", options_.temperature},
                 {"ignore_eos", options_.ignore_eos},
                 {"seed", options_.seed + index},
                 {"stream", true},
                 {"stream_options", {{"include_usage", true}}}};
    if (prompt.ids.empty()) {
      body["prompt"] = prompt.text;
    } else {
      body["prompt"] = prompt.ids;
    }
    auto call = std::make_unique<HttpCall>();
    call->body = body.dump(-1, ' ', false, Json::error_handler_t::replace);
    call->clock.record().prompt_tokens = prompt.input_tokens;
    call->done = std::move(done);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(call));
    }
    curl_multi_wakeup(multi_);
  }

  bool takes_ids() const override { return true; }

 private:
  void SetUrl() {
    const std::string& target = options_.target;
    const bool has_scheme = target.find("://") != std::string::npos;
    url_ = (has_scheme ? "" : options_.tls.has_value() ? "https://" : "http://") + target;
    if (options_.tls.has_value() && !options_.tls->server_name.empty()) {
      // The name is asked for and expected; the connection goes to the target.
      const std::string address = has_scheme ? target.substr(target.find("://") + 3) : target;
      url_ = "https://" + options_.tls->server_name;
      connect_to_ = curl_slist_append(nullptr, ("::" + address).c_str());
    }
    url_ += "/v1/completions";
  }

  void Encrypt(CURL* easy) {
    const client::TlsOptions& tls = *options_.tls;
    const auto set = [easy](CURLoption option, const std::string& pem) {
      curl_blob blob{const_cast<char*>(pem.data()), pem.size(), CURL_BLOB_NOCOPY};  // outlives the handle
      if (!pem.empty()) curl_easy_setopt(easy, option, &blob);
    };
    set(CURLOPT_CAINFO_BLOB, tls.root_certificates);
    set(CURLOPT_SSLCERT_BLOB, tls.certificate_chain);
    set(CURLOPT_SSLKEY_BLOB, tls.private_key);
    curl_easy_setopt(easy, CURLOPT_CONNECT_TO, connect_to_);
  }

  void Run() {
    while (true) {
      std::deque<std::unique_ptr<HttpCall>> started;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (stopping_ && queue_.empty() && calls_.empty()) return;
        started.swap(queue_);
      }
      for (std::unique_ptr<HttpCall>& call : started) Begin(std::move(call));
      int running = 0;
      curl_multi_perform(multi_, &running);
      int left = 0;
      while (const CURLMsg* const message = curl_multi_info_read(multi_, &left)) {
        if (message->msg == CURLMSG_DONE) End(message->easy_handle, message->data.result);
      }
      curl_multi_poll(multi_, nullptr, 0, 1000, nullptr);
    }
  }

  void Begin(std::unique_ptr<HttpCall> call) {
    CURL* const easy = curl_easy_init();
    curl_easy_setopt(easy, CURLOPT_URL, url_.c_str());
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(easy, CURLOPT_HTTPHEADER, headers_);
    curl_easy_setopt(easy, CURLOPT_POSTFIELDS, call->body.c_str());
    curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(call->body.size()));
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, OnData);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, call.get());
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_NOPROXY, "*");  // the server that was named, and nobody between
    if (options_.tls.has_value()) Encrypt(easy);
    if (options_.timeout_s > 0) {
      curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS,
                       static_cast<long>(options_.timeout_s * 1e3) + 1);  // NOLINT: curl's type
    }
    call->clock.Start();
    curl_multi_add_handle(multi_, easy);
    calls_[easy] = std::move(call);
  }

  void End(CURL* easy, CURLcode result) {
    const std::unique_ptr<HttpCall> call = std::move(calls_[easy]);
    calls_.erase(easy);
    long status = 0;  // NOLINT: curl's type
    curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
    curl_multi_remove_handle(multi_, easy);
    curl_easy_cleanup(easy);
    if (result != CURLE_OK) {
      call->error = result == CURLE_OPERATION_TIMEDOUT ? "TIMEOUT" : "TRANSPORT";
      call->message = curl_easy_strerror(result);
    } else if (status != 200) {
      call->OnLine();  // a body without a newline
      call->error = absl::StrCat("HTTP_", status);
      call->message = call->answer;
    }
    call->clock.record().output_tokens = call->counted > 0 ? call->counted : call->chunks;
    call->done(call->clock.Finish(call->error, call->message));
  }

  DriverOptions options_;
  std::string url_;
  curl_slist* headers_ = nullptr;
  curl_slist* connect_to_ = nullptr;
  CURLM* multi_;
  std::map<CURL*, std::unique_ptr<HttpCall>> calls_;  // of the thread
  std::mutex mutex_;
  std::deque<std::unique_ptr<HttpCall>> queue_;  // guarded by mutex_
  bool stopping_ = false;                        // guarded by mutex_
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Driver> MakeOpenAiDriver(const DriverOptions& options) {
  return std::make_unique<OpenAiDriver>(options);
}

}  // namespace minitron::bench
