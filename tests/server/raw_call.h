// A call of any method by name, with raw bytes: for tests that walk methods nobody listed for them.
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <string>
#include <vector>

namespace minitron::server {

struct RawResult {
  grpc::Status status;
  std::vector<std::string> messages;
};

// Sends one message to "/package.Service/Method" and reads all answers. `token`: for the authorization header, if any.
inline RawResult CallRaw(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                         const std::string& token, const std::string& message = "") {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  if (!token.empty()) context.AddMetadata("authorization", token);
  grpc::CompletionQueue queue;
  const auto wait = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  RawResult result;
  auto call = stub.PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  if (wait()) {
    const grpc::Slice slice(message);
    call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
    wait();
    grpc::ByteBuffer answer;
    for (call->Read(&answer, nullptr); wait(); call->Read(&answer, nullptr)) {
      grpc::Slice whole;
      if (!answer.DumpToSingleSlice(&whole).ok()) break;
      result.messages.emplace_back(reinterpret_cast<const char*>(whole.begin()), whole.size());
    }
  }
  call->Finish(&result.status, nullptr);
  wait();
  queue.Shutdown();
  while (wait()) {
  }
  return result;
}

}  // namespace minitron::server
