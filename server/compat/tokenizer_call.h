// One call of GetTokenizer: the archive of ServerContext, piece by piece, as fast as the client reads.
#pragma once

#include <compat/vllm_common.pb.h>
#include <grpcpp/grpcpp.h>

#include <cstddef>

#include "server/rpc_scope.h"

namespace minitron::server::compat {

// Owns itself until OnDone. gRPC calls one method after the other: there is one write at a time.
class TokenizerCall final : public grpc::ServerWriteReactor<::smg::grpc::common::GetTokenizerChunk> {
 public:
  // Begins the answer, or ends the call with its error.
  static TokenizerCall* Start(ServerContext* server, grpc::CallbackServerContext* context);

  void OnWriteDone(bool ok) override;
  void OnDone() override;

 private:
  TokenizerCall(ServerContext* server, grpc::CallbackServerContext* context);
  void WriteNext();

  RpcScope scope_;
  size_t offset_ = 0;
  bool ended_ = false;
  ::smg::grpc::common::GetTokenizerChunk chunk_;
};

}  // namespace minitron::server::compat
