#include "server/compat/tokenizer_call.h"

#include <algorithm>

#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

constexpr size_t kChunkBytes = 64 << 10;  // what gateways expect of a piece

}  // namespace

TokenizerCall::TokenizerCall(ServerContext* server, grpc::CallbackServerContext* context)
    : scope_(server, context, "GetTokenizer") {
  server->metrics->StreamOpened();
}

TokenizerCall* TokenizerCall::Start(ServerContext* server, grpc::CallbackServerContext* context) {
  auto* const call = new TokenizerCall(server, context);
  absl::Status status = call->scope_.Begin().status();
  if (status.ok()) status = server->tokenizer_bundle.status();
  if (status.ok()) {
    call->WriteNext();
  } else {
    call->Finish(call->scope_.Close(status));
  }
  return call;
}

void TokenizerCall::WriteNext() {
  const TokenizerBundle& bundle = *scope_.server()->tokenizer_bundle;
  const size_t size = std::min(kChunkBytes, bundle.zip.size() - offset_);
  chunk_.set_data(bundle.zip.data() + offset_, size);
  offset_ += size;
  ended_ = offset_ == bundle.zip.size();
  if (!ended_) {
    StartWrite(&chunk_);
    return;
  }
  chunk_.set_sha256(bundle.sha256);
  StartWriteAndFinish(&chunk_, grpc::WriteOptions(), scope_.Close(absl::OkStatus()));
}

void TokenizerCall::OnWriteDone(bool ok) {
  if (ended_) return;
  if (ok) {
    WriteNext();
    return;
  }
  ended_ = true;
  Finish(scope_.Close(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client is gone")));
}

void TokenizerCall::OnDone() {
  scope_.server()->metrics->StreamClosed();
  delete this;
}

}  // namespace minitron::server::compat
