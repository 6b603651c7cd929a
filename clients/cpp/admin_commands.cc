// minitron models, health, load, info, cancel, drain.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "clients/cpp/commands.h"
#include "clients/cpp/format.h"

namespace minitron::client {
namespace {

using grpc::health::v1::HealthCheckResponse;

int PrintAs(const Session& session, const google::protobuf::Message& message, const std::string& text) {
  return Print(session.json ? ToJsonLine(message) : text) ? kExitOk : kExitOutput;
}

}  // namespace

int RunModels(const Session& session) {
  if (!session.arguments.positionals().empty()) {
    v1::Model model;
    if (const Outcome error = session.client->GetModel(session.arguments.positionals()[0], &model)) {
      return Fail(session, *error);
    }
    return PrintAs(session, model, FormatModel(model));
  }
  v1::ListModelsResponse response;
  if (const Outcome error = session.client->ListModels(&response)) return Fail(session, *error);
  std::string text;
  for (const v1::Model& model : response.models()) text += FormatModel(model);
  return PrintAs(session, response, text);
}

int RunHealth(const Session& session) {
  const auto& positionals = session.arguments.positionals();
  HealthCheckResponse response;
  if (const Outcome error = session.client->CheckHealth(positionals.empty() ? "" : positionals[0], &response)) {
    return Fail(session, *error);
  }
  const int printed = PrintAs(session, response, HealthCheckResponse::ServingStatus_Name(response.status()) + "\n");
  if (printed != kExitOk) return printed;
  return response.status() == HealthCheckResponse::SERVING ? kExitOk : kExitNotServing;
}

int RunLoad(const Session& session) {
  v1::GetLoadResponse response;
  if (const Outcome error = session.client->GetLoad(&response)) return Fail(session, *error);
  return PrintAs(session, response, FormatLoad(response));
}

int RunInfo(const Session& session) {
  v1::GetServerInfoResponse response;
  if (const Outcome error = session.client->GetServerInfo(&response)) return Fail(session, *error);
  return PrintAs(session, response, FormatInfo(response));
}

int RunCancel(const Session& session) {
  const auto& names = session.arguments.positionals();
  if (names.empty()) return FailUsage(session, {"no request id"});
  v1::CancelRequestsResponse response;
  if (const Outcome error = session.client->CancelRequests(names, &response)) return Fail(session, *error);
  return PrintAs(session, response, absl::StrCat("cancelled ", response.cancelled(), " of ", names.size(), "\n"));
}

int RunDrain(const Session& session) {
  if (const Outcome error = session.client->Drain()) return Fail(session, *error);
  return PrintAs(session, v1::DrainResponse(), "draining\n");
}

}  // namespace minitron::client
